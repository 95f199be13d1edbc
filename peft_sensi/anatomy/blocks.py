"""Finds the heads and neurons of layers: layouts and the modules of a model go in, groups of units come out."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from operator import attrgetter
from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..utils.checks import is_number, shown
from ..utils.errors import AnatomyError
from .layouts import BlockLayout
from .linears import LINEARS, features
from .modules import base_of, is_base_parameter
from .units import Group, Side


Modules = dict[str, nn.Module]


def groups_of_layout(modules: Modules, layout: BlockLayout, cached: frozenset[int], built_in: bool) -> Iterator[Group]:
    """The groups of all layers that a layout matches. Only some models may have all sublayers of a built-in layout."""
    path = r"(\d+)".join(re.escape(part) for part in layout.layer.split("*"))
    for name, layer in modules.items():
        match = re.match(rf"(?:^|.*\.){path}$", name)
        # An adapter wraps modules inside a layer, never the layer itself.
        if match and is_base_parameter(name):
            index = int(match[1]) if match.lastindex else 0
            repeats = layout.repeats
            if not isinstance(repeats, int):  # the runs are shared by several layers (ALBERT)
                runs, layers = (_number_at(name, layer, attribute) for attribute in repeats)
                repeats = sum(int(run / (runs / layers)) == index for run in range(runs))
            if layout.o and _is_there(modules, name, (layout.q, layout.k, layout.v, layout.o), built_in):
                measures_cache = layout.cached and index in cached
                yield replace(_heads(modules, name, layout, measures_cache), repeats=repeats)
            if layout.down and _is_there(modules, name, (layout.up, layout.gate, layout.down), built_in):
                yield replace(_neurons(modules, name, layout), repeats=repeats)


def _is_there(modules: Modules, layer: str, names: Iterable[str], built_in: bool) -> bool:
    """Whether a layer has the sublayer with these Linears; the last of `names` is its output projection.

    If a trim has removed all units of the sublayer, the merged model keeps an output projection without inputs.
    """
    paths = [f"{layer}.{name}" for name in names if name]
    if built_in and any(path not in modules for path in paths):
        return False
    output = base_of(modules[paths[-1]]) if paths[-1] in modules else None
    return not isinstance(output, LINEARS) or features(output)[1] > 0


def _linear(modules: Modules, layer: str, name: str) -> tuple[str, nn.Linear]:
    path = f"{layer}.{name}"
    linear = base_of(modules[path]) if path in modules else None
    if not isinstance(linear, LINEARS):
        found = f"a {type(linear).__name__} and not a Linear" if linear else "not in the model"
        raise AnatomyError(
            f"The block layout names {path!r}, which is {found}. `dict(model.named_modules())` shows the names."
        )
    return path, cast(nn.Linear, linear)


def _attribute_at(name: str, layer: nn.Module, path: str) -> Any:
    """An attribute of a layer that a layout names."""
    try:
        return attrgetter(path)(layer)
    except AttributeError:
        raise AnatomyError(
            f"The block layout names the attribute {path!r}, which {name!r} does not have: give its path from there, "
            f"such as 'attention.self.num_attention_heads'."
        ) from None


def _number_at(name: str, layer: nn.Module, path: str) -> int:
    """The whole number in an attribute of a layer, such as the size of its heads."""
    if type(value := _attribute_at(name, layer, path)) is not int:
        raise AnatomyError(f"The block layout names {name}.{path} as a number, and it is {shown(value)}.")
    return value


def _heads(modules: Modules, name: str, layout: BlockLayout, measures_cache: bool) -> Group:
    """The heads of the layer `name`. A unit is one key/value head with all query heads that use it."""
    size = layout.head_size
    head_size = size if isinstance(size, int) else _number_at(name, modules[name], size)
    o_name, o = _linear(modules, name, layout.o)
    o_out, o_in = features(o)
    uneven = AnatomyError(f"{name}: the head size {head_size} does not divide the attention's width {o_in}.")
    if head_size <= 0 or o_in % head_size:
        raise uneven
    inputs = [_linear(modules, name, part) for part in (layout.q, layout.k, layout.v)]
    (q_name, _), (k_name, k), (v_name, _) = inputs
    # The Linear of the keys may also hold the queries and the values.
    keys = (features(k)[0] - o_in * (q_name == k_name)) // (1 + (v_name == k_name))
    if keys <= 0 or keys % head_size or o_in % keys:
        raise uneven
    units = keys // head_size
    queries = o_in // keys  # query heads per key/value head
    width = queries * head_size
    widths: tuple[int, ...] = (width, head_size, head_size)
    if layout.interleaved:
        widths, inputs = (sum(widths),), inputs[:1]
    sides = _rows(inputs, widths, units)
    sides, relative_rows = _with_relative_positions(modules, name, layout.relative, sides, head_size)
    sides.append(Side(o_name, 1, width, o_out))
    per_unit = ((layout.head_counts, queries), (layout.kv_head_counts, 1), (layout.head_widths, width))
    for path in (path for paths, _ in per_unit for path in paths):
        _attribute_at(name, modules[name], path)  # a trim would set it
    # Without heads, the code for relative positions cannot infer its shapes. `Conv1D` reshapes its input with -1,
    # which is ambiguous if the input has no columns.
    least = max(layout.min_heads, measures_cache, bool(layout.relative), isinstance(o, Conv1D))
    return Group(
        name=f"{name}.{'cross_heads' if layout.cross else 'heads'}",
        kind="head",
        size=units,
        sides=tuple(sides),
        output=o_name,
        layer=name,
        norm=_norm(modules, name, layout.attention_norm),
        factor=_factor(modules, name, layout.attention_factor, o_out),
        attributes=tuple((f"{name}.{path}", amount) for paths, amount in per_unit for path in paths),
        attention_width=width,
        least=min(int(least), units),
        tokens_first=layout.tokens_first,
        fixed=layout.fixed_heads or _depends_on_all_heads(modules, name, layout, sides, head_size),
        relative_rows=relative_rows,
    )


def _neurons(modules: Modules, name: str, layout: BlockLayout) -> Group:
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
        factor=_factor(modules, name, layout.ffn_factor, out),
        least=min(int(isinstance(down, Conv1D)), size),
        tokens_first=layout.tokens_first,
    )


def _rows(inputs: list[tuple[str, nn.Linear]], widths: tuple[int, ...], units: int) -> list[Side]:
    """The sides of a group's input Linears. A Linear that occurs several times holds the parts one after another."""
    sides, filled = [], dict.fromkeys((path for path, _ in inputs), 0)
    for (path, linear), width in zip(inputs, widths, strict=True):
        sides.append(Side(path, 0, width, features(linear)[1], linear.bias is not None, filled[path]))
        filled[path] += units * width
    for path, linear in inputs:
        if features(linear)[0] != filled[path]:
            raise AnatomyError(
                f"{path!r} has {features(linear)[0]} outputs, but {units} units of its block need {filled[path]}. The "
                f"block computes something that its layout does not describe, such as a gate on its output."
            )
    return sides


