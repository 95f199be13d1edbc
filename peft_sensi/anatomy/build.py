"""Which units a model has, and which rows or columns of which Linear each of them owns (see `units`).

Everything here reads shapes only, so it also works on `meta` tensors.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, Literal, cast

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..utils.errors import AnatomyError
from .families import FAMILIES, layouts_of
from .layouts import BlockLayout
from .linears import LINEARS, count, features, is_plain_embedding, is_quantized, not_trimmable
from .modules import base_of, is_base_parameter, not_linear, task_head
from .units import Anatomy, Group, Side


def build_anatomy(
    model: nn.Module,
    targets: Iterable[str] = (),
    blocks: Iterable[BlockLayout] | None = None,
    whole: Literal["", "sublayers", "tensors"] = "",
) -> Anatomy:
    """Finds the groups of `model`: its blocks, and one of rows for each targeted Linear or embedding outside them.

    `blocks` replaces the built-in layouts. With `whole`, a sublayer of a block is one unit, or each targeted Linear is
    one that can be tuned or frozen. Raises `AnatomyError` when given `blocks` match nothing.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", "") or ""
    layouts = tuple(blocks) if blocks is not None else layouts_of(getattr(model, "config", None))
    modules = dict(model.named_modules())
    cached = _layers_that_measure_caches(model)
    groups = [group for layout in layouts for group in _block_groups(modules, layout, cached, blocks is None)]
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", True):
        # A decoder alone has cross-attention, which never runs.
        groups = [replace(group, repeats=0) if group.name.endswith(".cross_heads") else group for group in groups]
    if blocks is not None and not groups:
        raise AnatomyError(
            f"None of the layouts in `blocks` matches a layer of {type(model).__name__}: "
            f"{[layout.layer for layout in layouts]}. `layer` is the end of the layer modules' paths, such as "
            f"'encoder.layer.*'; `dict(model.named_modules())` shows the paths."
        )
    coded = {name for group in groups for name in group.modules if is_quantized(base_of(modules[name]))}
    groups = [replace(group, fixed=True) if coded & set(group.modules) else group for group in groups]
    layers = list(dict.fromkeys(group.layer for group in groups))
    if whole == "sublayers":
        groups = [group.as_one_unit() for group in groups]
    elif whole == "tensors":
        groups = []
    owned = {module for group in groups for module in group.modules}
    for name in sorted(set(targets) - owned):
        linear = base_of(modules[name])
        if is_plain_embedding(linear) and not whole:
            size, width = features(linear)
            groups.append(
                Group(f"{name}.tokens", "token", size, (Side(name, 0, 1, width, tokens=False),), output=name)
            )
            continue
        if not isinstance(linear, LINEARS):
            raise not_linear(linear)
        out, into = features(linear)
        side = Side(name, 0, 1, into, cast(nn.Linear, linear).bias is not None)
        layer = next((layer for layer in layers if name.startswith(f"{layer}.")), _indexed_parent(name))
        group = Group(name, "row", out, (side,), output=name, layer=layer)
        groups.append(replace(group.as_one_unit(), kind="tensor") if whole == "tensors" else group)
    return Anatomy(tuple(groups), _params_without_head(model), model_type)


def _indexed_parent(name: str) -> str:
    """`model.layers.3` for `model.layers.3.mlp.up`: what a layer is in a model whose blocks are unknown."""
    found = re.match(r"(?:.*?\.)?\d+(?=\.)", name)
    return found.group() if found else ""


def nothing_to_trim(model: nn.Module) -> AnatomyError:
    if any(is_quantized(module) for module in model.modules()):
        return not_trimmable(model)
    return AnatomyError(
        f"{type(model).__name__} has no heads or neurons that can be trimmed: its blocks are unknown. Known families "
        f"are {', '.join(sorted(FAMILIES))}; describe another one with `SensiConfig(blocks=[BlockLayout("
        f"layer='encoder.layer.*', q=..., k=..., v=..., o=..., up=..., down=..., head_size=...)])`, or set only a "
        f"`trainable` limit, which trims nothing."
    )


def _params_without_head(model: nn.Module) -> int:
    head = tuple(f"{name}." for name in task_head(model))
    return sum(
        count(parameter)
        for name, parameter in model.named_parameters()
        if is_base_parameter(name) and not name.startswith(head)
    )


def _layers_that_measure_caches(model: nn.Module) -> frozenset[int]:
    """Indices of the layers by whose keys Transformers' caches tell how many tokens they hold."""
    config: object = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or ()
    return frozenset({0, *(kinds.index(kind) for kind in set(kinds))})


