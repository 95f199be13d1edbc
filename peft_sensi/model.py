"""The tuner: plans an adapter, replaces the Linears it concerns, and keeps PEFT's contract."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from .anatomy import Anatomy, Group, base_of, build_anatomy, is_base_parameter, nothing_to_trim, task_head
from .budget import Budget
from .calibration import materialise, preserved
from .checkpoint import PLAN_KEY, check_fingerprint, check_tensors, fingerprint, plan_from_tensor, plan_to_tensor
from .config import SensiConfig
from .errors import SensiError, SensiLoadError
from .layer import SensiLayer, SensiLinear, Slice, base_is_dropped
from .plan import FROZEN, TUNED, Plan, make_plan
from .refit import Refitted, refit
from .scores import Scores, score_units


logger = logging.getLogger(__name__)


class SensiModel(BaseTuner):
    """Tunes, freezes or trims every unit of a pretrained model under a budget.

    Args:
        model ([`torch.nn.Module`]): The model to be adapted.
        config ([`SensiConfig`]): The configuration.
        adapter_name (`str`): The name of the adapter, `"default"` by default.

    Example:

        ```py
        >>> from peft import get_peft_model
        >>> from peft_sensi import SensiConfig
        >>> model = get_peft_model(base, SensiConfig(budget=0.5, calibration=batches, task_type="SEQ_CLS"))
        >>> print(model.base_model.plan())
        ```
    """

    prefix = "sensi_"
    tuner_layer_cls = SensiLayer
    target_module_mapping: dict[str, list[str]] = {}

    def plan(self, adapter_name: str = "default") -> Plan:
        """The plan of an adapter: which units it tunes, keeps and trims, and what that costs."""
        if adapter_name not in self.peft_config:
            raise SensiError(f"There is no adapter {adapter_name!r}; there are {sorted(self.peft_config)}.")
        config = self.peft_config[adapter_name]
        return Plan.from_dict(config.plan, self._sensi_anatomies[adapter_name], _targets(self.model, config))

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        given = self.peft_config[adapter_name]
        if any(m.sensi_base_dropped for m in model.modules() if isinstance(m, SensiLayer)):
            raise base_is_dropped("add another adapter")
        if any(m.merged for m in model.modules() if isinstance(m, SensiLayer)):
            raise SensiError("An adapter is merged into the base. Call `unmerge_adapter()` before another one is added.")
        # PEFT does not copy configs: without an own copy, the plan of this model would end in the user's object.
        config = self.peft_config[adapter_name] = given.own_copy()
        flags = [(p, p.requires_grad) for p in model.parameters()]
        try:
            refitted, head = self._prepare(model, adapter_name, given, config)
            self._sensi_injecting = (config, adapter_name, refitted)
            # The plan decides which modules are replaced, so a state dict has nothing to add.
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict=None)
        except BaseException:
            self._roll_back(model, adapter_name, flags)
            raise
        finally:
            self._sensi_injecting = None
        _set_head(model, adapter_name, head)
        if not config.keep_base:
            for module in model.modules():
                if isinstance(module, SensiLayer) and adapter_name in module.sensi_slices:
                    module.drop_base(adapter_name)

    # The base as it was when each adapter came: merging and `keep_base=False` change the shapes that can be seen later.
    _sensi_anatomies: dict[str, Anatomy] = {}

    # The config, adapter name and refitted values of the injection in progress.
    _sensi_injecting: tuple[SensiConfig, str, Refitted] | None = None

    def _prepare(
        self, model: nn.Module, adapter_name: str, given: SensiConfig, config: SensiConfig
    ) -> tuple[Refitted, dict[str, torch.Tensor]]:
        """Everything that is decided before a module is replaced. Fills in `config`; leaves the model as it was."""
        blocks = build_anatomy(model, (), config.layouts())
        if config.target_modules is None:
            names = {module for group in blocks.groups for module in group.modules}
            config.target_modules = names or "all-linear"
        saved = list(config.modules_to_save or [])
        config.modules_to_save = list(dict.fromkeys([*saved, *task_head(model)])) or None
        _maybe_include_all_linear_layers(config, model)
        targets = _targets(model, config)
        if not targets:
            config.plan = {"groups": {}}
            return {}, {}  # PEFT raises its own error for that
        if config.also_train is None:
            free = given.plan is None and given.limits.trainable is None and bool(blocks.groups)
            config.also_train = ["biases", "norms", "pooler"] if free else []
        extra = _also_saved(model, blocks, config.also_train)
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *extra])) or None
        targets = _targets(model, config)
        anatomy = build_anatomy(model, targets, config.layouts())
        self._sensi_anatomies = {**self._sensi_anatomies, adapter_name: anatomy}
        if config.plan is not None:
            if config.fingerprint is not None:
                check_fingerprint(config.fingerprint, model, anatomy)
            Plan.from_dict(config.plan, anatomy, targets)
            refitted: Refitted = {}
            head: dict[str, torch.Tensor] = {}
        else:
            biases = _bias_values(model, anatomy, targets) if "biases" in config.also_train else 0
            always = biases + sum(p.numel() for name in extra for p in base_of(model.get_submodule(name)).parameters())
            with self._others_disabled(model), preserved(model):
                plan, refitted, head = _decide(model, given, anatomy, targets, always)
            config.plan = plan.to_dict()
            logger.info("%s", plan.line())
        config.fingerprint = fingerprint(model, anatomy) or config.fingerprint
        return refitted, head

    @contextmanager
    def _others_disabled(self, model: nn.Module) -> Iterator[None]:
        """A second adapter is scored on the base, not on what other adapters make of it."""
        wrapped = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
        enabled = [m for m in wrapped if not m.disable_adapters]
        flags = [(p, p.requires_grad) for p in model.parameters()]
        for module in enabled:
            module.enable_adapters(False)
        try:
            yield
        finally:
            for module in enabled:
                module.enable_adapters(True)
            # Enabling makes the active adapters trainable, also those that were loaded for inference, and no others.
            for parameter, requires_grad in flags:
                parameter.requires_grad_(requires_grad)

    def _roll_back(self, model: nn.Module, adapter_name: str, flags: list[tuple[nn.Parameter, bool]]) -> None:
        for name, module in list(model.named_modules()):
            if isinstance(module, SensiLayer) and adapter_name in module.sensi_slices:
                module.delete_adapter(adapter_name)
                if not module.sensi_slices:
                    _replace(model, name, module.get_base_layer())
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
        self.peft_config.pop(adapter_name, None)

    def _prepare_adapter_config(self, peft_config: SensiConfig, model_config: dict) -> SensiConfig:
        return peft_config  # `_prepare` has chosen the targets

    def _check_target_module_exists(self, peft_config: SensiConfig, key: str) -> Any:  # type: ignore[override]
        if self._sensi_injecting is not None and self._sensi_pieces():
            return key in self._sensi_pieces()
        return check_target_module_exists(peft_config, key)

    def _sensi_pieces(self) -> dict[str, tuple[Slice, Group]]:
        assert self._sensi_injecting is not None
        config, adapter_name, _ = self._sensi_injecting
        if not config.plan["groups"]:
            return {}
        cached = self.__dict__.get("_sensi_piece_cache")
        if cached is None or cached[0] is not config.plan:
            cached = self.__dict__["_sensi_piece_cache"] = (config.plan, pieces_of(self.model, config))
        return cached[1]

    def _create_and_replace(
        self,
        sensi_config: SensiConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert self._sensi_injecting is not None
        piece, group = self._sensi_pieces()[current_key]
        refitted = self._sensi_injecting[2].get(current_key)
        layer = _wrap(self.model, current_key, adapter_name, piece, group, sensi_config, refitted)
        if adapter_name not in self.active_adapters:
            for parameters in (layer.sensi_weight, layer.sensi_bias):
                if adapter_name in parameters:
                    parameters[adapter_name].requires_grad_(False)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # Trained values are float32 from the start; PEFT's version would re-wrap them and set `requires_grad`.
        return

    # -- several adapters, merging ------------------------------------------------------------------------------------

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        if isinstance(adapter_name, (list, tuple)) and len(adapter_name) > 1:
            self._check_combination(list(adapter_name))
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._check_combination(adapter_names or self.active_adapters)
        super().merge_adapter(adapter_names, safe_merge=safe_merge)

    def disable_adapter_layers(self) -> None:
        self._check_base("disable the adapter")
        super().disable_adapter_layers()

    def delete_adapter(self, adapter_name: str) -> None:
        self._check_base("delete the adapter")
        super().delete_adapter(adapter_name)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if merge:
            self._check_combination(kwargs.get("adapter_names") or self.active_adapters)
        else:
            self._check_base("unload the adapter")
            for layer in self._layers():
                if not layer.merged:
                    layer.set_adapter([])  # parents get the base's numbers of heads back
        return super()._unload_and_optionally_merge(merge, *args, **kwargs)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, AuxiliaryTrainingWrapper):
            # PEFT's version copies `weight`, which heads and poolers made of several modules do not have.
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _layers(self) -> list[SensiLayer]:
        return [m for m in self.model.modules() if isinstance(m, SensiLayer)]

    def _check_combination(self, adapter_names: list[str]) -> None:
        if len(adapter_names) > 1:
            for layer in self._layers():
                layer.check_combination(adapter_names)

    def _check_base(self, action: str) -> None:
        if any(layer.sensi_base_dropped for layer in self._layers()):
            raise base_is_dropped(action)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise SensiError("`adapter_names` in forward is not supported: a batch goes through one adapter.")
        yield

    # -- state dicts --------------------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: SensiConfig, adapter_name: str, state_dict: dict, unwanted_adapter_names: list
    ) -> dict[str, torch.Tensor]:
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        prefix = "base_model.model." if isinstance(model, PeftModel) else ""
        tensors[prefix + PLAN_KEY] = plan_to_tensor(config.plan)
        return tensors

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SensiConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        state_dict = dict(state_dict)
        stored = [state_dict.pop(key) for key in list(state_dict) if key.rpartition(".")[2] == PLAN_KEY]
        if len(stored) != 1:
            raise SensiLoadError(f"The adapter file must hold one {PLAN_KEY!r}, found {len(stored)}: it is not ours.")
        plan = plan_from_tensor(stored[0])
        if plan != config.plan:
            if config.from_file:
                raise SensiLoadError(
                    "adapter_config.json and adapter_model.safetensors hold different plans: they do not belong together "
                    "(a save may have been interrupted between them)."
                )
            _replan(model, config, adapter_name, plan)
        tensors = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        expected = {
            key: value
            for key, value in model.state_dict().items()
            if key.endswith(f".{adapter_name}") and key.split(".")[-2] in SensiLayer.adapter_layer_names
        }
        # Only parameters: a module of the base, and what is below it, may also be called `sensi_...`.
        ours = {k: v for k, v in tensors.items() if k in expected or f".{k}".split(".")[-2].startswith("sensi_")}
        check_tensors(ours, expected)
        return tensors


def _decide(
    model: nn.Module, given: SensiConfig, anatomy: Anatomy, targets: frozenset[str], always_trained: int
) -> tuple[Plan, Refitted, dict[str, torch.Tensor]]:
    """Scores, plan and refit; to be called inside `preserved`."""
    limits = given.limits
    if given.budget is None:
        if anatomy.trimmable:
            limits = Budget(params=0.5)
        else:
            warnings.warn("No budget was given and the model has nothing to trim: all targeted modules are tuned whole.")
    elif limits.trims and not anatomy.trimmable:
        raise nothing_to_trim(model)
    batches = None
    if given.calibration is not None:
        batches = materialise(given.calibration, max(given.calibration_steps, given.priming_steps))
    scores = given.scores
    if scores is None and (limits.trims or limits.trainable is not None):
        scores = score_units(
            model,
            anatomy,
            batches,
            score=given.score,
            calibration_steps=given.calibration_steps,
            priming_steps=given.priming_steps,
            priming_lr=given.priming_lr,
            loss_fn=given.loss_fn,
            seed=given.seed,
            progress=True,
        )
    if scores is None:
        scores = Scores({g.name: torch.zeros(g.size) for g in anatomy.groups}, "none")
        limits = Budget()
    plan = make_plan(
        anatomy,
        {name: values.numpy() for name, values in scores.values.items()},
        limits if limits != Budget() else None,
        targets=targets,
        protected={name: mask.numpy() for name, mask in scores.protected.items()},
        sequence_length=given.sequence_length or scores.sequence_length or 128,
        multiple_of=given.multiple_of,
        min_units=given.min_units,
        always_trained=always_trained,
    )
    wanted = given.refit if given.refit is not None else limits.trainable is None
    refitted: Refitted = {}
    if wanted and batches is not None and plan.trims:
        model.eval()
        refitted = refit(model, plan, batches[: given.calibration_steps], given.loss_fn)
    return plan, refitted, scores.head


def _targets(model: nn.Module, config: SensiConfig) -> frozenset[str]:
    """Names of the modules that may be tuned: PEFT's own matching, adapter internals left out."""
    inside = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, BaseTunerLayer) and name)
    return frozenset(
        name
        for name, _ in model.named_modules()
        if name and not name.startswith(inside) and check_target_module_exists(config, name)
    )


