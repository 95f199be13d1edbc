"""The command `measure`: latency tables, and checks of what they predicted."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from rich.text import Text

from ..anatomy.latency import LatencyTable, latency_facts
from ..merging.latency_graphs import GRAPHS, measure_graphs
from ..reporting.tables import facts_table
from ..utils.checks import MOST_THREADS
from ..utils.errors import SensiError
from . import arguments as args
from .arguments import argument, option
from .checks import check_files
from .terminal import print_result, step


Runtime = enum.StrEnum("Runtime", {"torch": "torch", "onnxruntime": "onnxruntime"})  # type: ignore[misc]
TORCH = Runtime("torch")


def measure(
    model: Annotated[str, argument("MODEL", "A model, a folder of graphs that --export wrote, or an adapter.")],
    batch_size: Annotated[int | None, option("--batch-size", "N", "Sequences in a batch. Default: 1.", min=1)] = None,
    sequence_length: Annotated[
        int | None,
        option(
            "--sequence-length",
            "N",
            "Tokens of a sequence; with --decode, tokens in the cache. Default: 128, or as many as the model takes.",
            min=1,
        ),
    ] = None,
    runtime: Annotated[Runtime | None, option("--runtime", "NAME", "torch or onnxruntime. Default: torch.")] = None,
    threads: Annotated[
        int | None,
        option(
            "--threads",
            "N",
            "Number of threads. Default: all that PyTorch uses, or one per core for graphs.",
            min=1,
            max=MOST_THREADS,
        ),
    ] = None,
    decode: Annotated[
        bool, option("--decode", None, "Measure one decoding step with a cache, for --decode-latency.")
    ] = False,
    rounds: Annotated[
        int | None,
        option(
            "--rounds",
            "N",
            "How often each variant takes its turn. Default: 7. With --against, three times as often.",
            min=1,
        ),
    ] = None,
    out: Annotated[Path | None, option("--out", "FILE", "Save the table as JSON.")] = None,
    export: Annotated[
        Path | None,
        option("--export", "FOLDER", "Measure nothing: write graphs for a device that has onnxruntime only."),
    ] = None,
    against: Annotated[
        str | None,
        option(
            "--against",
            "BASE",
            "MODEL is an adapter: compare its time, and what its plan predicted, with this base model.",
        ),
    ] = None,
    overwrite: args.OverwriteFiles = False,
    as_json: args.Json = False,
) -> None:
    """Measure the latency of a model for plans with --latency, or compare an adapter with its base.

    A folder of graphs needs neither PyTorch nor PEFT on the device that measures it.
    """
    shape = {"--batch-size": batch_size, "--sequence-length": sequence_length}
    how = {"--runtime": runtime, "--threads": threads, "--decode": decode}
    options: dict[str, Any] = {"batch_size": batch_size or 1}
    if against is not None:
        writing = {"--out": out, "--export": export, "--overwrite": overwrite}
        args.refuse(writing, "is about files to write, and --against compares two models")
        options |= {"runtime": (runtime or TORCH).value, "threads": threads, "decode": decode}
        compare(model, against, rounds or 7, as_json, shape | how, sequence_length, **options)
        return
    if export is not None:
        from ..merging.latency import export_graphs

        args.refuse({"--overwrite": overwrite}, "is about --out, and --export needs the name of a new folder")
        measured = how | {"--rounds": rounds, "--out": out}
        args.refuse(measured, "is about a measurement, and --export only writes graphs of whole sequences")
        base = _load_to_measure(model)
        length = length_for(base, sequence_length)
        with step("exporting the graphs", show=not as_json):
            export_graphs(base, export, sequence_length=length, **options)
        lines = f"{export}: copy it to the device and run there: peft-sensi measure {export.name} --out table.json"
        print_result(as_json, {"folder": str(export)}, lines)
        return
    check_files({"--out": out}, overwrite)
    if (Path(model) / GRAPHS).is_file():
        known = shape | {"--decode": decode, "--runtime": runtime == TORCH}
        args.refuse(known, f"was chosen when the graphs in {model} were exported, for onnxruntime")
        with step("measuring", show=not as_json):
            table = measure_graphs(model, threads, rounds or 7)
    else:
        from ..merging.latency import measure_latency

        base = _load_to_measure(model)
        length = length_for(base, sequence_length, decode)
        options |= {"sequence_length": length, "decode": decode, "rounds": rounds or 7}
        with step("measuring", show=not as_json):
            table = measure_latency(base, runtime=(runtime or TORCH).value, threads=threads, **options)
    report(table, out, as_json)


def report(table: LatencyTable, out: Path | None, as_json: bool) -> None:
    if out is not None:
        table.save(out)
    print_result(as_json, table.to_dict(), Text(str(table)), *([] if out is None else [f"saved as {out}"]))


def _load_to_measure(name: str) -> Any:
    """The model with the head that its config names, in evaluation mode."""
    import transformers

    from ..anatomy.widths import RECORD_KEY
    from ..merging.load import load_merged
    from ..reporting.pretrained import load_pretrained
    from ..reporting.saved import is_adapter
    from ..reporting.saved_merged import open_saved

    if is_adapter(name):
        raise SensiError(f"{name} is an adapter: give its base model with --against to compare the two.")
    config = load_pretrained(transformers.AutoConfig, name)
    architecture = next(iter(config.architectures or ()), "")
    known = getattr(transformers, architecture, None)
    is_model = isinstance(known, type) and issubclass(known, transformers.PreTrainedModel)
    if hasattr(config, RECORD_KEY):
        return load_merged(open_saved(name).folder)
    return load_pretrained(known if is_model else transformers.AutoModel, name).eval()


def length_for(model: Any, given: int | None, decode: bool = False) -> int:
    """The given length, or `usual_length`. Raises `SensiError` if the model does not take inputs of the given one."""
    from ..anatomy.inputs import image_tokens, longest_to_measure, usual_length

    if (tokens := image_tokens(model)) is not None:
        args.refuse({"--sequence-length": given}, f"is about texts, and an image has {tokens} tokens here")
        return tokens
    if given is None:
        return usual_length(model, decode)
    if (most := longest_to_measure(model, decode)) is not None and most < given:
        what = "cached tokens before a step" if decode else "tokens"
        raise SensiError(f"The model takes at most {most} {what}: give --sequence-length {most} or less.")
    return given


def compare(
    adapter: str, base: str, rounds: int, as_json: bool, given: Mapping[str, Any], length: int | None, **options: Any
) -> None:
    """Times the merged model and its base for each table that the adapter's plan was predicted with.

    If the plan was made without a table, both are timed once, as the `options` of `compare_latency` say. `given` are
    the same options as the user gave them, and `length` is --sequence-length.
    """
    from ..merging.latency import check_prediction, compare_latency
    from ..reporting.saved import load_adapter, open_adapter

    saved = open_adapter(adapter)
    if saved.config.latency:
        args.refuse(given, f"is that of the table that the plan of {adapter} was made with")
    with step("loading the model", show=not as_json):
        merged: Any = load_adapter(saved, base).merge_and_unload().eval()
        whole = load_adapter(saved, base).unload().eval()
    if not saved.config.latency:
        options["sequence_length"] = length_for(whole, length, options["decode"])
        with step("measuring", show=not as_json):
            merged_ms, base_ms = compare_latency(merged, whole, rounds=rounds, **options)
        found = {"merged_ms": merged_ms, "base_ms": base_ms, "measured_share": merged_ms / base_ms}
        text = f"{merged_ms:.3g} ms of {base_ms:.3g} ({merged_ms / base_ms:.2%})"
        print_result(as_json, found, facts_table({"measured latency": text}))
        return
    results = {}
    for name, record in saved.config.latency.items():
        with step(f"measuring {name}", show=not as_json):
            results[name] = check_prediction(merged, whole, record, rounds)
    facts = latency_facts(saved.config.latency)
    for name, r in results.items():
        facts[f"measured {name}"] = f"{r['merged_ms']:.3g} ms of {r['base_ms']:.3g} ({r['measured_share']:.2%})"
        facts[f"off by ({name})"] = f"{r['off']:+.1%}"
    print_result(as_json, results, facts_table(facts))
