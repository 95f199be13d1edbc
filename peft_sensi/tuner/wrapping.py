"""Puts the slices of an adapter (see `layers.slices`) into a model: Linears are replaced by layers.

Layers can also be rebuilt for another plan.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ..anatomy.linears import is_plain, is_plain_embedding
from ..anatomy.modules import move_hooks, not_linear
from ..anatomy.units import Group
from ..layers.embedding import SensiEmbedding
from ..layers.functional import Pair
from ..layers.integers import note_integers
from ..layers.layer import SensiLayer, layers_of
from ..layers.linear import SensiLinear
from ..layers.marks import plan_mark
from ..layers.slices import Slice, kept_parts
from ..layers.whole_modules import saved_modules
from ..planning.plan import Plan
from ..planning.refit import Refitted
from ..utils import distributed, replicas
from ..utils.errors import SensiError, SensiLoadError
from ..utils.undo import snapshot, surely
from .carry import Before, carry_over, noted
from .config import SensiConfig
from .latencies import exceeds, may_exceed, note_latency
from .slicing import Slices, config_after, slices_of
from .stale import mark_stale, unmark_stale
from .targets import plan_of


logger = logging.getLogger(__name__)

# In evaluation mode, PyTorch's own encoder runs a kernel for a whole block, or for all blocks. The kernel takes the
# weights of the Linears and does not call them. It is not used if these attributes are 0.
_SHORTCUTS = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu"),
    (nn.TransformerEncoder, "use_nested_tensor"),
)


def wrap_module(
    model: nn.Module,
    name: str,
    adapter_name: str,
    slice_: Slice,
    group: Group,
    config: SensiConfig,
    refitted: Pair | None = None,
    kept: Mapping[str, torch.Tensor] | None = None,
) -> SensiLinear | SensiEmbedding:
    """Sets up a slice for this adapter on the module called `name`. A plain Linear or embedding is replaced first.

    `refitted` and `kept` are values that the adapter starts from (see `SensiLayer.update_layer`).
    """
    layer: Any = model.get_submodule(name)
    if not isinstance(layer, SensiLinear | SensiEmbedding):
        if not (is_plain(layer) or is_plain_embedding(layer)):
            raise not_linear(name, layer)
        layer = (SensiLinear if is_plain(layer) else SensiEmbedding)(layer, adapter_name)
        # The search ends at the first one: this runs for each Linear of the model.
        if (other := next((m for m in model.modules() if isinstance(m, SensiLayer)), None)) is not None:
            layer._active_adapter, layer._disable_adapters = other._active_adapter, other._disable_adapters
            layer.sensi_saved_modules = other.sensi_saved_modules
        layer.sensi_shortcuts = _close_shortcuts(model, name)
        move_hooks(layer.get_base_layer(), layer)
        replace_module(model, name, layer)
    # For another adapter, the Linear may be a single matrix outside of any block (`granularity="tensor"`).
    layer.sensi_in_block |= group.in_block
    if group.output == name and group.attributes:
        layer.sensi_attributes = [_attribute_of(model, path, n * group.size) for path, n in group.attributes]
    layer.update_layer(adapter_name, slice_, refitted, config.init_weights, config.inference_mode, kept)
    if config.from_file:
        layer.sensi_unchecked.add(adapter_name)
    return layer


def _attribute_of(model: nn.Module, path: str, whole: int) -> tuple[nn.Module, str, int]:
    """The module and the name of an attribute that counts units, and its value if no unit is trimmed."""
    parent, _, attribute = path.rpartition(".")
    owner = model.get_submodule(parent)
    if type(getattr(owner, attribute)) is not int:  # a layout from a file could name any attribute
        raise SensiLoadError(f"`blocks` names {path!r} as a number of units, but it is no integer here.")
    return owner, attribute, whole


def _close_shortcuts(model: nn.Module, name: str) -> list[tuple[nn.Module, str, Any]]:
    parts = name.split(".")
    closed: list[tuple[nn.Module, str, Any]] = []
    for module in (model.get_submodule(".".join(parts[:i])) for i in range(len(parts))):
        for kind, attribute in _SHORTCUTS:
            if isinstance(module, kind) and (value := getattr(module, attribute, 0)):
                closed.append((module, attribute, value))
                setattr(module, attribute, 0)
    return closed


def release(layer: SensiLayer, base: nn.Module) -> None:
    """Undoes what `wrap_module` has done beside the layer itself, before `base` takes the place of the layer."""
    move_hooks(layer, base)
    for module, attribute, value in layer.sensi_shortcuts:
        setattr(module, attribute, value)


def note_plan(model: nn.Module, config: SensiConfig, adapter_name: str) -> None:
    """Tells the layers of an adapter its plan, which a plain state dict then carries (see `layers.marks`)."""
    mark = plan_mark(config.plan)
    for layer in layers_of(model, adapter_name).values():
        layer.sensi_plans[adapter_name] = mark
        note_integers(layer)


def root_of(model: nn.Module) -> nn.Module:
    """The user's own model. The names of groups and modules are paths in it."""
    return model.base_model.model if isinstance(model, PeftModel) else model  # type: ignore[return-value]