def _also_saved(model: nn.Module, blocks: Anatomy, also_train: list[str]) -> list[str]:
    """Modules of the base that are trained whole beside the blocks, to be saved through PEFT's `modules_to_save`."""
    layers = tuple(dict.fromkeys(f"{g.layer}." for g in blocks.groups if g.layer))
    names = [n for n, _ in model.named_modules() if is_base_parameter(n) and "original_module" not in n.split(".")]
    found = []
    if "norms" in also_train:
        found += [n for n in names if n.startswith(layers) and _is_norm(base_of(model.get_submodule(n)))]
    if "pooler" in also_train and task_head(model):
        pooler = f"{model.base_model_prefix}.pooler"
        found += [n for n in names if n == pooler and any(True for _ in model.get_submodule(n).parameters())]
    if "embeddings" in also_train:
        output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        embeddings = [n for n in names if isinstance(base_of(model.get_submodule(n)), nn.Embedding)]
        if output is not None and any(base_of(model.get_submodule(n)).weight is output.weight for n in embeddings):
            raise SensiError("The embeddings are tied to the output layer and cannot be trained separately.")
        parents = {n.rpartition(".")[0] for n in embeddings}
        found += embeddings
        found += [
            n for n in names if n.rpartition(".")[0] in parents and _is_norm(base_of(model.get_submodule(n)))
        ]  # fmt: skip
    return list(dict.fromkeys(found))


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and any(True for _ in module.parameters(recurse=False))


