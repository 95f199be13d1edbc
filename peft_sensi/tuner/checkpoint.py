"""Data that is saved beside the trained values (plan, mark, fingerprint), and checks of it when an adapter is loaded.

An adapter has PEFT's two files, `adapter_config.json` and `adapter_model.safetensors`; `FORMAT.md` describes both. The
config holds the plan, so that every loader can build the right shapes before it reads a weight. The weights file holds
the plan too, as the tensor `sensi_plan`, with a hash (the *mark*) of the config's fields that give values a meaning:

- `Trainer` resumes by loading weights into a wrapped model, whose plan may differ, and never reads the checkpoint's
  config.
- PEFT writes the weights before the config. An interrupted save is detected because the marks of the two files differ.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME
from torch import nn

from ..anatomy.linears import is_plain_embedding, is_quantized, matrix
from ..anatomy.modules import base_of, embedding_of, is_base_parameter, linear_of
from ..anatomy.units import Anatomy
from ..layers.values import FLOATS, WEIGHTS, check_finite
from ..planning.packing import check_plan_dict
from ..utils.checks import is_number, shown
from ..utils.errors import SensiLoadError
from ..utils.files import Spec, open_safetensors, read_json_object, read_specs


FORMAT_VERSION = 1
PLAN_KEY = "sensi_plan"
PEFT_PREFIX = "base_model.model."  # of the names in a file that PEFT's model has saved

# The fields that say what the values mean. `None` is left out of the mark, so that a new field with this default does
# not change the marks of older files.
_MEANING = (
    "also_train",
    "blocks",
    "compressed",
    "exclude_modules",
    "fingerprint",
    "format_version",
    "granularity",
    "modules_to_save",
    "plan",
    "rank",
    "scale",
    "schedule",
    "sparse",
    "sparsity",
    "target_modules",
    "update",
)
_LARGEST_PLAN = 2**26  # bytes; a model of 70 billion parameters needs one megabyte

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
# The end of the error for another base. The command replaces it.
WAY_OUT = "If you are sure, load the config first, set `config.fingerprint = None`, and pass it as `config=`."


def meaning(config: Any) -> dict[str, Any]:
    """The config's fields that say what the values mean, as they are after a round trip through JSON."""
    fields = ((name, getattr(config, name)) for name in _MEANING)
    return {name: sorted(v) if isinstance(v, (set, frozenset)) else v for name, v in fields if v is not None}


def config_mark(config: Any) -> str:
    """SHA-256 of `meaning`, in hexadecimal. The order of names in a list has no influence."""
    values = meaning(config)
    for name in ("also_train", "exclude_modules", "modules_to_save", "target_modules"):
        if name in values and not isinstance(values[name], str):
            values[name] = sorted(values[name])
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class StoredPlan(NamedTuple):
    """What `sensi_plan` holds: the plan (see `Plan.to_dict`), the config's mark, and the scale of low-rank terms.

    The mark is `None` in files of the first versions, and the scale in files of adapters that have none.
    """

    plan: dict[str, Any]
    mark: str | None = None
    scale: float | None = None


def plan_to_tensor(plan: Mapping[str, Any], mark: str | None = None, scale: float | None = None) -> torch.Tensor:
    """The content of a `StoredPlan` as JSON in a uint8 vector."""
    extra = {"config": mark, "scale": scale}
    values = {**plan, **{key: value for key, value in extra.items() if value is not None}}
    return torch.frombuffer(bytearray(json.dumps(values, sort_keys=True).encode()), dtype=torch.uint8)


