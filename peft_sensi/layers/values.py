"""Checks of the tensors in an adapter's file: names, shapes, dtypes and values."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..utils.errors import DAMAGED, NOT_FINITE, SensiLoadError
from ..utils.files import Spec


WEIGHTS = "adapter_model.safetensors"  # for messages, if the folder is not known
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_OTHER = "Load the base that the adapter was made for, or take the file from its source again."


def check_specs(found: Mapping[str, Spec], expected: Mapping[str, Spec], where: str = WEIGHTS) -> None:
    """Checks the exact set of names, and each shape and dtype. No value is read.

    A float dtype may have another width, because PEFT converts it on load. Integer dtypes must be exact.
    """
    if missing := sorted(set(expected) - set(found)):
        raise SensiLoadError(f"{where} lacks {missing[0]!r} ({len(missing)} tensors missing). {_OTHER}")
    if extra := sorted(set(found) - set(expected)):
        raise SensiLoadError(
            f"{where} holds {extra[0]!r}, which its plan does not have ({len(extra)} extra). {_OTHER}"
        )
    for name, (shape, dtype) in found.items():
        want_shape, want_dtype = expected[name]
        if shape != want_shape:
            raise SensiLoadError(
                f"{where}: {name!r} has shape {shape}, expected {want_shape}. Load the base that the adapter was made "
                f"for, with the same `num_labels` and the same number of tokens."
            )
        if dtype != want_dtype and not (dtype in FLOATS and want_dtype in FLOATS):
            raise SensiLoadError(f"{where}: {name!r} has dtype {dtype}, expected {want_dtype}. {DAMAGED}")


def check_content(name: str, tensor: torch.Tensor, numel: int | None, where: str = WEIGHTS) -> None:
    """Checks the values of one tensor. In `name`, the adapter's name may follow the last dot.

    `numel` is the number of kept weights of the Linear: positions must be below it, and a mask has this many bits. It
    is `None` if the tensor belongs to no Linear.
    """
    parts = name.split(".")[-2:]
    if tensor.dtype in FLOATS:
        check_finite(name, tensor, where)
        # A value is a scale times a code of at most 127, and must not overflow.
        most = torch.finfo(torch.float32).max / 128
        if "sensi_scales" in parts and tensor.numel() and not 0 <= tensor.min() <= tensor.max() <= most:
            raise SensiLoadError(f"{where}: {name!r} must hold scales from 0 to {most:.3g}. {DAMAGED}")
    elif "sensi_codes" in parts and tensor.numel() and tensor.min() < -127:
        raise SensiLoadError(
            f"{where}: {name!r} must hold codes from -127 to 127, found {int(tensor.min())}. {DAMAGED}"
        )
    elif "sensi_gate" in parts and tensor.numel() and tensor.max() > 1:
        raise SensiLoadError(f"{where}: {name!r} must hold zeros and ones, found {int(tensor.max())}. {DAMAGED}")
    elif "sensi_places" in parts and tensor.numel() and numel is not None:
        if tensor.min() < 0 or tensor.max() >= numel or not (tensor.diff() > 0).all():
            raise SensiLoadError(
                f"{where}: {name!r} must hold ascending positions below {numel}, found some from {int(tensor.min())} "
                f"to {int(tensor.max())}. {DAMAGED}"
            )
    elif "sensi_bits" in parts and numel is not None and numel % 8 and int(tensor[-1]) & (0xFF >> numel % 8):
        raise SensiLoadError(f"{where}: {name!r} must have zeros after its {numel} bits. {DAMAGED}")


def check_finite(name: str, tensor: torch.Tensor, where: str) -> None:
    values = tensor.float() if tensor.dtype == torch.float64 else tensor  # loading rounds float64 to float32
    if not torch.isfinite(values).all():
        raise SensiLoadError(f"{where}: {name!r} contains NaN or infinity: {NOT_FINITE}")


def round_integers(tensors: dict[str, torch.Tensor], like: Mapping[str, torch.Tensor]) -> None:
    """Rounds those of the `tensors`, in place of the dict, that are floats but are integers in `like`.

    A copy with averaged weights (EMA) may hold positions and masks as floats such as 4.9999995, which PyTorch loads as
    4. Raises `SensiLoadError` if floats are no integers, or if their dtype cannot hold all of these exactly.
    """
    for name, parameter in like.items():
        tensor = tensors.get(name)
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not parameter.is_floating_point():
            rounded, largest = tensor.round(), 2 / torch.finfo(tensor.dtype).eps
            if not (((tensor - rounded).abs() <= 0.25) & (rounded.abs() <= largest)).all():
                raise SensiLoadError(
                    f"{name!r} in the state dict must hold integers, but it has {tensor.dtype} values that are not "
                    f"exact. Average or convert only floats, and copy integers as they are."
                )
            tensors[name] = rounded.to(parameter.dtype)