def _has_trained_bias(model: nn.Module, group: Group, targets: frozenset[str]) -> bool:
    return group.trimmable and group.output in targets and base_of(model.get_submodule(group.output)).bias is not None


def _bias_values(model: nn.Module, anatomy: Anatomy, targets: frozenset[str]) -> int:
    return sum(
        base_of(model.get_submodule(g.output)).out_features
        for g in anatomy.groups
        if _has_trained_bias(model, g, targets)
    )


def pieces_of(model: nn.Module, config: SensiConfig) -> dict[str, tuple[Slice, Group]]:
    """For each module that the config's plan concerns: its slice and its group."""
    targets = _targets(model, config)
    plan = Plan.from_dict(config.plan, build_anatomy(model, targets, config.layouts()), targets)
    pieces = {}
    for group in plan.anatomy.groups:
        states = plan.of(group)
        tuned, frozen = np.flatnonzero(states == TUNED), np.flatnonzero(states == FROZEN)
        biases = "biases" in (config.also_train or ()) and _has_trained_bias(model, group, targets)
        for module in group.modules:
            sides = [side for side in group.sides if side.module == module]
            piece = _slice(model, group, sides, tuned, frozen, module in targets, biases and module == group.output)
            if piece.tuned_count or piece.train_bias or not piece.natural:
                pieces[module] = (piece, group)
    return pieces


