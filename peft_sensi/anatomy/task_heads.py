"""A model goes in; the names of the modules of its task head come out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn
from transformers import PreTrainedModel

from .modules import base_of, embedding_of


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
