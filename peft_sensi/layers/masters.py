"""Float32 values ("masters") of what is trained stay float32, because small steps would be lost in 16 bits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

import torch

from ..utils.replicas import is_copied


SHORT = (torch.float16, torch.bfloat16)


def without_rounding(
    cast: Callable[[torch.Tensor], torch.Tensor], masters: Iterable[torch.Tensor], codes: Iterable[torch.Tensor] = ()
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function for `Module._apply` that does what `cast` does, but leaves masters in float32 or float64.

    `model.half()` and `model.to(torch.bfloat16)` then change the base, as if it had been loaded in this dtype. Their
    gradients stay as they are too. `codes` are compressed values, which no cast changes at all.
    """
    kept = {id(t) for p in masters for t in (p, p.grad) if t is not None and t.dtype not in SHORT}
    coded = {id(tensor) for tensor in codes}

    def call(tensor: torch.Tensor) -> torch.Tensor:
        result = cast(tensor)
        if id(tensor) in coded and result.dtype != tensor.dtype:
            return tensor.to(result.device)
        if id(tensor) in kept and result.dtype in SHORT:
            return tensor.to(result.device, torch.float32)
        return result

    return call


def warn_of_short(parameters: Iterable[torch.Tensor]) -> None:
    """Warns if one of these parameters is trained in 16 bits. Call it in forward passes of training only.

    DeepSpeed trains a copy in float32, and converts the parameters themselves to 16 bits.
    """
    short = next((p for p in parameters if p.requires_grad and p.dtype in SHORT), None)
    if short is not None and not is_copied(short) and not torch.compiler.is_compiling():
        name = str(short.dtype).removeprefix("torch.")
        warnings.warn(
            f"The adapter's values were converted to {name}, in which small steps of an optimizer are lost. Convert "
            f"the parameters that require gradients back to float32 before the optimizer is made: "
            f"`p.data = p.data.float()`. Casts of the whole model, such as `model.to(torch.{name})`, leave them as "
            f"they are.",
            stacklevel=2,
        )


def warn_of_unfrozen(base: torch.nn.Module) -> None:
    """Warns that a base weight requires gradients, but gets none. Call it in forward passes of training only."""
    weight = base._parameters.get("weight")
    if weight is not None and weight.requires_grad and not torch.compiler.is_compiling():
        warnings.warn(
            "Weights of the base require gradients, as after `model.requires_grad_(True)`. In layers that have an "
            "adapter they get none, and are not trained: the adapter's own tensors are trained in their place. "
            "Elsewhere they are trained, but not saved with the adapter. To train more of the base, use a larger "
            "`budget`, `target_modules` or `modules_to_save`.",
            stacklevel=2,
        )


def warn_of_merged() -> None:
    """Warns that merged values are not trained. Call it in forward passes of training only."""
    if not torch.compiler.is_compiling():
        warnings.warn(
            "An adapter is merged into the base, so this forward pass does not train its values. Call "
            "`unmerge_adapter()` before the training goes on, or `model.eval()` if this is no training.",
            stacklevel=2,
        )


def warn_of_lost_gradients(base: torch.nn.Module) -> None:
    """Warns that a kernel has no backward pass, so earlier layers are trained by a part of their gradients."""
    if not torch.compiler.is_compiling():
        warnings.warn(
            f"The quantized {type(base).__name__} layers of the base pass no gradients on, so earlier layers get a "
            f"part of their gradients only, with any PEFT method. Use a format with a backward pass: in torchao, one "
            f"that quantizes weights only, such as `Int8WeightOnlyConfig`.",
            stacklevel=2,
        )