def plan_from_tensor(tensor: torch.Tensor, where: str = WEIGHTS) -> StoredPlan:
    """The content of a tensor of `plan_to_tensor`. Raises `SensiLoadError`."""
    if tensor.dtype != torch.uint8 or tensor.dim() != 1 or len(tensor) > _LARGEST_PLAN:
        raise SensiLoadError(
            f"{where}: {PLAN_KEY!r} must be a vector of bytes, got {tensor.dtype} {tuple(tensor.shape)}."
        )
    try:
        plan = json.loads(tensor.cpu().numpy().tobytes())
        mark, scale = (plan.pop(key, None) if isinstance(plan, dict) else None for key in ("config", "scale"))
        if not isinstance(mark, str | None):
            raise ValueError("its `config` is not a hash")
        if not (scale is None or is_number(scale)):
            raise ValueError("its `scale` is not a number")
        check_plan_dict(plan)
    except (ValueError, RecursionError) as error:
        raise SensiLoadError(f"{where}: {PLAN_KEY!r} does not hold a plan: {error}") from None
    return StoredPlan(plan, mark, scale)


def check_pair(stored: torch.Tensor, config: Any, where: str = WEIGHTS) -> None:
    """Checks that a config and a weights file were saved together: the plan and the mark in both must be the same."""
    plan, mark, _ = plan_from_tensor(stored, where)
    if plan != config.plan or (mark is not None and mark != config.file_mark):
        what = "hold different plans" if plan != config.plan else "were saved with different settings"
        raise SensiLoadError(
            f"{where}: adapter_config.json and adapter_model.safetensors {what}: they do not belong together. A save "
            f"may have been interrupted between them; load an older checkpoint."
        )


def check_scale(stored: float | None, config: Any) -> None:
    """Checks the scale of a file against that of a wrapped model: the tensors' shapes do not show it."""
    found, expected = (1.0 if scale is None else scale for scale in (stored, config.scale))
    if found != expected:
        raise SensiLoadError(
            f"{WEIGHTS}: its low-rank terms have the scale {found:g}, but those of the model have {expected:g}. Wrap "
            f"the model with `scale={found:g}`."
        )


def check_config_file(path: str | os.PathLike, forbidden: Iterable[str] = ()) -> None:
    """Raises `SensiLoadError` if a file is no config of PEFT, for which PEFT itself would raise the errors of `json`.

    The message begins with the name of the file, without its folder.
    """
    try:
        values = read_json_object(path)
    except SensiLoadError as error:
        raise SensiLoadError(str(error).replace(os.fspath(path), CONFIG_NAME)) from error
    kind = values.get("peft_type")
    if not isinstance(kind, str) or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise SensiLoadError(f"{CONFIG_NAME} has the peft_type {shown(kind)}, expected 'SENSI'.")
    for name in values.keys() & set(forbidden):
        raise SensiLoadError(f"{CONFIG_NAME}: `{name}` exists at run time only and cannot come from a file.")


def check_values(path: str, config: Any) -> None:
    """Checks a weights file as far as possible without a model: its header, its plan, and that floats are finite."""
    with open_safetensors(path) as file:
        specs = read_specs(path, file)
        check_pair(file.get_tensor(plan_key(specs, path)), config, path)
        for key, (_, dtype) in specs.items():
            if dtype in FLOATS:
                check_finite(key, file.get_tensor(key), path)


