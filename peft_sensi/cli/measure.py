"""The command `measure`: latency tables, and checks of what they predicted."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any

from ..anatomy.latency import LatencyTable, latency_facts
from ..merging.latency_graphs import GRAPHS, measure_graphs
from ..reporting.tables import facts_table
from ..utils.errors import SensiError
from . import arguments as args
from .arguments import argument, option
from .terminal import print_result, step


Runtime = enum.StrEnum("Runtime", {"torch": "torch", "onnxruntime": "onnxruntime"})  # type: ignore[misc]
TORCH = Runtime("torch")


def measure(
    model: Annotated[str, argument("MODEL", "A model, a folder of graphs that --export wrote, or an adapter.")],
    batch_size: Annotated[int, option("--batch-size", "N", "Sequences in a batch.", min=1)] = 1,
    sequence_length: Annotated[
        int, option("--sequence-length", "N", "Tokens of a sequence; with --decode, tokens in the cache.", min=1)
    ] = 128,
    runtime: Annotated[Runtime, option("--runtime", "NAME", "torch or onnxruntime.")] = TORCH,
    threads: Annotated[
        int | None, option("--threads", "N", "Number of threads. Default: all that PyTorch uses.", min=1)
    ] = None,
    decode: Annotated[
        bool, option("--decode", None, "Measure one decoding step with a cache, for --decode-latency.")
    ] = False,
    rounds: Annotated[int, option("--rounds", "N", "How often each variant takes its turns.", min=1)] = 7,
    out: Annotated[Path | None, option("--out", "FILE", "Save the table as JSON.")] = None,
    export: Annotated[
        Path | None,
        option("--export", "FOLDER", "Measure nothing: write graphs for a device that has onnxruntime only."),
    ] = None,
    against: Annotated[
        str | None, option("--against", "BASE", "MODEL is an adapter: check its prediction against this base model.")
    ] = None,
    json: args.Json = False,
    debug: args.Debug = False,
) -> None:
    """Measure the latency of a model for plans with --latency, or check what a plan predicted.

    A folder of graphs needs neither PyTorch nor PEFT on the device that measures it.
    """
    options: dict[str, Any] = {"batch_size": batch_size, "sequence_length": sequence_length}
    if against is not None:
        check(model, against, rounds, json)
        return
    if export is not None:
        from ..merging.latency import export_graphs

        if decode or out is not None:
            raise SensiError("--export writes graphs of whole sequences, and no table: leave out --decode and --out.")
        with step("exporting the graphs", show=not json):
            export_graphs(load_base(model), export, **options)
        lines = f"{export}: copy it to the device and run there: peft-sensi measure {export.name} --out table.json"
        print_result(json, {"folder": str(export)}, lines)
        return
    if (Path(model) / GRAPHS).is_file():
        with step("measuring", show=not json):
            table = measure_graphs(model, threads, rounds)
    else:
        from ..merging.latency import measure_latency

        base = load_base(model)
        with step("measuring", show=not json):
            table = measure_latency(
                base, runtime=runtime.value, threads=threads, decode=decode, rounds=rounds, **options
            )
    report(table, out, json)


def report(table: LatencyTable, out: Path | None, json: bool) -> None:
    if out is not None:
        table.save(out)
    print_result(json, table.to_dict(), str(table), *([] if out is None else [f"saved as {out}"]))


def load_base(name: str) -> Any:
    """The model with the head that its config names, in evaluation mode."""
    import transformers

    from ..reporting.saved import load_pretrained

    config = load_pretrained(transformers.AutoConfig, name)
    architecture = next(iter(config.architectures or ()), "")
    known = getattr(transformers, architecture, None)
    is_model = isinstance(known, type) and issubclass(known, transformers.PreTrainedModel)
    return load_pretrained(known if is_model else transformers.AutoModel, name).eval()


def check(adapter: str, base: str, rounds: int, json: bool) -> None:
    """Times the merged model and its base for each table that the adapter's plan was predicted with."""
    from ..merging.latency import check_prediction
    from ..reporting.saved import load_adapter, open_adapter

    saved = open_adapter(adapter)
    if not saved.config.latency:
        raise SensiError(f"{adapter} has no predicted latency: its plan was made without a latency table.")
    with step("loading the model", show=not json):
        merged: Any = load_adapter(saved, base).merge_and_unload().eval()
        whole = load_adapter(saved, base).unload().eval()
    results = {}
    for name, record in saved.config.latency.items():
        with step(f"measuring {name}", show=not json):
            results[name] = check_prediction(merged, whole, record, rounds)
    facts = latency_facts(saved.config.latency)
    for name, r in results.items():
        facts[f"measured {name}"] = f"{r['merged_ms']:.3g} ms of {r['base_ms']:.3g} ({r['measured_share']:.2%})"
        facts[f"off by ({name})"] = f"{r['off']:+.1%}"
    print_result(json, results, facts_table(facts))
