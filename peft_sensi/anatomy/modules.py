"""Finds modules of a model, and the weights that they have now, behind the wrappers that PEFT puts around them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any, Literal, cast

import torch
from accelerate.utils import extract_model_from_parallel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from ..utils.checks import shown
from ..utils.errors import SensiError
from .linears import is_plain_embedding, matrix
from .units import Group, Side


_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)


def not_linear(module: nn.Module) -> TypeError:
    """The error for a target of a kind that has no rows to tune."""
    return TypeError(
        f"Target module {module} is not supported: only `torch.nn.Linear`, Transformers' `Conv1D` and, unit by unit, "
        f"`torch.nn.Embedding` can be targeted."
    )


def check_module(model: Any) -> None:
    """Raises `SensiError` for anything but a module, such as the name of a model."""
    if not isinstance(model, nn.Module):
        raise SensiError(f"The model must be a `torch.nn.Module`, got {shown(model)}: load it first.")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of DDP, DataParallel, FSDP, DeepSpeed and `torch.compile`, in whatever order.

    Raises `SensiError` for anything but a module.
    """
    check_module(model)
    # Accelerate's function removes a compiled wrapper outside of DDP but not one inside of it.
    while (inner := extract_model_from_parallel(model, keep_torch_compile=False)) is not model:
        model = inner
    return model


def base_of(module: nn.Module) -> nn.Module:
    """The user's own module, without the wrappers that PEFT has put around it."""
    while True:
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        else:
            return module


def linear_of(model: nn.Module, name: str) -> nn.Linear:
    """The user's own Linear (or `Conv1D`, see `linears`) called `name`, without PEFT's wrappers."""
    return cast(nn.Linear, base_of(model.get_submodule(name)))


def name_in_base(path: str) -> str:
    """The name that a module or parameter has in the base model, if adapters save it or a module around it whole."""
    return re.sub(r"\.(original_module|modules_to_save\.[^.]+)(?=\.|$)", "", path)


def is_base_parameter(name: str) -> bool:
    """Whether this is the name of a parameter of the base model, and not of an adapter."""
    return not any(part.startswith("sensi_") or part == "modules_to_save" for part in name.split("."))


def embedding_of(model: nn.Module, side: Literal["input", "output"]) -> nn.Module | None:
    """The model's `input` or `output` embedding, or `None` if there is none or Transformers does not know it."""
    try:
        return getattr(model, f"get_{side}_embeddings")()
    except (AttributeError, NotImplementedError):
        return None


def is_norm(module: nn.Module) -> bool:
    """Whether this is a normalization with trained values, by the name of its class, which may be any model's own."""
    values = list(module.parameters(recurse=False))
    # A class with modules inside of it only has a norm, such as `RobertaPreLayerNormLMHead`.
    return "Norm" in type(module).__name__ and bool(values) and not list(module.children())


