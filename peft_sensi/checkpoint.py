"""What is written beside the trained values, and how files are checked before they are believed.

An adapter is PEFT's pair `adapter_config.json` + `adapter_model.safetensors`. The config holds the plan, bit-packed,
so that every loader can build the right shapes before it reads a weight. The tensors are `<module>.sensi_weight`
(trained rows `[n, in]` or columns `[out, n]`), `<module>.sensi_bias`, the modules that are saved whole, and
`sensi_plan`, the plan the values belong to, as JSON in bytes: `Trainer` resumes into a model whose config has another
plan without ever reading the checkpoint's config, and a pair of files that a kill has torn apart shows itself by two
plans.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .anatomy import Anatomy, is_base_parameter, linear_of
from .errors import SensiLoadError
from .linears import matrix


FORMAT_VERSION = 1
PLAN_KEY = "sensi_plan"

# A fingerprint projects sampled rows on fixed signs. Rounding to bf16 or 4 bits moves the result by up to about 0.15
# (it is in units of the row's norm, so another base's is a standard normal draw), another base by 1.1 on average.
_SAMPLED_LINEARS = 16
_SAMPLED_ROWS = 4
_TOLERANCE = 0.25


def plan_to_tensor(plan: Mapping[str, Any]) -> torch.Tensor:
    """The plan's dict form as uint8 bytes."""
    return torch.frombuffer(bytearray(json.dumps(plan, sort_keys=True).encode()), dtype=torch.uint8)


def plan_from_tensor(tensor: torch.Tensor) -> dict[str, Any]:
    """Inverse of `plan_to_tensor`. Raises `SensiLoadError`."""
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise SensiLoadError(f"{PLAN_KEY!r} must be a vector of bytes, got {tensor.dtype} {tuple(tensor.shape)}.")
    try:
        plan = json.loads(tensor.cpu().numpy().tobytes())
    except ValueError as error:
        raise SensiLoadError(f"{PLAN_KEY!r} does not hold JSON: {error}.") from None
    if not isinstance(plan, dict):
        raise SensiLoadError(f"{PLAN_KEY!r} does not hold a plan.")
    return plan


def fingerprint(model: nn.Module, anatomy: Anatomy) -> dict[str, Any] | None:
    """Shapes and projections of some rows of the base's weights; `None` on `meta` or quantised weights."""
    names = sorted({name for group in anatomy.groups for name in group.modules})
    sampled = names[:: max(1, len(names) // _SAMPLED_LINEARS)][:_SAMPLED_LINEARS]
    shapes, marks = {}, []
    for name in sampled:
        weight = matrix(linear_of(model, name))
        if weight.is_meta or not weight.is_floating_point():
            return None
        rows = weight.detach()[:: max(1, weight.shape[0] // _SAMPLED_ROWS)][:_SAMPLED_ROWS].float().cpu()
        signs = torch.where(torch.arange(rows.shape[1]) * 0.6180339887498949 % 1.0 < 0.5, -1.0, 1.0)
        shapes[name] = list(weight.shape)
        marks += (rows @ signs / rows.norm(dim=1).clamp_min(1e-12)).tolist()
    return {"shapes": shapes, "marks": [round(mark, 4) for mark in marks]}


def check_fingerprint(expected: Any, model: nn.Module, anatomy: Anatomy) -> None:
    """Raises `SensiLoadError` when `model` is not the base that the adapter was made for."""
    good = (
        isinstance(expected, Mapping)
        and isinstance(expected.get("shapes"), Mapping)
        and isinstance(expected.get("marks"), list)
        and all(
            isinstance(m, (int, float)) and not isinstance(m, bool) and math.isfinite(m) for m in expected["marks"]
        )
    )
    if not good:
        raise SensiLoadError("The adapter's `fingerprint` is malformed: it needs `shapes` and a list of `marks`.")
    found = fingerprint(model, anatomy)
    if found is None:
        return
    way_out = "If you are sure, load the config first, set `config.fingerprint = None`, and pass it as `config=`."
    if found["shapes"] != dict(expected["shapes"]) or len(found["marks"]) != len(expected["marks"]):
        raise SensiLoadError(f"The adapter was made for a base model with other layers or shapes. {way_out}")
    differences = [abs(a - b) for a, b in zip(found["marks"], expected["marks"], strict=True)]
    distance = sum(differences) / max(1, len(differences))
    if distance > _TOLERANCE:
        raise SensiLoadError(
            f"The adapter was made for another base model: shapes agree, but the weights do not (distance "
            f"{distance:.2f}, at most {_TOLERANCE} for the same base in any precision). {way_out}"
        )


def check_tensors(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], rooms: Mapping[str, int]
) -> None:
    """Checks names, dtypes, shapes and values of the adapter's own tensors. Raises `SensiLoadError`.

    `rooms` gives, for each index tensor, the number of positions there are.
    """
    if missing := sorted(set(expected) - set(found)):
        raise SensiLoadError(f"The adapter file lacks {missing[0]!r} ({len(missing)} tensors missing).")
    if extra := sorted(set(found) - set(expected)):
        raise SensiLoadError(
            f"The adapter file holds {extra[0]!r}, which its plan does not have ({len(extra)} extra)."
        )
    for name, tensor in found.items():
        like = expected[name]
        if tensor.shape != like.shape:
            raise SensiLoadError(f"{name!r} has shape {tuple(tensor.shape)}, expected {tuple(like.shape)}.")
        if tensor.is_floating_point() != like.is_floating_point() or (
            not like.is_floating_point() and tensor.dtype != like.dtype
        ):
            raise SensiLoadError(f"{name!r} has dtype {tensor.dtype}, expected {like.dtype}.")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise SensiLoadError(f"{name!r} contains NaN or infinity.")
        if ".sensi_gate." in name and tensor.numel() and tensor.max() > 1:
            raise SensiLoadError(f"{name!r} must hold zeros and ones.")
        if name in rooms and tensor.numel():
            if tensor.min() < 0 or tensor.max() >= rooms[name] or not (tensor.diff() > 0).all():
                raise SensiLoadError(f"{name!r} must hold ascending positions below {rooms[name]}.")


def check_strays(found: Iterable[str], model: nn.Module) -> None:
    """Raises `SensiLoadError` for tensors of the base itself, which loading would overwrite for good.

    They are of modules that the file's adapter saves whole and this model does not. PEFT itself saves only embeddings
    in this way, when their size was changed.
    """
    getters = (getattr(model, f"get_{kind}_embeddings", None) for kind in ("input", "output"))
    embeddings = {id(p) for get in getters if get is not None and (m := get()) is not None for p in m.parameters()}
    allowed = {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in embeddings}
    for name in found:
        if is_base_parameter(name) and not {name, name.removeprefix("base_model.model.")} & allowed:
            raise SensiLoadError(
                f"The adapter file holds {name!r}, which this model does not save: it was made with another "
                f"`also_train` or `modules_to_save`."
            )