def _slice(
    model: nn.Module, group: Group, sides: list, tuned: np.ndarray, frozen: np.ndarray, targeted: bool, bias: bool
) -> Slice:
    weight = base_of(model.get_submodule(sides[0].module)).weight
    units = np.concatenate([tuned, frozen]) if group.trimmable else np.sort(np.concatenate([tuned, frozen]))
    kept = np.concatenate([side.positions(units) for side in sides])
    is_tuned = np.concatenate([np.repeat(np.isin(units, tuned), side.width) for side in sides]) & targeted
    count = int(is_tuned.sum())
    prefix = bool(is_tuned[:count].all())
    return Slice(
        dim=sides[0].dim,
        size=weight.shape[sides[0].dim],
        kept=torch.from_numpy(kept),
        tuned=count if prefix else torch.from_numpy(np.flatnonzero(is_tuned)),
        units=len(units),
        train_bias=bias,
    )


def _wrap(
    model: nn.Module,
    name: str,
    adapter_name: str,
    piece: Slice,
    group: Group,
    config: SensiConfig,
    refitted: tuple[torch.Tensor, torch.Tensor | None] | None = None,
) -> SensiLinear:
    """Gives the module called `name` a slice for this adapter, replacing a plain Linear first."""
    layer = model.get_submodule(name)
    if not isinstance(layer, SensiLinear):
        if type(layer) not in (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
            raise TypeError(f"Target module {layer} is not supported: only `torch.nn.Linear` can be targeted.")
        layer = SensiLinear(layer, adapter_name)
        if group.output == name:
            layer.sensi_units = group.size
            layer.sensi_attributes = [
                (model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], per_unit)
                for path, per_unit in group.attributes
            ]
        _replace(model, name, layer)
    layer.update_layer(adapter_name, piece, refitted, config.init_weights, config.inference_mode)
    return layer


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _replan(model: nn.Module, config: SensiConfig, adapter_name: str, plan: dict[str, Any]) -> None:
    """Gives an adapter in place another plan, because the checkpoint that is being loaded was trained under it."""
    root = model.base_model.model if isinstance(model, PeftModel) else model
    layers = {n: m for n, m in root.named_modules() if isinstance(m, SensiLayer) and adapter_name in m.sensi_slices}
    sharded = any(type(p) is not nn.Parameter for m in layers.values() for p in m.parameters())
    if sharded or any(m.sensi_base_dropped for m in layers.values()):
        raise SensiLoadError(
            "The checkpoint was trained under another plan than the one that this model was wrapped with, and a sharded "
            "model or one without its base cannot change it. Wrap the model with `SensiConfig(plan=...)` of the checkpoint."
        )
    config.plan = plan
    pieces = pieces_of(root, config)
    for name, layer in layers.items():
        if name not in pieces:
            layer.delete_adapter(adapter_name)
    for name, (piece, group) in pieces.items():
        _wrap(root, name, adapter_name, piece, group, config)
    logger.info("The checkpoint has another plan than this model was wrapped with: the layers follow the checkpoint.")




def _set_head(model: nn.Module, adapter_name: str, head: dict[str, torch.Tensor]) -> None:
    """Starts the adapter's copy of the task head from what priming taught it; the base's own head stays as it is."""
    with torch.no_grad():
        for name, value in head.items():
            top, _, rest = name.partition(".")
            wrapper = model.get_submodule(top)
            if isinstance(wrapper, ModulesToSaveWrapper) and adapter_name in wrapper.modules_to_save:
                parameter = wrapper.modules_to_save[adapter_name].get_parameter(rest)
                if not parameter.is_meta:
                    parameter.copy_(value)
