"""The fingerprint of a base model, which an adapter stores, and the check that it is loaded on the same base."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..anatomy.linears import is_plain_embedding, is_quantized, matrix
from ..anatomy.modules import base_of, embedding_of, linear_of
from ..anatomy.units import Anatomy
from ..utils import replicas
from ..utils.errors import OtherBaseError


# A fingerprint projects sampled rows on fixed signs, in units of the row's norm, so that a random row gives a standard
# normal number. Another base changes a projection by 1.1 on average, and rounding to 4 bits by up to 0.15. Rounding to
# bfloat16 changes it by 0.0016, with a maximum of 0.006 among 64 rows. Fine-tuning changes it by 0.004 to 0.022, or by
# more in a few Linears if the others were frozen.
_SAMPLED_LINEARS = 64
_SAMPLED_ROWS = 4
# All rows of the input embedding are in sums of this share of them, but the last eighth is left out: users add tokens
# there, whose rows start from random values.
_ROW_RANGES = 16
_ROW_RANGE = re.compile(r"\[(\d{1,9}):(\d{1,9})\]$")
_TOLERANCE = 0.0025  # for the mean over all rows, if no base was quantized
_LARGEST = 0.012  # for each row
_TOLERANCE_TOKENS = 0.004  # for the mean over ranges of rows. In bfloat16, MiniLM's differ by 0.0017, at most 0.0048
_TOLERANCE_QUANTIZED = 0.25
# The advice in the error for another base.
_WAY_OUT = "If you are sure, load the config first, set `config.fingerprint = None`, and pass it as `config=`."


def fingerprint(model: nn.Module, anatomy: Anatomy, like: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """Shapes of some of the base's Linears and projections of some of their rows, to recognize the base.

    `shapes` has up to 64 Linears by name, and `marks` one number for each of up to 4 rows of each. `vectors` has one
    number for each bias of these Linears, for the parameters of the norms after sublayers, and for ranges of rows of
    the input embedding. `quantized` is True if one of these weights has 8 bits or fewer; otherwise it is left out.
    Returns `None` if weights are on `meta` or cannot be read as floats.

    With another fingerprint as `like`, the same Linears are looked at (none if some do not exist here), and an
    embedding whose vocabulary was resized gives the same rows and shape as there. A row that it does not have gives
    NaN.
    """
    names = {name for group in anatomy.groups for name in group.modules}
    known: Mapping[str, Any] = {} if like is None else like["shapes"]
    sampled = _sample(names) if like is None else known if names.issuperset(known) else ()
    shapes, marks, quantized = {}, [], False
    for name in sorted(sampled):  # as in a file, where the keys are sorted
        weight = matrix(linear := linear_of(model, name))
        if weight.is_meta or not weight.is_floating_point():
            return None
        quantized |= is_quantized(linear) or weight.element_size() < 2
        shape = list(weight.shape)
        if is_plain_embedding(linear) and [*known.get(name, ())][1:] == shape[1:]:
            shape = list(known[name])
        numbers = range(shape[0])[:: max(1, shape[0] // _SAMPLED_ROWS)][:_SAMPLED_ROWS]
        there = [number for number in numbers if number < len(weight)]
        shapes[name] = shape
        marks += _marks(weight[there]) + [math.nan] * (len(numbers) - len(there))
    vectors = {}
    for name in sorted({*sampled, *(group.norm for group in anatomy.groups if group.norm)}):
        for part, value in base_of(model.get_submodule(name)).named_parameters(recurse=False):
            if value.dim() == 1 and value.is_floating_point() and not value.is_meta:
                vectors[f"{name}.{part}"] = _marks(value[None])[0]
    vectors |= _marks_of_tokens(model, None if like is None else like.get("vectors", {}))
    found = {"shapes": shapes, "marks": marks, "vectors": vectors}
    return {**found, "quantized": True} if quantized else found


def _marks_of_tokens(model: nn.Module, like: Iterable[str] | None) -> dict[str, float]:
    """One number for each range of rows of the input embedding.

    It is the sum of the rows' marks, divided by the square root of their count. Rounding errors of different rows are
    independent, so with this factor a change of precision changes the number no more than the mark of one row.
    The names end in the range, such as `[0:100]`. With names as `like`, their ranges are taken, if they exist here.
    """
    if (table := embedding_of(model, "input")) is None:
        return {}
    table = base_of(table)
    weight = getattr(table, "weight", None)
    name = next((name for name, module in model.named_modules() if base_of(module) is table), "")
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or weight.is_meta or not weight.is_floating_point():
        return {}
    step = -(-len(weight) // _ROW_RANGES)
    starts = range(0, len(weight) * 7 // 8 - step + 1, max(1, step))
    names = [f"{name}.weight[{start}:{start + step}]" for start in starts] if like is None else sorted(like)
    result: dict[str, float] = {}
    for key in names:
        if (match := _ROW_RANGE.search(key)) and key[: match.start()] == f"{name}.weight":
            start, end = int(match[1]), int(match[2])
            if start < end <= len(weight) and len(result) < _ROW_RANGES:
                result[key] = round(sum(_marks(weight[start:end])) / (end - start) ** 0.5, 4)
    return result


def _marks(rows: torch.Tensor) -> list[float]:
    """For each row of `[rows, n]`, its dot product with fixed signs, divided by its norm."""
    rows = rows.detach().float().cpu()
    places = torch.arange(rows.shape[1], dtype=torch.float32, device="cpu")
    signs = torch.where(places * 0.6180339887498949 % 1.0 < 0.5, -1.0, 1.0).float()
    return [round(mark, 4) for mark in (rows @ signs / rows.norm(dim=1).clamp_min(1e-12)).tolist()]


def _sample(names: Iterable[str]) -> list[str]:
    """Up to 64 of the Linears, spread over all kinds of them and over the layers.

    A copy of the base may differ in one kind alone, such as the values of the attention, if LoRA was merged into it.
    """
    by_kind = sorted(names, key=lambda name: (re.sub(r"\d+", "", name), name))
    count = min(_SAMPLED_LINEARS, len(by_kind))
    return [by_kind[i * len(by_kind) // count] for i in range(count)]


def check_fingerprint(expected: Mapping[str, Any], model: nn.Module, anatomy: Anatomy) -> None:
    """Checks that `model` is the base that the adapter was made for, unless its weights are on `meta` or come later.

    Its shapes must be the same, and its weights may differ by no more than a change of precision explains: by little
    between 16 bits and more, by more if one of the two bases is quantized.
    """
    found = fingerprint(model, anatomy, expected)
    if found is None:
        return
    if found["shapes"] != dict(expected["shapes"]) or len(found["marks"]) != len(expected["marks"]):
        raise OtherBaseError("The adapter was made for a base model with other layers or shapes.", _WAY_OUT)
    if replicas.weights_come_later():
        return
    wide = bool(found.get("quantized") or expected.get("quantized"))
    _compare(list(zip(found["marks"], expected["marks"], strict=True)), wide)
    # Quantization may move a part of the weights into the norms. Files of earlier versions have no `vectors`.
    vectors = {} if wide else expected.get("vectors", {})
    pairs = {name: (found["vectors"][name], mark) for name, mark in vectors.items() if name in found["vectors"]}
    for of_rows in (False, True):  # not all at once: many equal numbers would hide a few different ones
        chosen = [pair for name, pair in pairs.items() if bool(_ROW_RANGE.search(name)) is of_rows]
        _compare(chosen, wide, _TOLERANCE_TOKENS if of_rows else _TOLERANCE)


def _compare(pairs: list[tuple[float, float]], wide: bool, least: float = _TOLERANCE) -> None:
    """Raises `OtherBaseError` if the marks of two bases differ by more than a change of precision explains."""
    differences = [abs(a - b) for a, b in pairs if not math.isnan(a)]
    count = max(1, len(differences))
    # The mean over a few rows varies more; with 20 rows or more the tolerance is `least`.
    tolerance = _TOLERANCE_QUANTIZED if wide else max(least, 0.0016 + 0.004 / count**0.5)
    distance, largest = sum(differences) / count, max(differences, default=0.0)
    if distance > tolerance or (largest > _LARGEST and not wide):
        raise OtherBaseError(
            f"The adapter was made for another base model: shapes agree, but the weights do not (distance "
            f"{distance:.4f}, largest {largest:.4f}; the same base in {'any' if wide else '16 bits or more'} has at "
            f"most {tolerance:.4f}{'' if wide else f' and {_LARGEST}'}). This also happens if one of the two is a "
            f"fine-tuned copy of the other, or if an earlier version made the adapter on a quantized base.",
            _WAY_OUT,
        )
