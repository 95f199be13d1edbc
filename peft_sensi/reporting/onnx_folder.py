"""The files beside an ONNX file, with which a program can use it: the tokenizer, and `NAME.json`."""

from __future__ import annotations

import inspect
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..merging.onnx import ExportReport
from ..tuner.wrapping import root_of
from ..utils.checks import is_count
from ..utils.errors import SensiError
from ..utils.files import read_json_object, write_json_atomically
from ..utils.heads import is_regressor
from ..utils.hub_names import is_onnx
from ..utils.task_types import describe_type
from .saved import SavedAdapter
from .saved_merged import SavedMerged, tokenizer_of
from .task_record import saved_record


MADE_BY = "peft_sensi"


def check_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Raises `SensiError` if the folder has files of another tokenizer, which would be lost."""
    if tokenizer is None or not folder.is_dir():
        return
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer.save_pretrained(temporary)
        for new in Path(temporary).iterdir():
            old = folder / new.name
            if old.is_file() and old.read_bytes() != new.read_bytes():
                raise SensiError(
                    f"{old} belongs to another tokenizer and would be replaced: write the ONNX file into a folder of "
                    f"its own."
                )


def write_companions(
    saved: SavedAdapter | SavedMerged, model: Any, tokenizer: Any, report: ExportReport
) -> list[Path]:
    """Writes the tokenizer and `NAME.json` beside `NAME.onnx`. Returns the path of `NAME.json`, then the tokenizer's.

    `NAME.json` has what a program must know: `kind` (`text`, `words` or `answers`), `labels`, `problem_type`,
    `max_length` in tokens, names of `inputs` and `outputs`, the name of the `int8` file, the model's class, and as
    `task` what the training has noted about the data.
    """
    file, config = report.file.path, model.config
    record = saved_record(saved.folder)
    task = saved.task
    names = config.id2label or {}
    labels = [str(names[i]) for i in sorted(names)]
    is_classifier = task == "SEQ_CLS" and not is_regressor(config.problem_type, len(labels))
    limits = [record.get("max_length"), report.longest, getattr(tokenizer, "model_max_length", None)]
    known = [limit for limit in limits if is_count(limit, 2) and limit < 10**6]
    values = {
        "made_by": MADE_BY,
        "version": _version(),
        "kind": describe_type(task).kind,
        "model_class": type(root_of(model)).__name__,
        "labels": labels if task == "TOKEN_CLS" or is_classifier else [],
        "problem_type": config.problem_type,
        "max_length": min(known, default=None),
        "inputs": list(report.inputs),
        "outputs": list(report.outputs),
        "opset": report.opset,
        "int8": report.int8.path.name if report.int8 else None,
        "task": record,
    }
    target = file.with_suffix(".json")
    write_json_atomically(target, values)
    written = [target]
    if tokenizer is not None and file.parent.resolve() != saved.folder.resolve():
        written += [Path(name) for name in tokenizer.save_pretrained(file.parent) if Path(name).is_file()]
    return written


def read_companion(file: Path) -> dict[str, Any]:
    """The values of `NAME.json` beside `NAME.onnx` or `NAME.int8.onnx`.

    Raises `SensiError` if there is no such file, or if it has other values than `write_companions` writes.
    """
    path = file.parent / f"{file.name.removesuffix('.onnx').removesuffix('.int8')}.json"
    try:
        values = read_json_object(path)
    except FileNotFoundError:
        values = {}
    if values.get("made_by") != MADE_BY:
        raise SensiError(f"{path} is missing: `peft-sensi export` writes it beside the ONNX file. Export it again.")
    if file.name.endswith(".int8.onnx") and values.get("int8") != file.name:
        raise SensiError(f"{file} is not of the model of {path}, which was exported without --int8. Export it again.")
    labels, longest = values.get("labels"), values.get("max_length")
    names = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    known = isinstance(values.get("kind"), str | None) and isinstance(values.get("problem_type"), str | None)
    if not (names and known and (longest is None or is_count(longest, 2))):
        raise SensiError(f"{path} is not as `peft-sensi export` writes it. Export the model again.")
    return values


def find_onnx(place: Path) -> Path | None:
    """The ONNX file that `place` is or that the folder holds; `None` if there is none, or a model of another form.

    Raises `SensiError` if there are several, or if `place` names an ONNX file that does not exist.
    """
    if place.suffix == ".onnx" and not place.exists():
        raise SensiError(f"There is no file {place}. Check the path.")
    if not is_onnx(place):
        return None
    if place.is_file():
        return place
    found = sorted(path for path in place.glob("*.onnx") if not path.name.endswith(".int8.onnx"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise SensiError(f"{place} holds several ONNX files ({names}): give the path of one of them.")
    return found[0] if found else None


def example_for(tokenizer: Any, model: Any) -> dict[str, Any] | None:
    """An example batch for `export_onnx`, if the tokenizer gives types of tokens that its own batches would lack.

    GPT-2, for one, takes types without a number of them in its config, and computes something else without any.
    """
    name = "token_type_ids"
    root: Any = root_of(model)
    is_taken = name in inspect.signature(root.forward).parameters
    if tokenizer is None or name not in tokenizer.model_input_names or not is_taken:
        return None
    if getattr(root.config.get_text_config(), "type_vocab_size", None) is not None:
        return None
    ids = torch.arange(8).repeat(2, 1) % len(tokenizer)
    types = torch.tensor([[0] * 4 + [1] * 4, [0] * 8])
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask, name: types}


def load_tokenizer(saved: SavedAdapter | SavedMerged, base: str | None, folder: Path) -> Any:
    """The tokenizer for `write_companions`, after `check_tokenizer`."""
    tokenizer = tokenizer_of(saved, base)
    if folder.resolve() != saved.folder.resolve():
        check_tokenizer(tokenizer, folder)
    return tokenizer


def _version() -> str | None:
    try:
        return version("peft-sensi")
    except PackageNotFoundError:
        return None