def wrap_head(model: nn.Module, heads: list[str], adapter_name: str, inference_mode: bool, active: bool) -> None:
    """Wraps the task head as PEFT does for `modules_to_save`, but only the modules with exactly these paths.

    PEFT itself wraps every module whose path ends with a name: a head called `out` would bring in all dropouts.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for name in heads:
        module = model.get_submodule(name)
        if isinstance(module, ModulesToSaveWrapper):
            module.update(adapter_name)
            module.set_adapter(module.active_adapter, inference_mode=inference_mode)
        else:
            wrapper = ModulesToSaveWrapper(module, adapter_name)
            wrapper.set_adapter(adapter_name if active else [], inference_mode=inference_mode)
            replace_module(model, name, wrapper)
    for parameter, requires_grad in flags:  # an adapter that is added changes no other
        parameter.requires_grad_(requires_grad)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


@contextmanager
def replanned(
    model: nn.Module, config: SensiConfig, adapter_name: str, plan: dict[str, Any], gated: bool
) -> Iterator[None]:
    """Gives an adapter the plan of a checkpoint that is being loaded; its values start afresh.

    `gated` says whether the checkpoint has gates, which means that its cuts are not finished. If the block raises, the
    adapter has its old plan and values again.
    """
    root = root_of(model)
    layers = layers_of(root, adapter_name).values()
    if any(replicas.is_sharded(layer) or layer.sensi_base_dropped for layer in layers):
        raise SensiLoadError(
            "The checkpoint was trained under another plan than the one that this model was wrapped with. A sharded "
            "model, or one without its base, cannot change its plan. Wrap the model with `SensiConfig(plan=...)` of "
            "the checkpoint."
        )
    before = plan_of(root, config)
    with _rebuilding(root, config, adapter_name):
        config.plan = plan
        found = plan_of(root, config)
        if gated and config.past_cuts is not None:  # from before the cut
            config.schedule, config.past_cuts = config.past_cuts, None
        elif not gated and config.phase == "cut" and (found.trims or not exceeds(found, config)):  # from after the cut
            if exceeds(found, config):  # such as times that were measured again
                warnings.warn(
                    "The checkpoint keeps more units than the budget of this model allows. The model follows the "
                    "checkpoint, and no more units are cut.",
                    stacklevel=2,
                )
            config.past_cuts = config.schedule
            _follow(config, config_after(config, found))
        elif not gated and found.kept_params > before.kept_params and may_exceed(found, config):
            warnings.warn(
                f"The checkpoint keeps {found.params_share:.1%} of the heads' and neurons' parameters, and the model "
                f"had {before.params_share:.1%}, for example after a `trim`. The model follows the checkpoint, so it "
                f"is larger now. Call `trim` again, or resume from a checkpoint that was saved after it.",
                stacklevel=2,
            )
        if gated != (config.phase == "cut"):
            raise SensiLoadError(
                "The checkpoint is from before the cut of its schedule, and the model has no schedule with a cut. "
                "Wrap the model with the same `schedule`."
                if gated
                else "The model has a schedule of cuts, and the checkpoint is of a training without one. Wrap the "
                "model without `schedule`, and call `trim` after the training."
            )
        note_latency(config, found)
        _rebuild(root, config, adapter_name, slices_of(root, config, found))
        yield
    logger.info("The checkpoint has another plan than this model was wrapped with: the layers follow the checkpoint.")


def shrink(
    model: nn.Module,
    config: SensiConfig,
    adapter_name: str,
    plan: Plan,
    refitted: Refitted | None = None,
    optimizer: Any = None,
) -> None:
    """Removes the units that `plan` trims from an adapter, and keeps all other trained values.

    `refitted` are changes of weights and biases (see `in_place.refit_changes`). With an `optimizer`, its parameters
    stay the same objects and keep their state (see `carry.obstacle` for the optimizers that this works with).
    Otherwise the parameters are new objects, and older optimizers are refused. Of the processes of
    `distributed.synchronized`, all remove the units or none does.
    """
    root = root_of(model)
    with _rebuilding(root, config, adapter_name, optimizer):
        _follow(config, config_after(config, plan))
        note_latency(config, plan)
        _rebuild(root, config, adapter_name, slices_of(root, config, plan), keep_values=True, refitted=refitted)
        distributed.gather("removing units")


def _follow(config: SensiConfig, other: SensiConfig) -> None:
    """Takes the fields that say what an adapter consists of from another config."""
    config.plan, config.schedule, config.also_train = other.plan, other.schedule, other.also_train
    config.past_cuts, config.latency = other.past_cuts, other.latency


def _rebuild(
    root: nn.Module,
    config: SensiConfig,
    adapter_name: str,
    slices: Slices,
    keep_values: bool = False,
    refitted: Refitted | None = None,
) -> None:
    """Replaces the slices of an adapter by others.

    With `keep_values`, values of units that stay are kept; the changes in `refitted` are added to them.
    """
    layers = layers_of(root, adapter_name)
    for name in layers.keys() - slices.keys():
        layers[name].discard_parts(adapter_name)
    for name, (slice_, group) in slices.items():
        layer = layers.get(name)
        values: dict[str, torch.Tensor] = {}
        if keep_values and layer is not None:
            values = kept_parts(layer.own_parts(adapter_name), layer.sensi_slices[adapter_name], slice_)
        for part, change in zip(("weight", "bias"), (refitted or {}).get(name, ()), strict=False):
            if change is not None and change.numel():  # a removed sublayer has no columns
                values[part] = values[part] + change.to(values[part])
        if layer is not None and layer.sensi_base_dropped:
            layer.reduce_base(adapter_name, slice_)
        rebuilt = wrap_module(root, name, adapter_name, slice_, group, config, kept=values)
        if layer is None:
            rebuilt.train(rebuilt.get_base_layer().training)


def check_unmerged(model: nn.Module, what_follows: str) -> None:
    """Raises `SensiError` if an adapter is merged: the weights of the base are not its own then."""
    if any(layer.merged for layer in layers_of(model).values()):
        raise SensiError(f"An adapter is merged. Call `unmerge_adapter()` before {what_follows}.")


@contextmanager
def _rebuilding(root: nn.Module, config: SensiConfig, adapter_name: str, optimizer: Any = None) -> Iterator[None]:
    """Inside the block, the layers of one adapter may be rebuilt.

    Afterwards the same adapters are active, and the same tensors require gradients. Tensors that did not exist before
    require gradients if the adapter's other tensors did. The `optimizer` follows (see `carry.carry_over`), and others
    that hold lost parameters are refused. If this fails or is interrupted, adapter and optimizer are as before.
    """
    check_unmerged(root, "the plan of an adapter is changed")
    fields = copy.copy(config)
    own = layers_of(root, adapter_name)
    before: Before = {n: (layer.sensi_slices[adapter_name], layer.own_parts(adapter_name)) for n, layer in own.items()}
    put_back, put_optimizer_back = snapshot(root), None if optimizer is None else noted(optimizer, before)
    flags = {(n, part): p.requires_grad for n, (_, parts) in before.items() for part, p in parts.items()}
    trained = any(flags.values()) or not flags

    def restore() -> None:
        if put_optimizer_back is not None:
            put_optimizer_back()
        put_back()
        _follow(config, fields)
        unmark_stale(p for _, parts in before.values() for p in parts.values())

    try:
        yield
        note_plan(root, config, adapter_name)
        now = layers_of(root, adapter_name)
        for name, layer in now.items():
            for part, parameter in layer.own_parts(adapter_name).items():
                parameter.requires_grad_(flags.get((name, part), parameter.requires_grad and trained))
        if optimizer is not None:
            carry_over(optimizer, before, now, adapter_name)
        there = {id(parameter) for layer in now.values() for parameter in layer.own_parts(adapter_name).values()}
        mark_stale(p for _, parts in before.values() for p in parts.values() if id(p) not in there)
    except BaseException:
        surely(restore)
        raise


def drop_base(model: nn.Module, adapter_name: str) -> None:
    """Frees what an adapter does not need of the base: values of Linears, and originals of modules saved whole."""
    for layer in layers_of(model, adapter_name).values():
        layer.drop_base(adapter_name)
    for wrapper in saved_modules(model, adapter_name).values():
        for module in wrapper.original_module.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.new_empty(0), requires_grad=False)


def copy_saved_modules(model: nn.Module, source: str, adapter_name: str) -> None:
    """Copies the values of modules that are saved whole from the adapter `source` to another one."""
    for wrapper in saved_modules(model, adapter_name).values():
        own = wrapper.modules_to_save[adapter_name]
        if source in wrapper.modules_to_save and not any(parameter.is_meta for parameter in own.parameters()):
            own.load_state_dict(wrapper.modules_to_save[source].state_dict())


def set_head(model: nn.Module, adapter_name: str, head: dict[str, torch.Tensor]) -> None:
    """Starts the adapter's copy of the task head from `head`: parameters by name. The base's own head stays."""
    wrappers = saved_modules(model, adapter_name)
    with torch.no_grad():
        for name, value in head.items():
            top = next((path for path in wrappers if name.startswith(f"{path}.")), "")
            rest = name.removeprefix(f"{top}.")
            if (wrapper := wrappers.get(top)) is not None:
                own = dict(wrapper.modules_to_save[adapter_name].named_parameters())
                if (parameter := own.get(rest)) is None or parameter.shape != value.shape:
                    found = "no such parameter" if parameter is None else tuple(parameter.shape)
                    raise SensiError(
                        f"The scores hold a task head with {name!r} of shape {tuple(value.shape)}; this model has "
                        f"{found}. Score this model, or use the model that was scored."
                    )
                if not parameter.is_meta:
                    parameter.copy_(value)
