"""The tuner: plans an adapter, replaces the Linears it concerns, and keeps PEFT's contract."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from ..anatomy.linears import is_quantized, not_mergeable
from ..anatomy.units import Anatomy, Group
from ..anatomy.widths import note_widths
from ..layers.compression import KINDS
from ..layers.layer import SensiLayer, base_is_dropped, new_parameters_are_empty
from ..layers.slices import Slice
from ..planning.plan import Plan
from ..planning.refit import Refitted
from ..scoring.scores import Scores
from ..utils import distributed, replicas
from ..utils.errors import SensiError
from .checkpoint import PLAN_KEY, check_pair, config_mark, plan_from_tensor, plan_to_tensor, pop_plan
from .config import SensiConfig
from .decision import Decision, prepare
from .loading import check_saved_modules, check_slices, check_state, errors_of_file, file_to_check
from .slicing import slices_of
from .targets import targets_of
from .wrapping import drop_originals, replace_module, replanned, set_head, wrap_module


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
    peft_config: dict[str, SensiConfig]  # type: ignore[assignment]
    model: nn.Module

    def plan(self, adapter_name: str = "default") -> Plan:
        """The plan of an adapter: which units it tunes, keeps and trims, and what that costs."""
        if adapter_name not in self.peft_config:
            raise SensiError(f"There is no adapter {adapter_name!r}; there are {sorted(self.peft_config)}.")
        config, anatomy = self.peft_config[adapter_name], self._sensi_anatomies[adapter_name]
        return Plan.from_dict(config.plan, anatomy, targets_of(self.model, config))

    def explain(self, adapter_name: str = "default") -> str:
        """Why the plan is what it is: the groups by their scores. Raises `SensiError` for an adapter from a file."""
        scores = self._sensi_scores.get(adapter_name)
        if scores is None:
            raise SensiError(f"The scores of {adapter_name!r} are not known: they are not stored with an adapter.")
        values = {name: value.numpy() for name, value in scores.values.items()}
        return f"scored by {scores.method}\n{self.plan(adapter_name).explain(values)}"

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        given = self.peft_config[adapter_name]
        if not adapter_name or "." in adapter_name or hasattr(nn.ModuleDict(), adapter_name):
            raise SensiError(
                f"An adapter cannot be called {adapter_name!r}: torch keeps it under its name in modules, so the name "
                f"must not be empty, contain a dot, or be one of their own attributes."
            )
        if any(m.sensi_base_dropped for m in model.modules() if isinstance(m, SensiLayer)):
            raise base_is_dropped("add another adapter")
        others = sorted({name for layer in self._layers() for name in layer.sensi_slices} - {adapter_name})
        if not given.keep_base and others:
            raise SensiError(
                f"`keep_base=False` would drop what the adapters {others} stand on: delete them, or keep the base."
            )
        if given.compressed is not None and not given.inference_mode:
            raise SensiError(
                f"The adapter's values are compressed to {given.compressed}, so it can be used but not trained: load "
                f"it without `is_trainable`, or train from the checkpoint that was compressed."
            )
        if any(m.merged for m in model.modules() if isinstance(m, SensiLayer)):
            raise SensiError(
                "An adapter is merged into the base. Call `unmerge_adapter()` before another one is added."
            )
        replicas.check_not_partitioned(model)
        # PEFT does not copy configs: without an own copy, the plan of this model would end in the user's object.
        config = self.peft_config[adapter_name] = given.own_copy()
        if given.plan is None:
            config.from_file = False  # its plan is made here, so no file can contradict it
        flags = [(p, p.requires_grad) for p in model.parameters()]
        # A finished plan needs nobody else: one process may load an adapter while others do something different.
        joint = distributed.synchronized("wrapping the model") if given.plan is None else nullcontext()
        try:
            with joint, replicas.weights_from_rank_0(model, keep=True):
                with errors_of_file(given):
                    decision = prepare(model, given, config)
                    slices = {} if decision is None else slices_of(model, config, decision.plan)
                if (path := file_to_check(given)) is not None:
                    check_slices(path, model, slices)
                if decision is not None:
                    self._remember(adapter_name, decision)
                # Each layer takes its refitted values out, so that they are never there twice.
                self._sensi_injecting = (slices, {} if decision is None else decision.refitted)
                # The plan decides which modules are replaced, so a state dict has nothing to add.
                super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict=None)
                if path is not None:
                    check_saved_modules(path, model, adapter_name)
                if decision is not None:
                    set_head(model, adapter_name, decision.head)
                    replicas.check_launcher(any(slice_.has_integers for slice_, _ in slices.values()))
                if not low_cpu_mem_usage and not new_parameters_are_empty():
                    replicas.allocate_adapter(model)
                replicas.copy_weights_from_rank_0(model)  # some parts of an adapter start from random values
        except BaseException:
            self._roll_back(model, adapter_name, flags)
            raise
        finally:
            self._sensi_injecting = None
        companions = [m for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
        dropped = False
        for module in model.modules():
            if isinstance(module, SensiLayer):
                module.sensi_saved_modules = companions
                if not config.keep_base and adapter_name in module.sensi_slices:
                    module.drop_base(adapter_name)
                    dropped = True
        if dropped:
            drop_originals(model, adapter_name)

    # The base as it was when each adapter came: merging and `keep_base=False` change the shapes that can be seen
    # later.
    _sensi_anatomies: dict[str, Anatomy] = {}

    # What the plans of this process were made from.
    _sensi_scores: dict[str, Scores] = {}

    # Slices and refitted values of the injection in progress, by module.
    _sensi_injecting: tuple[dict[str, tuple[Slice, Group]], Refitted] | None = None

    def _remember(self, adapter_name: str, decision: Decision) -> None:
        self._sensi_anatomies = {**self._sensi_anatomies, adapter_name: decision.plan.anatomy}
        known = {name: scores for name, scores in self._sensi_scores.items() if name != adapter_name}
        if decision.scores is not None and decision.scores.method != "none":
            known[adapter_name] = decision.scores
        self._sensi_scores = known

    def _roll_back(self, model: nn.Module, adapter_name: str, flags: list[tuple[nn.Parameter, bool]]) -> None:
        for name, module in reversed(list(model.named_modules())):  # the innermost first: wrappers can be nested
            if isinstance(module, SensiLayer):
                if adapter_name in module.sensi_slices:
                    module.delete_adapter(adapter_name)
                if not module.sensi_slices:  # also the layer in whose setting up the error happened
                    replace_module(model, name, module.get_base_layer())
            elif isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
                module.delete_adapter(adapter_name, [a for a in self.active_adapters if a != adapter_name])
                if not module.modules_to_save:
                    replace_module(model, name, module.original_module)
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
        self.peft_config.pop(adapter_name, None)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> SensiConfig:
        return peft_config  # `prepare` has chosen the targets

    def _check_target_module_exists(self, peft_config: SensiConfig, key: str) -> Any:  # type: ignore[override]
        result = check_target_module_exists(peft_config, key)
        if self._sensi_injecting is not None and self._sensi_injecting[0]:
            # The plan decides; but PEFT warns when `exclude_modules` seems to exclude nothing.
            return key in self._sensi_injecting[0] or (result if isinstance(result, _ExcludedModule) else False)
        return result

    def _create_and_replace(
        self,
        sensi_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert self._sensi_injecting is not None
        slices, refitted = self._sensi_injecting
        slice_, group = slices[current_key]
        layer = wrap_module(
            self.model, current_key, adapter_name, slice_, group, sensi_config, refitted.pop(current_key, None)
        )
        if adapter_name not in self.active_adapters:
            layer.set_requires_grad(adapter_name, False)

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
        self._check_codes()
        if adapter_names and set(adapter_names) != set(self.active_adapters):
            wrappers = [m for m in self.model.modules() if isinstance(m, ModulesToSaveWrapper)]
            if any(name in m.modules_to_save for m in wrappers for name in adapter_names):
                raise SensiError(
                    f"Merging {list(adapter_names)} while {self.active_adapters} is active would leave the task head, "
                    f"norms and other modules that are saved whole those of the active adapter. Call "
                    f"`set_adapter` first."
                )
        super().merge_adapter(adapter_names, safe_merge=safe_merge)

    def disable_adapter_layers(self) -> None:
        self._check_base("disable the adapter")
        super().disable_adapter_layers()

    def delete_adapter(self, adapter_name: str) -> None:
        self._check_base("delete the adapter")
        others = [name for name in self.active_adapters if name != adapter_name]
        was_active = len(others) < len(self.active_adapters)
        super().delete_adapter(adapter_name)
        if was_active and self.peft_config and not any(layer.merged for layer in self._layers()):
            # Each layer has activated one of the adapters that it has, which can be different ones.
            self.set_adapter(others or min(self.peft_config))

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            self._check_codes()  # before anything is replaced
            names = kwargs.get("adapter_names") or self.active_adapters
            self._check_combination(names)
            if set(names) != set(self.active_adapters) and not any(layer.merged for layer in self._layers()):
                self.set_adapter(names if len(names) > 1 else names[0])  # PEFT merges its Linears and leaves its head
        else:
            self._check_base("unload the adapter")
            if not any(layer.merged for layer in self._layers()):
                for module in self.model.modules():
                    if isinstance(module, (SensiLayer, AuxiliaryTrainingWrapper)):
                        module.set_adapter([])  # parents get their numbers of heads back, and PEFT the base's own head
        trims = merge and any(p.trims for layer in self._layers() for p in layer.sensi_slices.values())
        model: Any = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        if trims:
            note_widths(model)  # so that its `save_pretrained` writes a config that tells the widths
        return model

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

    def _check_codes(self) -> None:
        if any(is_quantized(layer.get_base_layer()) for layer in self._layers()):
            raise not_mergeable()

    def _check_base(self, action: str) -> None:
        if any(layer.sensi_base_dropped for layer in self._layers()):
            raise base_is_dropped(action)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise SensiError("`adapter_names` in forward is not supported: a batch goes through one adapter.")
        if self.model.training and not self.sensi_schedule_is_stepped and not self._sensi_injecting:
            scheduled = [name for name in self.active_adapters if self.peft_config[name].schedule is not None]
            if scheduled and torch.is_grad_enabled():
                raise SensiError(
                    f"The adapter {scheduled[0]!r} has a schedule that nobody steps, so training would silently do "
                    f"without it. Give `SensiCallback()` to Trainer, or step a `Schedule` in your own loop."
                )
        yield

    # Set by `Schedule`, once somebody steps it.
    sensi_schedule_is_stepped = False

    def compress(self, kind: str, adapter_name: str = "default") -> None:
        """Turns the trained values of an adapter into a narrower form, in which it is then used, saved and merged.

        `"bfloat16"` and `"int8"` hold the differences from the base's values, with a scale for each tuned unit (see
        `compression`): 2 bytes, or little more than 1, instead of 4 for each value. `"bits"` is one bit for each
        weight of a learned mask. What PEFT saves whole (the task head, norms, embeddings) stays as it is. The adapter
        cannot be trained further: keep the checkpoint that you compress.

        Raises `SensiError` for a form that the adapter's update doesn't have, for an adapter that is compressed
        already, and while it is merged or without its base.
        """
        if adapter_name not in self.peft_config:
            raise SensiError(f"There is no adapter {adapter_name!r}; there are {sorted(self.peft_config)}.")
        config, layers = self.peft_config[adapter_name], self._layers()
        possible = ("bits",) if config.update == "mask" else tuple(KINDS)
        if kind not in possible:
            raise SensiError(
                f"compress({kind!r}) is not possible with update={config.update!r}: use {' or '.join(possible)} (only "
                f"masks have bits)."
            )
        if config.compressed is not None:
            raise SensiError(f"The adapter {adapter_name!r} is compressed already, to {config.compressed}.")
        if any(adapter_name in layer.merged_adapters for layer in layers):
            raise SensiError("The adapter is merged. Call `unmerge_adapter()` before it is compressed.")
        if kind == "bits":
            for layer in layers:
                layer.settle_mask(adapter_name)
        else:
            self._check_base("compress the adapter, which needs the differences from the base's values")
            for layer in layers:
                layer.compress(adapter_name, kind)
        config.compressed = kind

    # -- state dicts --------------------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict, unwanted_adapter_names: list
    ) -> dict[str, torch.Tensor]:
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        prefix = "base_model.model." if isinstance(model, PeftModel) else ""
        tensors[prefix + PLAN_KEY] = plan_to_tensor(config.plan, config_mark(config))
        return tensors

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        state_dict = dict(state_dict)
        stored = pop_plan(state_dict)
        if config.from_file:
            check_pair(stored, config)
        plan, _ = plan_from_tensor(stored)
        with nullcontext() if plan == config.plan else replanned(model, config, adapter_name, plan):
            tensors = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
            check_state(tensors, model, adapter_name)
        config.from_file = False  # from now on its values are trained here, and a checkpoint may bring another plan
        return tensors
