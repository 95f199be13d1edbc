"""TODO docstring."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..utils.errors import SensiLoadError
from ..utils.files import Spec


WEIGHTS = "adapter_model.safetensors"  # in messages where the folder is not known


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_specs(found: Mapping[str, Spec], expected: Mapping[str, Spec], where: str = WEIGHTS) -> None:
    """Checks the exact set of names, shapes and dtypes, before any value is read. Raises `SensiLoadError`.

    Floats of another width are converted, as in PEFT; whole numbers are not.
    """
    if missing := sorted(set(expected) - set(found)):
        raise SensiLoadError(f"{where} lacks {missing[0]!r} ({len(missing)} tensors missing).")
    if extra := sorted(set(found) - set(expected)):
        raise SensiLoadError(f"{where} holds {extra[0]!r}, which its plan does not have ({len(extra)} extra).")
    for name, (shape, dtype) in found.items():
        want_shape, want_dtype = expected[name]
        if shape != want_shape:
            raise SensiLoadError(f"{where}: {name!r} has shape {shape}, expected {want_shape}.")
        if dtype != want_dtype and not (dtype in _FLOATS and want_dtype in _FLOATS):
            raise SensiLoadError(f"{where}: {name!r} has dtype {dtype}, expected {want_dtype}.")


def check_content(name: str, tensor: torch.Tensor, room: int | None, where: str = WEIGHTS) -> None:
    """Checks the values of one tensor; `room` is the number of positions that an index may name, or bits it has.

    Raises `SensiLoadError`.
    """
    parts = name.split(".")[-2:]  # the adapter's name may follow
    if tensor.dtype in _FLOATS:
        _check_finite(name, tensor, where)
        # An entry is a code of at most 127 times its scale, and must not overflow.
        most = torch.finfo(torch.float32).max / 128
        if "sensi_scales" in parts and tensor.numel() and not 0 <= tensor.min() <= tensor.max() <= most:
            raise SensiLoadError(f"{where}: {name!r} must hold scales from 0 to {most:.3g}.")
    elif "sensi_codes" in parts and tensor.numel() and tensor.min() < -127:
        raise SensiLoadError(f"{where}: {name!r} must hold codes from -127 to 127, found {int(tensor.min())}.")
    elif "sensi_gate" in parts and tensor.numel() and tensor.max() > 1:
        raise SensiLoadError(f"{where}: {name!r} must hold zeros and ones, found {int(tensor.max())}.")
    elif "sensi_places" in parts and tensor.numel() and room is not None:
        if tensor.min() < 0 or tensor.max() >= room or not (tensor.diff() > 0).all():
            raise SensiLoadError(
                f"{where}: {name!r} must hold ascending positions below {room}, found some from {int(tensor.min())} "
                f"to {int(tensor.max())}."
            )
    elif "sensi_bits" in parts and room is not None and room % 8 and int(tensor[-1]) & (0xFF >> room % 8):
        raise SensiLoadError(f"{where}: {name!r} must have zeros after its {room} bits.")


def _check_finite(name: str, tensor: torch.Tensor, where: str) -> None:
    values = tensor.float() if tensor.dtype == torch.float64 else tensor  # what is kept of it
    if not torch.isfinite(values).all():
        raise SensiLoadError(f"{where}: {name!r} contains NaN or infinity.")
