"""What `metrics.json` says about a training goes in; tables and metadata for a model card come out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from ..utils.checks import is_number
from ..utils.errors import SensiError
from ..utils.files import read_json
from .task_record import checked_record


# The settings of a training that a card shows, by their names in `metrics.json`. Those that are missing, `None` or
# `False` there are left out.
_SETTINGS = {
    "recipe": "recipe",
    "late": "trimmed during the training (`--late`)",
    "thorough": "trained whole first (`--thorough`)",
    "epochs": "epochs",
    "learning_rate": "learning rate",
    "batch_size": "batch size",
    "max_length": "longest input, in tokens",
    "class_weights": "class weights",
    "early_stopping": "early stopping, epochs without progress",
    "base_revision": "revision of the base",
    "bf16": "bfloat16",
    "seed": "seed",
}


MEASURED_BY_US = {"measured_by": "peft_sensi"}  # in the results that a later card replaces; all others stay


def results_table(results: Any) -> str:
    """Measured numbers as a Markdown table; see `write_card` for their forms and the errors. Empty for `None`."""
    if results is None:
        return ""
    source = repr(results)
    if isinstance(results, (str, Path)):
        source, results = str(results), read_json(results)
    if isinstance(results, Mapping):
        numbers = results["validation"] if isinstance(results.get("validation"), Mapping) else results
        rows = [(name, cell(value)) for name, value in numbers.items() if is_number(value)]
        counts = results.get("rows")
        if isinstance(counts, Mapping):
            rows += [(f"{name} rows", cell(value)) for name, value in counts.items() if is_number(value)]
        header = ["measure", "value"]
    else:
        records = [record for record in results if isinstance(record, Mapping)] if isinstance(results, list) else []
        header = list(dict.fromkeys(k for r in records for k, v in r.items() if isinstance(v, str) or is_number(v)))
        rows = [tuple(cell(record.get(name)) for name in header) for record in records]  # type: ignore[misc]
    if not rows:
        raise SensiError(f"There are no numbers for the card in {source:.80}.")
    return markdown([header, ["---"] * len(header), *rows])


def markdown(lines: Iterable[Sequence[Any]]) -> str:
    """Rows as a Markdown table. The first is the header, the second the line below it."""
    return "\n".join(f"| {' | '.join(str(value).replace('|', '/') for value in line)} |" for line in lines)


def training_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How the adapter was trained: settings, data (names only), time, and versions of the packages."""
    known = {**checked_record(metrics.get("task")), **metrics}
    rows = [("data", ", ".join(f"`{name}`" for name in data_names(metrics)))]
    for key, label in _SETTINGS.items():
        value = known.get(key)
        if isinstance(value, str) or value is True or (is_number(value) and value):
            rows.append((label, "yes" if value is True else value if isinstance(value, str) else f"{value:g}"))
    seconds = metrics.get("seconds")
    if isinstance(seconds, Mapping) and is_number(seconds.get("training")) and metrics.get("epochs") != 0:
        rows.append(("training time", f"{seconds['training']:,.0f} s"))
    versions = metrics.get("versions")
    if isinstance(versions, Mapping):
        rows.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return [(label, value) for label, value in rows if value]


def data_names(metrics: Mapping[str, Any]) -> list[str]:
    """The names of the data files or data sets, without their folders; those for validation come last."""
    found = metrics.get("data_sha256")
    return _without_folders(found) if isinstance(found, Mapping) else []


def measured_on(metrics: Mapping[str, Any]) -> str:
    """What the validation rows are called: the names of their files, or of those that they were held out of."""
    names, found = data_names(metrics), metrics.get("validation_data")
    if not isinstance(found, list):  # of an older version
        return (names or ["not named"])[-1]
    return ", ".join(_without_folders(found)) or f"{', '.join(names)} (held-out rows)"


def _without_folders(names: Iterable[Any]) -> list[str]:
    # The name of a data set on the Hub has a slash, too, but no suffix.
    return [Path(name).name if Path(name).suffix else name for name in map(str, names)]


def model_index(metrics: Mapping[str, Any], task: str | None) -> list[EvalResult] | None:
    """The validation results in the form of the Hub's `model-index`; `None` without results or without a task."""
    numbers = metrics.get("validation")
    if task is None or not isinstance(numbers, Mapping):
        return None
    data = measured_on(metrics)
    kind = Path(data).stem if Path(data).suffix else data
    results = [
        EvalResult(task, kind, data, name, round(value, 6), dataset_args=dict(MEASURED_BY_US))
        for name, value in numbers.items()
        if is_number(value)
    ]
    return results or None


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else f"{value:,}" if is_number(value) else str(value)