def image_tokens(model: nn.Module) -> int | None:
    """How many tokens an image model has per image: patches and special tokens. `None` if this is not known.

    Position embeddings, a parameter `[1, tokens, hidden]` or the table `[tokens, hidden]` of an embedding, exist for
    all tokens except registers (as in DINOv2 with registers). Models without such embeddings are BEiT and DINOv3.
    """
    if getattr(model, "main_input_name", "") != "pixel_values":
        return None
    endings = ("embeddings.position_embeddings", "embeddings.position_embedding.weight")
    parameters = dict(model.named_parameters())
    registers = _count(parameters, "register_tokens")
    for name, parameter in parameters.items():
        if name.endswith(endings) and parameter.dim() in (2, 3):
            return parameter.shape[-2] + registers
    sizes = [getattr(getattr(model, "config", None), name, None) for name in ("image_size", "patch_size")]
    image, patch = (size if isinstance(size, (list, tuple)) else (size, size) for size in sizes)
    if not all(isinstance(size, int) for size in (*image, *patch)):
        return None
    return (image[0] // patch[0]) * (image[1] // patch[1]) + _count(parameters, "cls_token") + registers


def _count(parameters: Mapping[str, nn.Parameter], name: str) -> int:
    """How many special tokens `[1, tokens, hidden]` have this name."""
    return next((p.shape[-2] for path, p in parameters.items() if path.endswith(f"embeddings.{name}")), 0)


def residual_factor(model: nn.Module, group: Group) -> torch.Tensor:
    """What a layer multiplies a sublayer's output by before it adds it to the residual sum, `[]` or `[features]`."""
    return torch.as_tensor(attrgetter(group.factor)(model) if group.factor else 1.0).detach().float()


# Names of task heads, for models that do not hold a transformer in a module of its own.
HEAD_NAMES = ("classifier", "score", "qa_outputs")


def transformers_in(model: nn.Module) -> dict[str, PreTrainedModel]:
    """The outermost models of Transformers inside of a model, by their paths. The model itself does not count."""
    found: dict[str, PreTrainedModel] = {}
    for name, module in model.named_modules():
        if name and isinstance(module, PreTrainedModel) and not name.startswith(tuple(f"{path}." for path in found)):
            found[name] = module
    return found


def task_head(model: nn.Module) -> list[str]:
    """Paths of the modules that make up a classification-like head: all that is outside the base transformer.

    The list is empty for a transformer without a head, and for language models, whose head is pretrained. A model of
    the user's own may hold several transformers, which may have heads themselves.
    """
    if embedding_of(model, "output") is not None:
        return []
    prefix, children = getattr(model, "base_model_prefix", ""), list(_with_parameters(model))
    bases: dict[str, nn.Module] = {**transformers_in(model)}
    if prefix in children:
        bases[prefix] = model.get_submodule(prefix)
    elif is_bare(model) or not bases:
        return [name for name in children if name in HEAD_NAMES]
    return _outside(model, "", bases, embedding_of(model, "input"))


def is_bare(model: nn.Module) -> bool:
    """Whether this is a model of Transformers without a head, such as `BertModel`."""
    cls = type(model)
    return cls.__module__.startswith(("transformers.", "transformers_modules.")) and "For" not in cls.__name__


def _with_parameters(model: nn.Module) -> Iterator[str]:
    return (name for name, child in model.named_children() if any(True for _ in child.parameters()))


def _outside(module: nn.Module, path: str, bases: Mapping[str, nn.Module], table: nn.Module | None) -> list[str]:
    """Paths of the modules below `module` that are outside of the transformers `bases`, and of the heads of these."""
    found: list[str] = []
    for name in _with_parameters(module):
        child, full = module.get_submodule(name), f"{path}{name}"
        if full in bases:
            found += [f"{full}.{head}" for head in task_head(child)]
        elif any(base.startswith(f"{full}.") for base in bases):
            found += _outside(child, f"{full}.", bases, table)
        elif base_of(child) is not table:
            found += _wholes(child, full)
    return found


def _wholes(module: nn.Module, path: str) -> list[str]:
    """The paths of what PEFT can save whole of a module: itself, or what is inside if it is a list or a dict."""
    if isinstance(module, nn.ParameterList | nn.ParameterDict):
        return []
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return [p for name in _with_parameters(module) for p in _wholes(module.get_submodule(name), f"{path}.{name}")]
    return [path]


def head_parameters_outside_modules(model: nn.Module) -> list[str]:
    """Names of parameters outside the base transformers that no module of `task_head` holds. PEFT cannot save them."""
    bases = list(transformers_in(model))
    if isinstance(model, PreTrainedModel):
        prefix = model.base_model_prefix
        known = prefix in dict(model.named_children()) and embedding_of(model, "output") is None
        bases = [prefix, *bases] if known else []
    inside = tuple(f"{name}." for name in (*bases, *task_head(model)))
    return [name for name, _ in model.named_parameters() if not name.startswith(inside)] if bases else []


def unit_weights(model: nn.Module, group: Group, side: Side) -> torch.Tensor:
    """The weights that each unit owns on one side: `[group.size, side.width * side.fan]`, float32."""
    return side.per_unit(matrix(linear_of(model, side.module)).detach(), group.size).float()


def input_embedding(model: nn.Module) -> str | None:
    """Name of the embedding of the input tokens, or `None` if it does more than look up rows, or is shared."""
    table = embedding_of(model, "input")
    if table is None or not is_plain_embedding(table := base_of(table)) or is_shared(model, table):
        return None
    if id(table) in in_several_places(model):
        return None
    return next((name for name, module in model.named_modules() if base_of(module) is table), None)


# The last parts of the names that tables of positions have in Transformers.
_POSITIONS = re.compile(r"(.*\.)?(position_embeddings?|wpe|embed_positions)")


def positions_of(model: nn.Module) -> tuple[str, int] | None:
    """Name of the table of learned positions, and the longest input in tokens. `None` if the model has no such table.

    Some families do not use the first rows: OPT and BART two of them (`offset`), RoBERTa those up to its padding.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and _POSITIONS.fullmatch(name):
            first = module.padding_idx + 1 if module.padding_idx is not None else int(getattr(module, "offset", 0))
            return name, module.weight.shape[0] - first
    return None


def usual_length(model: nn.Module, decode: bool = False) -> int:
    """The tokens of the sequences that are measured by default: 128, or as many as the table of positions has."""
    longest = longest_to_measure(model, decode)
    return 128 if longest is None else min(128, longest)


def longest_to_measure(model: nn.Module, decode: bool = False) -> int | None:
    """The most tokens for which the table of positions is large enough; `None` without a table.

    A decoding step (`decode`) needs a position more than the cached tokens before it.
    """
    table = positions_of(model)
    return table[1] - decode if table else None


def is_shared(model: nn.Module, table: nn.Module) -> bool:
    """Whether another module, such as the output layer of a language model, uses the weight of this embedding too."""
    others = (module for module in map(base_of, model.modules()) if module is not table)
    return any(getattr(other, "weight", None) is table.weight for other in others)


def in_several_places(model: nn.Module) -> set[int]:
    """The ids of modules that several modules hold, or one under several names. An adapter would replace one of them.

    What is inside such a module has one place: it is replaced for all who hold the module.
    """
    places = Counter(id(child) for parent in model.modules() for child in parent._modules.values())
    return {key for key, count in places.items() if count > 1 and key != id(None)}


def move_hooks(source: nn.Module, target: nn.Module) -> None:
    """Moves the user's hooks from a base layer to the layer around it, or back.

    The layer computes the adapted output itself and does not call the base layer, so hooks of that would be skipped.
    The dicts themselves change places, because the handles that remove hooks refer to them.
    """
    for name in _HOOKS:
        ours, theirs = getattr(source, name), getattr(target, name)
        if ours:
            ours.update(theirs)
            setattr(target, name, ours)
            setattr(source, name, type(ours)())
    if target._is_full_backward_hook is None:
        target._is_full_backward_hook, source._is_full_backward_hook = source._is_full_backward_hook, None