def _block_groups(
    modules: dict[str, nn.Module], layout: BlockLayout, cached: frozenset[int], lenient: bool
) -> Iterable[Group]:
    """With `lenient`, sublayers that are not there are left out: a family may have alternatives."""
    path = r"(\d+)".join(re.escape(part) for part in layout.layer.split("*"))
    pattern = re.compile(rf"(?:^|.*\.){path}$")
    for name, layer in modules.items():
        match = pattern.match(name)
        # Adapters on the model are wrapped modules inside the layer; the layer itself never is one.
        if match and is_base_parameter(name):
            index = int(match[1]) if match.lastindex else 0
            repeats = _runs(layer, index, layout)
            if layout.o and _is_there(modules, name, (layout.q, layout.k, layout.v, layout.o), lenient):
                measures_cache = layout.cached and index in cached
                yield replace(_heads(modules, name, layer, layout, measures_cache), repeats=repeats)
            if layout.down and _is_there(modules, name, (layout.up, layout.gate, layout.down), lenient):
                yield replace(_neurons(modules, name, layout), repeats=repeats)


def _is_there(modules: dict[str, nn.Module], layer: str, names: Iterable[str], lenient: bool) -> bool:
    """Whether a layer has the sublayer; the last of `names` is its output projection.

    After a merge that left nothing of the sublayer, that is a Linear without inputs.
    """
    paths = [f"{layer}.{name}" for name in names if name]
    if lenient and any(path not in modules for path in paths):
        return False
    output = base_of(modules[paths[-1]]) if paths[-1] in modules else None
    return not isinstance(output, LINEARS) or features(cast(nn.Linear, output))[1] > 0


def _runs(layer: nn.Module, index: int, layout: BlockLayout) -> int:
    """How often a layer runs in one pass; `index` is its number among those that share the runs (ALBERT)."""
    if isinstance(layout.repeats, int):
        return layout.repeats
    runs, layers = (attrgetter(path)(layer) for path in layout.repeats)
    return sum(int(run / (runs / layers)) == index for run in range(runs))


def _linear(modules: dict[str, nn.Module], layer: str, name: str) -> tuple[str, nn.Linear]:
    path = f"{layer}.{name}"
    linear = base_of(modules[path]) if path in modules else None
    if not isinstance(linear, LINEARS):
        raise AnatomyError(
            f"The block layout names {path!r}, which is {'no Linear' if linear else 'not in the model'}."
        )
    return path, cast(nn.Linear, linear)


def _heads(
    modules: dict[str, nn.Module], name: str, layer: nn.Module, layout: BlockLayout, measures_cache: bool
) -> Group:
    head_size = layout.head_size if isinstance(layout.head_size, int) else attrgetter(layout.head_size)(layer)
    o_name, o = _linear(modules, name, layout.o)
    o_out, o_in = features(o)
    uneven = AnatomyError(f"{name}: the head size {head_size} does not divide the attention's width {o_in}.")
    if head_size <= 0 or o_in % head_size:
        raise uneven
    inputs = [_linear(modules, name, part) for part in (layout.q, layout.k, layout.v)]
    (q_name, _), (k_name, k), (v_name, _) = inputs
    # What is left of the keys' Linear beside the queries, divided among keys and values.
    fused = 1 + (v_name == k_name)
    keys = (features(k)[0] - o_in * (q_name == k_name)) // fused
    if keys <= 0 or keys % head_size or o_in % keys:
        raise uneven
    units = keys // head_size
    queries = o_in // keys  # query heads that share a key/value head
    widths: tuple[int, ...] = (queries * head_size, head_size, head_size)
    if layout.interleaved:
        widths, inputs = (sum(widths),), inputs[:1]
    sides = _rows(inputs, widths, units)
    relative = relative_positions(modules[f"{name}.{layout.relative}"]) if layout.relative else RelativePositions()
    if relative.shared:
        sides = [*(replace(side, rows=relative.rows) for side in sides[:2]), *sides[2:]]
    for projection in relative.projections:
        path, linear = _linear(modules, name, f"{layout.relative}.{projection}")
        bias = linear.bias is not None
        sides.append(Side(path, 0, head_size, linear.in_features, bias, tokens=False, rows=relative.rows))
    sides.append(Side(o_name, 1, queries * head_size, o_out))
    attributes = [(f"{name}.{attribute}", queries) for attribute in layout.head_counts]
    attributes += [(f"{name}.{attribute}", 1) for attribute in layout.kv_head_counts]
    attributes += [(f"{name}.{attribute}", queries * head_size) for attribute in layout.head_widths]
    # The shapes of relative positions cannot be inferred from nothing.
    least = max(layout.min_heads, measures_cache, bool(layout.relative), _LEAST.get(type(o), 0))
    return Group(
        name=f"{name}.{'cross_heads' if layout.cross else 'heads'}",
        kind="head",
        size=units,
        sides=tuple(sides),
        output=o_name,
        layer=name,
        norm=_norm(modules, name, layout.attention_norm),
        attributes=tuple(attributes),
        attention_width=queries * head_size,
        least=min(least, units),
        fixed=layout.fixed_heads or _depends_on_all_heads(modules, name, layout, sides, head_size),
        relative_rows=relative.rows * relative.products,
    )


