"""`Scores`: the sensitivity of each unit (head, neuron, row or token), and the file that stores it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import save_file

from ..plotting.plots import plot_scores
from ..utils.checks import is_count, is_number, shown
from ..utils.errors import SensiLoadError
from ..utils.files import open_safetensors, write_atomically
from ..utils.formatting import data_frame, find_name, html_table, short_names
from .methods import METHODS


@dataclass(frozen=True, repr=False)
class Scores:
    """The sensitivity of each unit. One `Scores` serves many budgets, and many runs: see `save` and `load`.

    `scores["...layer.0.heads"]` are the scores of a group, and `scores.to_frame()` is a table of all units for pandas.

    Attributes:
        values: `{group: [units]}`, float32; a larger value means a more sensitive unit.
        method: The criterion, or `none` if the units were not ranked.
        sequence_length: Mean padded length of the calibration batches, in tokens.
        protected: `{group: [units]}`, bool: outlier neurons and heads, which no plan should cut (see `outliers`).
        head: Parameters from which the task head starts after priming, by their names in the base model.
        learned: How much the primed model had learned of the task, from 0 (nothing) to 1; see
            `learned.share_learned`. `None` if this is not known.
    """

    values: dict[str, torch.Tensor]
    method: str
    sequence_length: int | None = None
    protected: dict[str, torch.Tensor] = field(default_factory=dict)
    head: dict[str, torch.Tensor] = field(default_factory=dict)
    learned: float | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        """The scores of the group with this name, or with the only name that ends so: float32 of shape `[units]`.

        Raises `SensiError` if there is no such group.
        """
        return self.values[find_name(name, self.values, "table of scores")]

    def __repr__(self) -> str:
        units = sum(map(len, self.values.values()))
        marked = sum(int(marks.sum()) for marks in self.protected.values())
        length = f", {self.sequence_length} tokens" if self.sequence_length else ""
        outliers = f", {marked} outlier units" if marked else ""
        return f"<Scores by {self.method} of {units:,} units in {len(self.values)} groups{outliers}{length}>"

    def _repr_html_(self) -> str:
        names = short_names(self.values)
        rows = [
            [names[name], f"{len(v):,}", *(f"{x:.3e}" for x in (v.min(), v.mean(), v.max()))]
            for name, v in self.values.items()
            if len(v)
        ]
        return html_table(["group", "units", "least", "mean", "most"], rows, caption=repr(self))

    def to_frame(self) -> Any:
        """The units as a pandas DataFrame: `group`, `unit` (its index), `score` and `protected`.

        Raises `SensiError` if pandas is not installed.
        """
        return data_frame([
            {"group": name, "unit": unit, "score": score, "protected": protected}
            for name, values in self.values.items()
            for unit, (score, protected) in enumerate(
                zip(values.tolist(), self.protected.get(name, torch.zeros(len(values)).bool()).tolist(), strict=True)
            )
        ])  # fmt: skip

    def save(self, path: str | os.PathLike) -> None:
        """Writes one safetensors file, under a temporary name first. Raises `SensiError` if the disk is full."""
        tensors = {f"{kind}:{k}": v.contiguous() for kind in _KINDS for k, v in getattr(self, kind).items()}
        numbers = {"length": self.sequence_length, "learned": self.learned}
        metadata = {"format": "peft_sensi.scores.1", "method": self.method}
        metadata |= {name: json.dumps(number) for name, number in numbers.items()}
        write_atomically(path, lambda name: save_file(tensors, name, metadata=metadata))

    @classmethod
    def load(cls, path: str | os.PathLike) -> Scores:
        """Reads a file that `save` wrote.

        Raises:
            FileNotFoundError: The file does not exist.
            SensiLoadError: The file is damaged, or does not hold scores.
        """
        with open_safetensors(path) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != "peft_sensi.scores.1":
                raise SensiLoadError(
                    f"{path} is not a file of scores: its format is {metadata.get('format')!r}. Give a file that "
                    f"`Scores.save` has written."
                )
            parts: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in _KINDS}
            for key in file.keys():
                kind, _, name = key.partition(":")
                if kind not in parts:
                    raise SensiLoadError(f"{path} holds an unexpected tensor {key!r}. {_AGAIN}")
                # A copy: a tensor that is mapped from the file would change, or the process end, if somebody writes
                # over it.
                parts[kind][name] = file.get_tensor(key).clone()
        try:
            method, length = metadata["method"], json.loads(metadata["length"])
            learned = json.loads(metadata.get("learned", "null"))  # files of before do not have it
        except (KeyError, ValueError):
            method = length = learned = None
        if (
            method not in METHODS
            or not (length is None or is_count(length))
            or not (learned is None or is_number(learned))
        ):
            raise SensiLoadError(f"{path} has malformed metadata: {shown(metadata)}. {_AGAIN}")
        _check_tensors(path, parts)
        return cls(method=method, sequence_length=length, learned=learned, **parts)

    def plot(self, path: str | os.PathLike, style: str = "light") -> None:
        """Draws a heat map of the scores of all units. Needs matplotlib (the extra `plots`).

        Args:
            path: A file that ends in `.png`, `.svg` or `.pdf`.
            style: `light` or `dark`.

        Raises:
            SensiError: There are no scores, matplotlib is missing, the style or the format is unknown, or the picture
                cannot be written.
        """
        values = {name: scores.double().numpy() for name, scores in self.values.items()}
        outliers = [name for name, marks in self.protected.items() if marks.any()]
        plot_scores(values, path, f"Sensitivity of each unit, score = {self.method}", outliers, style)


_KINDS = ("values", "protected", "head")
_AGAIN = "The file was damaged or edited: save the scores again."


def _check_tensors(path: str | os.PathLike, parts: dict[str, dict[str, torch.Tensor]]) -> None:
    """Checks dtypes, shapes and values."""
    for kind, tensors in parts.items():
        for name, tensor in tensors.items():
            fault = None
            if kind != "head" and tensor.dim() != 1:
                fault = f"has shape {tuple(tensor.shape)}, expected one number for each unit"
            elif kind == "protected":
                if tensor.dtype != torch.bool or name not in parts["values"]:
                    fault = f"is {tensor.dtype}, expected one boolean for each score"
                elif tensor.shape != parts["values"][name].shape:
                    fault = f"has {len(tensor)} units, expected {len(parts['values'][name])}"
            elif tensor.dtype not in _FLOATS or (kind == "values" and tensor.dtype != torch.float32):
                fault = f"has dtype {tensor.dtype}, expected torch.float32"
            elif not torch.isfinite(tensor).all():
                fault = "contains NaN or infinity"
            if fault is not None:
                raise SensiLoadError(f"{path}: {kind}:{name} {fault}. {_AGAIN}")


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
