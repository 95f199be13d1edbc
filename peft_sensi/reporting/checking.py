"""A saved adapter or merged model goes in; what is right and wrong with it comes out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from ..merging.hashes import HASH_KEY
from ..merging.load import load_merged
from ..planning.latency_torch import example_inputs
from ..tuner.wrapping import root_of
from ..utils.errors import SensiError, first_line
from ..utils.files import read_json_object
from .pretrained import TOKENIZER_CONFIG, load_pretrained
from .saved import CONFIG, WEIGHTS, SavedAdapter, load_adapter
from .saved_merged import SavedMerged, open_saved, tokenizer_of
from .task_record import metrics_of


OK, NOTE, WRONG = "ok", "note", "wrong"
# Packages whose other versions can compute other numbers. The names are those of the index.
_PACKAGES = ("peft", "transformers", "torch", "tokenizers")


@dataclass(frozen=True)
class Finding:
    """One thing that was checked: its name, `ok`, `note` (cannot be checked, or may matter) or `wrong`, and a text."""

    what: str
    status: str
    text: str

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def check_saved(name: str, base: str | None = None) -> Iterator[Finding]:
    """Checks an adapter or a merged model, one thing after the other. Stops at an error that hides all others.

    Checked are: whether the files belong together and all values are finite, the versions, the tokenizer, for an
    adapter the fingerprint of its base (if that is here), and whether the outputs of a batch are finite. Checksums are
    given for a comparison with another copy.
    """
    try:
        saved = open_saved(name)
    except (SensiError, OSError) as error:
        yield Finding("files", WRONG, str(error))
        return
    weights = saved.folder / WEIGHTS
    if isinstance(saved, SavedMerged):
        weights, hashed = saved.folder / saved.weights, HASH_KEY in saved.values
        text = "config.json and the header of the weights are those that were saved; the values have no hash"
        yield Finding("files", OK if hashed else NOTE, text if hashed else "the folder has no hash to compare with")
    else:
        yield Finding("files", OK, f"{CONFIG} and the weights were saved together, and all values are finite")
    yield Finding("checksum", OK, f"SHA-256 of {weights.name}, to compare with another copy: {checksum(weights)}")
    yield from _versions(saved)
    yield _tokenizer(saved)
    if isinstance(saved, SavedMerged) and base:
        yield Finding("base", NOTE, f"{base} was not compared: the weights of a merged model are its own")
    if isinstance(saved, SavedAdapter) and (missing := _missing_base(saved, base)):
        yield Finding("base", NOTE if base is None else WRONG, missing)
        return
    try:
        if isinstance(saved, SavedMerged):
            model: Any = load_merged(saved.folder)
            yield Finding("values", OK, f"{saved.parameters:,} values in {len(saved.tensors)} tensors are finite")
        else:
            model = load_adapter(saved, base)
            known = saved.config.fingerprint is not None
            text = "it is the one that the adapter was made for" if known else "the adapter has no fingerprint of it"
            yield Finding("base", OK if known else NOTE, f"{base or saved.base}: {text}")
    except (SensiError, OSError, RuntimeError) as error:
        yield Finding("values" if isinstance(saved, SavedMerged) else "base", WRONG, str(error))
        return
    yield _outputs(model)


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal, as `sha256sum` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tokenizer(saved: SavedAdapter | SavedMerged) -> Finding:
    if not (saved.folder / TOKENIZER_CONFIG).is_file():
        return Finding("tokenizer", NOTE, "there is none in the folder")
    try:
        return Finding("tokenizer", OK, f"{len(tokenizer_of(saved)):,} tokens")
    except SensiError as error:
        return Finding("tokenizer", WRONG, str(error))


def _versions(saved: SavedAdapter | SavedMerged) -> Iterator[Finding]:
    """Whether the versions of packages that were used for the training are the installed ones."""
    recorded = metrics_of(saved.folder).get("versions")
    trained = {str(name): str(value) for name, value in recorded.items()} if isinstance(recorded, Mapping) else {}
    if not trained and isinstance(saved, SavedAdapter):
        config = read_json_object(saved.folder / CONFIG)
        trained = {"peft": str(config["peft_version"])} if config.get("peft_version") else {}
    if not trained and isinstance(saved, SavedMerged) and saved.values.get("transformers_version"):
        trained = {"transformers": str(saved.values["transformers_version"])}
    others = []
    for name in _PACKAGES:
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue
        if name in trained and trained[name].split("+")[0] != installed.split("+")[0]:
            others.append(f"{name} {trained[name]} then, {installed} here")
    if not trained:
        yield Finding("versions", NOTE, "those of the training are not recorded")
    else:
        shown = ", ".join(f"{name} {trained[name]}" for name in _PACKAGES if name in trained)
        yield Finding("versions", NOTE if others else OK, "; ".join(others) or shown)


def _missing_base(saved: SavedAdapter, base: str | None) -> str | None:
    """Why the base cannot be compared; `None` if it can."""
    name = base or saved.base
    if not name:
        return "not compared: the adapter does not name its base; give it with --base"
    try:
        load_pretrained(AutoConfig, name)
    except SensiError:
        return f"not compared: {name} is not here" + ("; give it with --base" if base is None else "")
    return None


def _outputs(model: Any) -> Finding:
    try:
        batch = example_inputs(root_of(model), 2, 8)
        with torch.no_grad():
            outputs = model(**batch, return_dict=True)
    except Exception as error:  # a model can raise anything for a batch that it does not take
        return Finding("outputs", NOTE, f"not computed: {first_line(error)}")
    found = [value for value in outputs.values() if isinstance(value, torch.Tensor)]
    finite = all(bool(torch.isfinite(value).all()) for value in found)
    return Finding("outputs", OK if finite else WRONG, "finite" if finite else "NaN or infinity for random tokens")