def _norm(modules: Modules, layer: str, name: str) -> str:
    path = f"{layer}.{name}"
    if name and path not in modules:
        raise AnatomyError(
            f"The block layout names the norm {path!r}, which is not in the model: "
            f'`dict(model.named_modules())` shows the names, and `""` stands for no norm.'
        )
    return path if name else ""


def _factor(modules: Modules, layer: str, path: str, size: int) -> str:
    """The path of a number, or of one for each of `size` features."""
    if not path:
        return ""
    value = _attribute_at(layer, modules[layer], path)
    if not is_number(value) and (not isinstance(value, torch.Tensor) or tuple(value.shape) not in ((), (1,), (size,))):
        raise AnatomyError(
            f"The block layout names {layer}.{path} as a factor, and it is {shown(value)}: a number is needed, or a "
            f"vector with one for each of the {size} features."
        )
    return f"{layer}.{path}"


def _depends_on_all_heads(modules: Modules, name: str, layout: BlockLayout, sides: list[Side], head_size: int) -> bool:
    """Whether the attention has parameters that the layout does not describe and that may differ between heads."""
    parent = f"{name}.{layout.v}".rpartition(".")[0]
    if parent == name:
        return False
    known = tuple(f"{path}." for path in (*(side.module for side in sides), f"{name}.{layout.attention_norm}"))
    for path, parameter in modules[parent].named_parameters(parent):
        if not path.startswith(known) and parameter.numel() > 1 and tuple(parameter.shape) != (head_size,):
            warnings.warn(
                f"{path} of shape {tuple(parameter.shape)} is part of an attention, but its block layout does not "
                f"describe it. The heads of this attention can be tuned, but not trimmed.",
                stacklevel=2,
            )
            return True
    return False


def _with_relative_positions(
    modules: Modules, layer: str, path: str, sides: list[Side], head_size: int
) -> tuple[list[Side], int]:
    """The sides of an attention, and how many relative positions it multiplies with each token.

    If `path` leads to the attention of DeBERTa (He et al. 2021, arXiv 2006.03654), keys and queries are also computed
    from position vectors, by Linears of their own or by those of the tokens. Each token is multiplied with all of
    these vectors in each of two products: content with position (c2p) and position with content (p2c).
    """
    attention: Any = modules[f"{layer}.{path}"] if path else None
    if attention is None or not attention.relative_attention:
        return sides, 0
    rows = 2 * int(attention.pos_ebd_size)
    projections = {"c2p": "pos_key_proj", "p2c": "pos_query_proj"}
    products = [kind for kind in projections if kind in attention.pos_att_type]
    if attention.share_att_key:
        return [*(replace(side, rows=rows) for side in sides[:2]), *sides[2:]], rows * len(products)
    for kind in products:
        name, linear = _linear(modules, layer, f"{path}.{projections[kind]}")
        has_bias = linear.bias is not None
        sides.append(Side(name, 0, head_size, linear.in_features, has_bias, tokens=False, rows=rows))
    return sides, rows * len(products)
