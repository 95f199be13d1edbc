"""One view of all Linears, quantized or not: weight `[out, in]`, bias `[out]`; of embeddings: `[tokens, hidden]`."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight, get_bnb_param_type
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from transformers.pytorch_utils import Conv1D

from ..utils.errors import AnatomyError, SensiError
from ..utils.replicas import offloaded


# The classes that can be targeted. `Conv1D` is GPT-2's Linear; it stores its weight as `[in, out]`.
LINEARS = (nn.Linear, Conv1D)
# Subclasses of Linear, by name, that have a `forward` of their own but compute the same.
_ALSO_PLAIN = ("FalconLinear",)


def is_plain(module: nn.Module) -> bool:
    """Whether the module computes `x @ weight.T + bias` and nothing else. Subclasses of Linear may compute more."""
    if type(module) is Conv1D or type(module).__name__ in _ALSO_PLAIN:
        return True
    if not isinstance(module, nn.Linear) or type(module).__call__ is not nn.Linear.__call__:
        return False
    return type(module).forward is nn.Linear.forward or is_quantized(module)


def obstacle(module: nn.Module) -> str | None:
    """Why an adapter cannot stand for this Linear or embedding, and what to do; `None` if nothing speaks against it.

    An adapter replaces the weight and the bias. So these must be parameters, which nothing else computes.
    """
    if (reason := computed_by_hooks(module)) is not None:
        return reason
    if is_parametrized(module):
        return "it has parametrizations: call `torch.nn.utils.parametrize.remove_parametrizations` first"
    if is_quantized(module):
        return None
    if "weight" not in module._parameters or (bias_of(module) is not None and "bias" not in module._parameters):
        return "its weight or bias is no parameter, but is computed"
    # Accelerate's hooks come in this way, and leave the class's own method behind when they are removed.
    own = getattr(vars(module).get("forward"), "__func__", None) is type(module).forward
    if "forward" in vars(module) and not own and not hasattr(module, "_hf_hook"):
        return "its `forward` was replaced"
    return None


def computed_by_hooks(module: nn.Module) -> str | None:
    """Why a module's weight is computed before each forward pass, and what to do. Such a module cannot be copied."""
    if any(isinstance(hook, BasePruningMethod) for hook in module._forward_pre_hooks.values()):
        return "it has pruning masks: call `torch.nn.utils.prune.remove` first"
    if "weight_g" in module._parameters:
        return "it has a weight norm: call `torch.nn.utils.remove_weight_norm` first"
    if "weight_u" in module._buffers:
        return "it has a spectral norm: call `torch.nn.utils.remove_spectral_norm` first"
    return None


def is_plain_embedding(module: nn.Module) -> bool:
    """Whether the module looks up rows of its weight and does nothing else."""
    plain = isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward
    return plain and module.max_norm is None and not (module.scale_grad_by_freq or module.sparse)


def is_quantized(linear: Any) -> bool:
    """Whether the module stores its weight in quantized form (bitsandbytes, HQQ or torchao)."""
    weight = getattr(linear, "weight", None)
    return hasattr(linear, "W_q") or (weight is not None and has_codes(weight))


def has_codes(weight: torch.Tensor) -> bool:
    """Whether a weight consists of quantized codes (bitsandbytes or torchao)."""
    kind = type(weight)
    if kind is nn.Parameter or kind is torch.Tensor:
        return False  # `torch.compile` can follow this comparison, but not the next one
    return kind.__name__ in ("Params4bit", "Int8Params") or kind.__module__.startswith("torchao.")


def matrix(linear: Any) -> torch.Tensor:
    """The weight as `[out, in]`. It shares storage with the module unless the module is quantized."""
    return dequantized(linear) if is_quantized(linear) else oriented(linear, linear.weight)


