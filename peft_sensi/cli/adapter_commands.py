"""The commands that start from a saved adapter or a merged model: `inspect`, `check`, `merge` and others."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from ..reporting.tables import facts_table, legend, plan_table, records_table
from ..utils.errors import SensiError
from ..utils.formatting import short_names, size_of
from . import arguments as args
from .arguments import argument, option
from .checks import TABLE, check_merged, check_new, check_place
from .loading import load_saved, refuse_base, takes_texts
from .terminal import ascii_only, err, out, print_result, step


# What needs PyTorch is imported inside the functions, so that `--help` does not wait for it.
if TYPE_CHECKING:
    from ..reporting.uploads import Upload


def inspect(adapter: args.AdapterOrMerged, base: args.Base = None, as_json: args.Json = False) -> None:
    """Show what is in an adapter or a merged model.

    No weights are loaded. The shares of an adapter need the base model's configuration.
    """
    from ..reporting.facts import adapter_facts, adapter_figures
    from ..reporting.pretrained import file_in
    from ..reporting.saved import plan_without_weights
    from ..reporting.saved_merged import SavedMerged, merged_facts, merged_figures, open_saved

    saved = open_saved(adapter)
    if isinstance(saved, SavedMerged):
        refuse_base(adapter, base)
        figures = merged_figures(saved)
        print_result(as_json, figures, facts_table(merged_facts(figures)), widths_table(figures["groups"]))
        return
    plan = plan_without_weights(saved, base)
    shown = saved.config.plan if plan is None else plan
    tables = facts_table(adapter_facts(saved, plan)), plan_table(shown, ascii_only()), legend(shown, ascii_only())
    print_result(as_json, adapter_figures(saved, plan), *tables)
    if plan is None and not as_json:
        named = base or saved.base
        why = "which the adapter does not name: give it with --base"
        if named:
            is_there = file_in(named, "config.json") is not None
            why = f"and this is another one: {named}" if is_there else f"which was not found: {named}"
        err.print(Text(f"The shares need the base model, {why}", "dim"))


def check(adapter: args.AdapterOrMerged, base: args.Base = None, as_json: args.Json = False) -> None:
    """Check an adapter or a merged model. The exit status is 1 if something is wrong.

    Checked are the files (do they belong together, are all values finite), the versions, the tokenizer, the base of an
    adapter (is it the one that the adapter was made for), and the outputs for one batch.
    """
    from ..reporting.checking import WRONG, check_saved

    with step("checking", show=not as_json):
        findings = list(check_saved(adapter, base))
    wrong = [finding for finding in findings if finding.status == WRONG]
    table = records_table(
        ["checked", "result", ""], [[finding.what, finding.status, finding.text] for finding in findings]
    )
    verdict = f"{len(wrong)} of {len(findings)} checks failed." if wrong else "Nothing is wrong."
    print_result(as_json, {"ok": not wrong, "findings": [f.to_dict() for f in findings]}, table, Text(verdict))
    if wrong:
        raise typer.Exit(1)


def merge(
    adapter: args.Adapter,
    folder: Annotated[Path, argument("OUT", "The folder for the model.")],
    overwrite: args.OverwriteFiles = False,
    base: args.Base = None,
    as_json: args.Json = False,
) -> None:
    """Merge an adapter into its base. The result is a Transformers model with smaller matrices.

    The folder gets the tokenizer and the metrics of the adapter, too. If it has a card of another model by this
    package, the card is written again.
    """
    from ..merging.foreign import MODEL_CONFIG
    from ..merging.save import save_merged
    from ..reporting.card import named_base, write_card
    from ..reporting.card_files import has_section, load_card
    from ..reporting.pretrained import TOKENIZER_FILES
    from ..reporting.saved import CARD, METRICS
    from ..reporting.saved_merged import SavedMerged, open_saved, tokenizer_of
    from ..reporting.task_record import metrics_of
    from ..utils.files import write_json_atomically
    from ..utils.hub_names import absolute

    check_merged(folder, overwrite)
    saved, model = load_saved(adapter, base, as_json)
    if isinstance(saved, SavedMerged):
        raise SensiError(f"{adapter} is a merged model already, so there is nothing to do.")
    # Before anything is written, because they may be damaged.
    tokenizer, metrics = tokenizer_of(saved, base), metrics_of(saved.folder)
    if has_card := has_section(folder / CARD):
        load_card(folder / CARD)
    if metrics and (named := named_base(base, saved.base)) is not None:
        metrics["model"] = absolute(named)  # the card of a merged model takes its base from here
    with step("merging", show=not as_json):
        small = model.merge_and_unload()
        replaces_model = (folder / MODEL_CONFIG).is_file()
        plain = save_merged(small, folder)
        for name in (*TOKENIZER_FILES, METRICS) if replaces_model else ():
            (folder / name).unlink(missing_ok=True)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if metrics:
            write_json_atomically(folder / METRICS, metrics)
        if has_card:
            write_card(open_saved(folder))
    count = sum(parameter.numel() for parameter in small.parameters())
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    print_result(
        as_json,
        {"folder": str(folder), "parameters": count, "bytes": size, "loads_without_peft_sensi": plain},
        f"{folder}: {count:,} parameters, {size_of(size)}",
        Text(
            "All layers have the same widths: AutoModel...from_pretrained loads it, without peft_sensi."
            if plain
            else "Layers have different widths: load it with peft_sensi.load_merged(folder), or, without peft_sensi, "
            "with trust_remote_code=True."
        ),
    )


def export(
    adapter: args.AdapterOrMerged,
    file: Annotated[Path, argument("OUT.onnx", "The file to write.")],
    int8: Annotated[bool, option("--int8", None, "Also write a copy with 8-bit weights, OUT.int8.onnx.")] = False,
    opset: Annotated[int, option("--opset", "N", "The version of ONNX's operators, from 14 to 20.", min=14)] = 17,
    overwrite: args.OverwriteFiles = False,
    base: args.Base = None,
    as_json: args.Json = False,
) -> None:
    """Write the merged model as an ONNX file for any batch size and length, and check it in onnxruntime.

    The folder of the file also gets the tokenizer and NAME.json, with the labels, the longest input and what else a
    program needs. The command predict can use the folder.
    """
    from ..merging.onnx import export_onnx
    from ..reporting.onnx_folder import example_for, load_tokenizer, write_companions
    from ..reporting.pretrained import TOKENIZER_FILES
    from ..reporting.saved import CONFIG, METRICS
    from ..utils.hub_names import UNFINISHED

    if file.suffix != ".onnx" or file.name.endswith(".int8.onnx"):
        raise SensiError(f"{file}: the name of an ONNX file ends in .onnx, and that of its --int8 copy in .int8.onnx.")
    others = {*TOKENIZER_FILES, "config.json", "generation_config.json", CONFIG, METRICS, UNFINISHED, TABLE}
    if file.with_suffix(".json").name in others:
        raise SensiError(f"{file}: {file.stem}.json, which goes beside it, is the name of another file.")
    check_place(file, "OUT.onnx")
    check_new([file, file.with_suffix(".json"), *([file.with_suffix(".int8.onnx")] if int8 else [])], overwrite)
    saved, model = load_saved(adapter, base, as_json)
    if not takes_texts(model):
        raise SensiError(
            f"The command exports models of texts, and {adapter} takes other inputs. In Python, "
            f"peft_sensi.export_onnx(model, path, inputs=batch) exports models of other sequences; for images, merge "
            f"the adapter, and call torch.onnx.export."
        )
    with step("exporting", show=not as_json):
        tokenizer = load_tokenizer(saved, base, file.parent)
        file.parent.mkdir(parents=True, exist_ok=True)
        report = export_onnx(model, file, inputs=example_for(tokenizer, model), int8=int8, opset=opset)
        companions = write_companions(saved, model, tokenizer, report)
    lines = [str(report), *(f"beside it: {path.name}" for path in companions)]
    print_result(as_json, asdict(report) | {"beside": [str(path) for path in companions]}, *lines)


def card(
    adapter: args.AdapterOrMerged,
    results: args.Results = None,
    license: args.License = None,
    repo: Annotated[
        str | None, option("--repo", "REPO", "The name on the Hub, for the title and the code. Default: the folder's.")
    ] = None,
    folder: Annotated[
        Path | None, option("--out", "FOLDER", "The folder for the card. Default: that of the model.")
    ] = None,
    base: args.Base = None,
    as_json: args.Json = False,
) -> None:
    """Write the model card of an adapter or a merged model: README.md and, for an adapter, a picture of the plan.

    In a card that exists, only our section is written again, between two comments. What is around it stays.
    """
    from ..reporting.card import write_card
    from ..reporting.card_files import has_section
    from ..reporting.repositories import check_name
    from ..reporting.saved import CARD, PICTURE
    from ..reporting.saved_merged import open_saved

    if repo is not None:
        check_name(repo)
    saved = open_saved(adapter)
    if folder is None and not Path(adapter).is_dir():  # its files are in the cache, where nothing may be changed
        raise SensiError(f"{adapter} is on the Hub: give a folder for the card with --out.")
    if folder is not None:
        if folder.exists() and not folder.is_dir():
            raise SensiError(f"{folder} is a file: --out needs the path of a folder.")
        folder.mkdir(parents=True, exist_ok=True)
        other_folder = folder.resolve() != saved.folder.resolve()
        if other_folder and (folder / PICTURE).exists() and not has_section(folder / CARD):
            raise SensiError(
                f"{folder / PICTURE} belongs to no card of this command, and would be replaced: move it, or give "
                f"another folder with --out."
            )
    written = write_card(saved, results=results, license=license, base=base, repo=repo, folder=folder)
    paths = [str(path) for path in written]
    print_result(as_json, {"files": paths}, *paths)


def push(
    adapter: args.AdapterOrMerged,
    repo: args.Repo,
    private: Annotated[bool, option("--private", None, "Create a private repository.")] = False,
    dry_run: Annotated[
        bool, option("--dry-run", None, "Only list what would be uploaded. Needs no connection.")
    ] = False,
    results: args.Results = None,
    license: args.License = None,
    message: Annotated[
        str | None, option("--message", "TEXT", "The message of the commit. Default: Upload adapter, or Upload model.")
    ] = None,
    base: args.Base = None,
    as_json: args.Json = False,
) -> None:
    """Upload an adapter or a merged model with its model card to the Hub (log in first: hf auth login).

    Only the files of the model, its tokenizer, card and metrics are uploaded, without paths of this machine.
    """
    from ..reporting.hub import push_folder
    from ..reporting.saved_merged import open_saved

    listed: list[str] = []

    def announce(upload: Upload, visibility: str | None) -> None:
        listed.extend(upload.files)
        for line in [*upload.lines(), *([visibility] if visibility else [])]:
            if not as_json:
                (out if dry_run else err).print(Text(line), soft_wrap=True)

    saved = open_saved(adapter)
    with step(f"uploading to {repo}", show=not as_json and not dry_run):
        commit = push_folder(
            saved, repo, private=private or None, commit_message=message, results=results, license=license, base=base,
            dry_run=dry_run, announce=announce,
        )  # fmt: skip
    if dry_run:
        who = "private" if private else "public, unless it exists and is private: --private creates a private one"
        print_result(as_json, {"repo": repo, "files": listed, "private": private}, Text(f"{repo} would be {who}."))
    else:
        print_result(as_json, {"url": commit.commit_url, "repo": repo, "files": listed}, commit.commit_url)


def widths_table(groups: list[dict[str, Any]]) -> Any:
    """Kept and former numbers of heads and neurons, one line for each block."""
    names = short_names(group["name"].rpartition(".")[0] for group in groups)
    kinds = list(dict.fromkeys(group["kind"] for group in groups))
    lines: dict[str, dict[str, str]] = {}
    for group in groups:
        line = lines.setdefault(names[group["name"].rpartition(".")[0]], {})
        line[group["kind"]] = f"{group['kept']:,}/{group['size']:,}"
    rows = [[name, *(line.get(kind, "") for kind in kinds)] for name, line in lines.items()]
    return records_table(["block", *(f"{kind}s" for kind in kinds)], rows)
