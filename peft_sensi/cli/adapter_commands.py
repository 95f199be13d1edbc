"""The commands that start from a saved adapter: `inspect`, `merge`, `export`, `card` and `push`."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.text import Text

from ..reporting.tables import facts_table, legend, plan_table
from ..utils.errors import SensiError
from ..utils.formatting import size_of
from . import arguments as args
from .arguments import argument, option
from .terminal import ascii_only, err, print_result, step


# What needs PyTorch is imported inside the functions, so that `--help` does not wait for it.
if TYPE_CHECKING:
    from ..reporting.saved import SavedAdapter


def inspect(adapter: args.Adapter, base: args.Base = None, json: args.Json = False, debug: args.Debug = False) -> None:
    """Show what is in an adapter. No weights are loaded; shares need the base model's configuration."""
    from ..reporting.facts import adapter_facts, adapter_figures
    from ..reporting.saved import open_adapter, plan_without_weights

    saved = open_adapter(adapter)
    plan = plan_without_weights(saved, base)
    shown = saved.config.plan if plan is None else plan
    tables = facts_table(adapter_facts(saved, plan)), plan_table(shown, ascii_only()), legend(shown, ascii_only())
    print_result(json, adapter_figures(saved, plan), *tables)
    if plan is None and not json:
        err.print(Text(f"The shares need the base model, which was not found: {base or saved.base}", "dim"))


def merge(
    adapter: args.Adapter,
    folder: Annotated[Path, argument("OUT", "The folder for the model.")],
    base: args.Base = None,
    json: args.Json = False,
    debug: args.Debug = False,
) -> None:
    """Merge an adapter into its base: the result is a Transformers model with smaller matrices, for `load_merged`."""
    from transformers import AutoTokenizer

    from ..merging.save import save_merged

    saved, model = load_saved(adapter, base, json)
    with step("merging", show=not json):
        small = model.merge_and_unload()
        plain = save_merged(small, folder)
        for source in (str(saved.folder), base or saved.base):
            # A missing tokenizer has many errors, and the merged model is already saved.
            with contextlib.suppress(Exception):
                AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(folder)
                break
    count = sum(parameter.numel() for parameter in small.parameters())
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    print_result(
        json,
        {"folder": str(folder), "parameters": count, "bytes": size, "loads_without_peft_sensi": plain},
        f"{folder}: {count:,} parameters, {size_of(size)}",
        "All layers have the same widths: AutoModel...from_pretrained loads it, without peft_sensi."
        if plain
        else "Layers have different widths: load it with peft_sensi.load_merged(folder),\n"
        "or, without peft_sensi, with trust_remote_code=True.",
    )


def export(
    adapter: args.Adapter,
    file: Annotated[Path, argument("OUT.onnx", "The file to write.")],
    int8: Annotated[bool, option("--int8", None, "Also write a copy with 8-bit weights, OUT.int8.onnx.")] = False,
    opset: Annotated[int, option("--opset", "N", "The version of ONNX's operators.", min=14)] = 17,
    base: args.Base = None,
    json: args.Json = False,
    debug: args.Debug = False,
) -> None:
    """Write the merged model as an ONNX file for any batch size and length, and check it in onnxruntime."""
    from ..merging.onnx import export_onnx

    if file.suffix.lower() != ".onnx":
        raise SensiError(f"{file}: the name of an ONNX file ends in .onnx.")
    _, model = load_saved(adapter, base, json)
    with step("exporting", show=not json):
        file.parent.mkdir(parents=True, exist_ok=True)
        report = export_onnx(model, file, int8=int8, opset=opset)
    print_result(json, asdict(report), str(report))


def card(
    adapter: args.Adapter,
    results: args.Results = None,
    license: args.License = None,
    repo: Annotated[str | None, option("--repo", "REPO", "The adapter's name on the Hub.")] = None,
    folder: Annotated[
        Path | None, option("--out", "FOLDER", "The folder for the card. Default: the adapter's.")
    ] = None,
    base: args.Base = None,
    json: args.Json = False,
    debug: args.Debug = False,
) -> None:
    """Write the model card (README.md and a picture of the plan) into an adapter's folder."""
    from ..reporting.card import write_card
    from ..reporting.saved import open_adapter

    saved = open_adapter(adapter)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    written = write_card(saved, results=results, license=license, base=base, repo=repo, folder=folder)
    paths = [str(path) for path in written]
    print_result(json, {"files": paths}, *paths)


def push(
    adapter: args.Adapter,
    repo: args.Repo,
    private: Annotated[bool, option("--private", None, "Create a private repository.")] = False,
    results: args.Results = None,
    license: args.License = None,
    message: Annotated[str, option("--message", "TEXT", "The message of the commit.")] = "Upload adapter",
    base: args.Base = None,
    json: args.Json = False,
    debug: args.Debug = False,
) -> None:
    """Upload an adapter with its model card to the Hub (log in first: hf auth login)."""
    from ..reporting.hub import push_folder
    from ..reporting.saved import open_adapter

    saved = open_adapter(adapter)
    with step(f"uploading to {repo}", show=not json):
        commit = push_folder(
            saved, repo, private=private or None, commit_message=message, results=results, license=license, base=base
        )
    print_result(json, {"url": commit.commit_url, "repo": repo}, commit.commit_url)


def load_saved(adapter: str, base: str | None, json: bool) -> tuple[SavedAdapter, Any]:
    from ..reporting.saved import load_adapter, open_adapter

    saved = open_adapter(adapter)
    with step("loading the model", show=not json):
        return saved, load_adapter(saved, base)