def oriented(linear: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """A view of `weight`, from the layout in which `linear` stores it to `[out, in]`, or back."""
    return weight.t() if isinstance(linear, Conv1D) else weight


def bias_of(linear: nn.Module) -> torch.Tensor | None:
    """The bias `[out]`, or `None`. Embeddings have none."""
    return getattr(linear, "bias", None)


def features(linear: Any) -> tuple[int, int]:
    """The number of outputs and of inputs. For an embedding, the number of tokens and the hidden size."""
    if isinstance(linear, nn.Embedding):
        return linear.num_embeddings, linear.embedding_dim
    return (linear.nf, linear.nx) if isinstance(linear, Conv1D) else (linear.out_features, linear.in_features)


def update_features(linear: Any) -> None:
    """Sets the module's numbers of outputs and inputs to the shape of its weight. Embeddings are never trimmed."""
    if isinstance(linear, Conv1D):
        linear.nx, linear.nf = linear.weight.shape
    elif isinstance(linear, nn.Linear):
        linear.out_features, linear.in_features = matrix(linear).shape


def select(linear: Any, dim: int, index: torch.Tensor) -> None:
    """Replaces the weight and the bias by these rows (`dim` 0) or columns (1) of `[out, in]`, in this order."""
    index = index.to(linear.weight.device)
    # Written into `_parameters`: under PEFT's `low_cpu_mem_usage`, a registered parameter loses its values.
    weight = oriented(linear, matrix(linear).detach().index_select(dim, index)).contiguous()
    linear._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    if bias_of(linear) is not None and dim == 0:
        linear._parameters["bias"] = nn.Parameter(linear.bias.detach().index_select(0, index), requires_grad=False)
    update_features(linear)


def count(parameter: torch.Tensor) -> int:
    """The number of weights. bitsandbytes packs two 4-bit weights into a byte."""
    if type(parameter).__name__ != "Params4bit":
        return parameter.numel()
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else 2 * parameter.numel() * parameter.element_size()


def dequantized(linear: Any) -> torch.Tensor:
    """The weight `[out, in]` of a quantized Linear, as a new tensor of a float dtype."""
    unpack(linear)
    with torch.no_grad():
        if get_bnb_param_type(linear.weight):
            # On the CPU, `dequantize_module_weight` loses the scales of 8-bit weights that have run before.
            weight = dequantize_bnb_weight(linear.weight, state=getattr(linear, "state", None))
        else:
            weight = dequantize_module_weight(linear)
    return weight.detach().reshape(linear.out_features, linear.in_features)


def check_weight(base: Any, x: torch.Tensor | None = None) -> None:
    """Raises `SensiError` if the base's weight cannot be used, because the model was changed after it was wrapped.

    `x` is the input of a forward pass. Accelerate loads offloaded weights when it calls the module that holds them,
    and the layer does not call it.
    """
    if not isinstance(base.weight, torch.Tensor):
        raise quantized_later(base)
    if x is not None and base.weight.is_meta and not x.is_meta:
        raise offloaded()


def quantized_later(changed: Any) -> SensiError:
    """The error for a module, or a weight, that a quantizer has put into the model after it was wrapped."""
    return SensiError(
        f"After the model was wrapped, one of its Linears or weights was replaced by a {type(changed).__module__}."
        f"{type(changed).__name__}, whose values the adapter cannot use. Wrap or load the model again, call "
        f"`merge_and_unload()`, and quantize the merged model."
    )


def unpack(linear: Any) -> None:
    """Undoes the layout of 4-bit weights with which bitsandbytes evaluates models on the CPU."""
    # This layout supports no gradients, and `dequantize_4bit` cannot read it. Only `state_dict()` undoes it.
    # Not `linear.weight`, which layers of adapters compute.
    state: Any = getattr(linear._parameters.get("weight"), "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        linear.state_dict()
        if state.absmax.dim() == 2:  # bitsandbytes 0.50 leaves scales that are not compressed in the packed order
            state.absmax = state.absmax.t().reshape(-1).float()


def not_trimmable() -> AnatomyError:
    """The error for trimming an adapter on a model of which at least a part is quantized."""
    return AnatomyError(
        "The base model is quantized, so its adapter can be trained, but not trimmed. Load the adapter on the base "
        "model without quantization, and trim and merge it there. Then the merged model can be quantized."
    )


def not_mergeable() -> SensiError:
    """The error for merging an adapter into a quantized model."""
    return SensiError(
        "The base model is quantized, and rounding the merged weights to its precision would lose what was trained. "
        "Load the adapter on the base model without quantization, and merge it there."
    )