def _neurons(modules: dict[str, nn.Module], name: str, layout: BlockLayout) -> Group:
    down_name, down = _linear(modules, name, layout.down)
    out, size = features(down)
    inputs = [_linear(modules, name, part) for part in (layout.up, layout.gate) if part]
    sides = _rows(inputs, (1,) * len(inputs), size)
    sides.append(Side(down_name, 1, 1, out))
    return Group(
        name=f"{name}.neurons",
        kind="neuron",
        size=size,
        sides=tuple(sides),
        output=down_name,
        layer=name,
        norm=_norm(modules, name, layout.ffn_norm),
        least=min(size, _LEAST.get(type(down), 0)),
    )


# `Conv1D` reshapes its input by -1, which is ambiguous where the input has no columns.
_LEAST: dict[type, int] = {Conv1D: 1}


def _rows(inputs: list[tuple[str, nn.Linear]], widths: tuple[int, ...], units: int) -> list[Side]:
    """The sides of the Linears in front of a group: one that is named several times holds its parts as blocks."""
    sides, filled = [], dict.fromkeys((path for path, _ in inputs), 0)
    for (path, linear), width in zip(inputs, widths, strict=True):
        sides.append(Side(path, 0, width, features(linear)[1], linear.bias is not None, filled[path]))
        filled[path] += units * width
    for path, linear in inputs:
        if features(linear)[0] != filled[path]:
            raise AnatomyError(
                f"{path!r} has {features(linear)[0]} outputs, but {units} units of its block need {filled[path]}: the "
                f"block computes something that its layout does not describe, such as a gate on its output."
            )
    return sides


def _norm(modules: dict[str, nn.Module], layer: str, name: str) -> str:
    path = f"{layer}.{name}"
    if name and path not in modules:
        raise AnatomyError(f"The block layout names the norm {path!r}, which is not in the model.")
    return path if name else ""


def _depends_on_all_heads(
    modules: dict[str, nn.Module], name: str, layout: BlockLayout, sides: list[Side], head_size: int
) -> bool:
    """Whether the attention has parameters of its own that are not the same for all heads, so that none can leave."""
    parent = layout.v.rpartition(".")[0]
    if not parent:
        return False
    known = tuple(f"{path}." for path in (*(side.module for side in sides), f"{name}.{layout.attention_norm}"))
    for path, parameter in modules[f"{name}.{parent}"].named_parameters(f"{name}.{parent}"):
        if not path.startswith(known) and parameter.numel() > 1 and tuple(parameter.shape) != (head_size,):
            warnings.warn(
                f"{path} of shape {tuple(parameter.shape)} belongs to an attention whose block layout does not "
                f"describe it: the heads can be tuned, but not trimmed.",
                stacklevel=2,
            )
            return True
    return False


@dataclass(frozen=True)
class RelativePositions:
    """How one attention uses relative positions.

    Their keys and queries come from `projections` (names of Linears) that run on nothing else, or, if `shared`, from
    the tokens' own, which then run once more for each of the `rows` positions. Each token is multiplied with all rows
    once for each of the `products`: content with position (c2p) and position with content (p2c).
    """

    rows: int = 0
    products: int = 0
    projections: tuple[str, ...] = ()
    shared: bool = False


def relative_positions(attention: Any) -> RelativePositions:
    """Reads a `DisentangledSelfAttention` of Transformers."""
    if not attention.relative_attention:
        return RelativePositions()
    names = {"c2p": "pos_key_proj", "p2c": "pos_query_proj"}
    kinds = [kind for kind in names if kind in attention.pos_att_type]
    shared = bool(attention.share_att_key)
    projections = () if shared else tuple(names[kind] for kind in kinds)
    return RelativePositions(2 * int(attention.pos_ebd_size), len(kinds), projections, shared)