def plan_key(names: Iterable[str], where: str = WEIGHTS) -> str:
    """The name of the tensor `sensi_plan` in a file. Raises `SensiLoadError` if there is not exactly one."""
    keys = [name for name in names if name.rpartition(".")[2] == PLAN_KEY]
    if len(keys) != 1:
        raise SensiLoadError(
            f"{where}: expected one tensor {PLAN_KEY!r}, found {len(keys)}. This is no adapter of peft_sensi."
        )
    return keys[0]


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
    """One number for each range of rows of the input embedding: the sum of the rows' marks, divided by the square root
    of their count. So a change of precision, which is another one in each row, has no more influence than on one row.

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
    """Checks that `model` is the base that the adapter was made for, unless its weights are on `meta`.

    Its shapes must be the same, and its weights may differ by no more than a change of precision explains: by little
    between 16 bits and more, by more if one of the two bases is quantized.
    """
    found = fingerprint(model, anatomy, expected)
    if found is None:
        return
    if found["shapes"] != dict(expected["shapes"]) or len(found["marks"]) != len(expected["marks"]):
        raise SensiLoadError(f"The adapter was made for a base model with other layers or shapes. {WAY_OUT}")
    wide = bool(found.get("quantized") or expected.get("quantized"))
    _compare(list(zip(found["marks"], expected["marks"], strict=True)), wide)
    # Quantization may move a part of the weights into the norms. Files of earlier versions have no `vectors`.
    vectors = {} if wide else expected.get("vectors", {})
    pairs = {name: (found["vectors"][name], mark) for name, mark in vectors.items() if name in found["vectors"]}
    for of_rows in (False, True):  # not all at once: many equal numbers would hide a few different ones
        chosen = [pair for name, pair in pairs.items() if bool(_ROW_RANGE.search(name)) is of_rows]
        _compare(chosen, wide, _TOLERANCE_TOKENS if of_rows else _TOLERANCE)


def _compare(pairs: list[tuple[float, float]], wide: bool, least: float = _TOLERANCE) -> None:
    """Raises `SensiLoadError` if the marks of two bases differ by more than a change of precision explains."""
    differences = [abs(a - b) for a, b in pairs if not math.isnan(a)]
    count = max(1, len(differences))
    # The mean over a few rows varies more; with 20 rows or more the tolerance is `least`.
    tolerance = _TOLERANCE_QUANTIZED if wide else max(least, 0.0016 + 0.004 / count**0.5)
    distance, largest = sum(differences) / count, max(differences, default=0.0)
    if distance > tolerance or (largest > _LARGEST and not wide):
        raise SensiLoadError(
            f"The adapter was made for another base model: shapes agree, but the weights do not (distance "
            f"{distance:.4f}, largest {largest:.4f}; the same base in {'any' if wide else '16 bits or more'} has at "
            f"most {tolerance:.4f}{'' if wide else f' and {_LARGEST}'}). This also happens if one of the two is a "
            f"fine-tuned copy of the other, or if an earlier version made the adapter on a quantized base. {WAY_OUT}"
        )


def embedding_specs(model: nn.Module) -> dict[str, Spec]:
    """The parameters of the base that a file may hold: PEFT saves embeddings that were resized."""
    tables = [embedding_of(model, "input"), embedding_of(model, "output")]
    embeddings = {id(p) for table in tables if table is not None for p in table.parameters()}
    named = model.named_parameters(remove_duplicate=False)
    return {name: (tuple(p.shape), p.dtype) for name, p in named if id(p) in embeddings}


def check_strays(found: Iterable[str], model: nn.Module) -> None:
    """Checks that a file holds no tensors of the base itself, which loading would overwrite.

    This happens if the file's adapter saves a module whole and the model's adapter does not.
    """
    allowed = set(embedding_specs(model))
    for name in found:
        if is_base_parameter(name) and not {name, name.removeprefix(PEFT_PREFIX)} & allowed:
            raise SensiLoadError(
                f"{WEIGHTS} holds {name!r}, which this model does not save. The file was made with another "
                f"`also_train` or `modules_to_save`: wrap the model with the same."
            )


def described_by(configs: Mapping[str, Any], config: Any, adapter_name: str) -> str | None:
    """The other adapter of a model that `config` describes, if it is that adapter's own config or a copy of it.

    A new adapter then starts from its values. TRL makes its reference adapter in this way, and then copies the
    parameters with `.default.` in their names, which ours do not have.
    """
    for name, other in configs.items():
        same = config.adapter_id is not None and getattr(other, "adapter_id", None) == config.adapter_id
        # PEFT has added names of heads to `modules_to_save`.
        fields = [{**meaning(c), "modules_to_save": None} for c in (other, config)] if same else []
        if name != adapter_name and same and fields[0] == fields[1]:
            return name
    return None
