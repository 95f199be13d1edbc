"""Finds the units of a model, also on the `meta` device: the model goes in, an `Anatomy` comes out (see `units`)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from ..utils.checks import shown
from ..utils.errors import AnatomyError
from .blocks import Modules, groups_of_layout
from .families import FAMILIES, layouts_of
from .layouts import BlockLayout, is_lone_decoder
from .linears import LINEARS, bias_of, count, features, is_plain_embedding, is_quantized
from .modules import base_of, is_base_parameter, not_linear, unwrapped
from .task_heads import task_head, transformers_in
from .units import Anatomy, Group, Side


def _layouts(blocks: Any) -> tuple[BlockLayout, ...]:
    found = tuple(blocks) if isinstance(blocks, Iterable) else (blocks,)
    if not all(isinstance(layout, BlockLayout) for layout in found):
        raise AnatomyError(f"`blocks` must be a list of `BlockLayout` objects, got {shown(blocks)}.")
    return found


def build_anatomy(
    model: nn.Module,
    targets: Iterable[str] = (),
    blocks: Iterable[BlockLayout] | None = None,
    whole: Literal["", "sublayers", "tensors"] = "",
) -> Anatomy:
    """Finds the groups of units of `model`: the heads and neurons of its blocks, and the rows or tokens of `targets`.

    Args:
        targets: Names of Linears and embeddings. Each one that is in no block has a group of its own.
        blocks: Layouts of the model's blocks, instead of those of its family.
        whole: With `sublayers`, the whole attention or FFN of a layer is one unit. With `tensors`, each target is one
            unit, which can be tuned or frozen, and blocks have no other units.

    Raises:
        AnatomyError: `blocks` match no layer, a layout does not fit its layer, or a target is not in the model.
        TypeError: A target is neither a Linear nor an embedding.
    """
    model, blocks = unwrapped(model), None if blocks is None else _layouts(blocks)
    modules, configs = dict(model.named_modules()), _configs(model, described=blocks is not None)
    if blocks is not None:  # they may describe any part of the model
        configs = {"": next(iter(configs.values()))}
    groups = [group for path, config in configs.items() for group in _groups_in_blocks(modules, path, config, blocks)]
    if blocks is not None and not groups:
        raise AnatomyError(
            f"None of the layouts in `blocks` matches a layer of {type(model).__name__}: "
            f"{[layout.layer for layout in blocks]}. `layer` is the end of the layer modules' paths, such as "
            f"'encoder.layer.*'; `dict(model.named_modules())` shows the paths."
        )
    layers = {group.layer: group.tokens_first for group in groups}
    if whole == "sublayers":
        groups = [group.as_one_unit() for group in groups]
    elif whole == "tensors":
        groups = []
    if twice := [name for name, number in Counter(group.output for group in groups).items() if number > 1]:
        raise AnatomyError(f"Several layouts of `blocks` fit the sublayer with {twice[0]!r}: leave out one of them.")
    in_blocks = {module for group in groups for module in group.modules}
    groups += [_group_of_target(modules, name, layers, whole) for name in sorted(set(targets) - in_blocks)]
    head = tuple(f"{name}." for name in task_head(model))
    parameters = {n: p for n, p in model.named_parameters() if is_base_parameter(n) and not n.startswith(head)}
    total = sum(count(parameter) for parameter in parameters.values())
    kinds = (getattr(config, "model_type", None) for config in (getattr(model, "config", None), *configs.values()))
    return Anatomy(tuple(groups), total, next(filter(None, kinds), ""))


def _configs(model: nn.Module, described: bool = False) -> dict[str, Any]:
    """The configs that describe the model's blocks, by the path of the part that each describes.

    A model of the user's own may have no config, and one of several transformers (an `EncoderDecoderModel`, LLaVA) may
    be of no known family. Then the configs of the transformers inside of it count. The family does not matter if the
    user has `described` the blocks.
    """
    config = getattr(model, "config", None)
    has_type = bool(getattr(config, "model_type", None))
    if layouts_of(config) or (has_type and described):
        return {"": config}
    inner: dict[str, Any] = {}
    for path, transformer in transformers_in(model).items():
        inner |= {f"{path}.{within}".rstrip("."): found for within, found in _configs(transformer).items()}
    is_usable = not has_type or all(map(layouts_of, inner.values()))
    return inner if inner and is_usable else {"": config}


def _groups_in_blocks(modules: Modules, path: str, config: Any, blocks: tuple[BlockLayout, ...] | None) -> list[Group]:
    """The groups of all blocks in the part of a model that `config` describes."""
    modules = {name: module for name, module in modules.items() if not path or f"{name}.".startswith(f"{path}.")}
    layouts = layouts_of(config) if blocks is None else blocks
    if getattr(config, "is_decoder", False):  # also families of encoders, such as BERT, can be decoders
        layouts = tuple(replace(layout, cached=not layout.cross) for layout in layouts)
    text_config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    kinds = getattr(text_config, "layer_types", None) or ()
    # The keys of these layers tell Transformers' caches how many tokens they hold.
    cached = frozenset({0, *(kinds.index(kind) for kind in set(kinds))})
    groups = [group for layout in layouts for group in groups_of_layout(modules, layout, cached, blocks is None)]
    if is_lone_decoder(config):
        groups = [replace(group, repeats=0) if group.name.endswith(".cross_heads") else group for group in groups]
    return [
        replace(group, fixed=True) if any(is_quantized(base_of(modules[name])) for name in group.modules) else group
        for group in groups
    ]


def _group_of_target(modules: Modules, name: str, layers: dict[str, bool], whole: str) -> Group:
    """The rows of a Linear, or the tokens of an embedding, that belongs to no block.

    `layers` are those with known blocks, and say whether their hidden states have the tokens first.
    """
    if name not in modules:
        raise AnatomyError(f"The target {name!r} is not in the model; `dict(model.named_modules())` shows the names.")
    linear = base_of(modules[name])
    if is_plain_embedding(linear) and not whole:
        size, width = features(linear)
        side, tokens_first = Side(name, 0, 1, width, tokens=False), any(layers.values())
        return Group(f"{name}.tokens", "token", size, (side,), output=name, tokens_first=tokens_first)
    if not isinstance(linear, LINEARS):
        raise not_linear(name, linear)
    out, into = features(linear)
    side = Side(name, 0, 1, into, bias_of(linear) is not None)
    # In a model with unknown blocks, the layer of `model.layers.3.mlp.up` is `model.layers.3`.
    indexed = re.match(r"(?:.*?\.)?\d+(?=\.)", name)
    layer = next((layer for layer in layers if name.startswith(f"{layer}.")), indexed.group() if indexed else "")
    group = Group(name, "row", out, (side,), output=name, layer=layer, tokens_first=layers.get(layer, False))
    return replace(group.as_one_unit(), kind="tensor") if whole == "tensors" else group


def nothing_to_score(model: nn.Module) -> AnatomyError:
    """The error for a model of an unknown family in which the user has named no units either."""
    return AnatomyError(
        f"{type(model).__name__} has no known units, so there is nothing to score: {_UNKNOWN_BLOCKS} "
        f"`blocks=[BlockLayout(layer='encoder.layer.*', ...)]`, or name Linears whose output rows are to be scored: "
        f"`targets=[...]`."
    )


def nothing_to_trim(model: nn.Module) -> AnatomyError:
    """The error for a trimming limit on a model without heads or neurons that can be trimmed."""
    if any(is_quantized(module) for module in model.modules()):
        return AnatomyError(
            f"{type(model).__name__} is quantized: its weights are stored in blocks with common scales, so heads and "
            f"neurons cannot be cut out of them. Load the base model without quantization to trim it (and quantize "
            f"the merged model), or set only a `trainable` limit, which trims nothing."
        )
    return AnatomyError(
        f"{type(model).__name__} has no heads or neurons that can be trimmed: {_UNKNOWN_BLOCKS} "
        f"`SensiConfig(blocks=[BlockLayout(layer='encoder.layer.*', q=..., k=..., v=..., o=..., up=..., down=..., "
        f"head_size=...)])`, or set only a `trainable` limit, which trims nothing."
    )


_UNKNOWN_BLOCKS = (
    f"its blocks are unknown. Known families are {', '.join(sorted(FAMILIES))}. Describe another one with"
)
