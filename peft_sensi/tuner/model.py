"""`SensiModel`, the tuner: it plans an adapter and replaces the modules that the plan concerns, as PEFT expects."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..anatomy.modules import unwrapped
from ..anatomy.task_heads import task_head
from ..anatomy.widths import note_widths
from ..layers.layer import SensiLayer, layers_of
from ..layers.marks import EXTRA, LAYER_MARK, check_marks, marks_to_tensor
from ..layers.plain_states import check_plain_state
from ..layers.whole_modules import activate, hold_masters
from ..utils import distributed, replicas
from ..utils.errors import SensiError
from ..utils.undo import undone_on_error
from . import loading, wrapping
from .admission import check_adapter_name_in_saved, check_addition
from .checkpoint import check_hidden, check_pair, described_by, plan_from_tensor, plan_key
from .config import SensiConfig
from .decision import Decision, prepare
from .operations import AdapterOperations
from .saving import check_collected, check_takes_values, completed
from .stale import check_wrapper
from .wrapping import copy_saved_modules, drop_base, note_plan, replanned, set_head, wrap_head, wrap_module


class SensiModel(AdapterOperations, BaseTuner):
    """Tunes, freezes or trims every unit of a pretrained model under a budget.

    Args:
        model ([`torch.nn.Module`]): The model to be adapted.
        peft_config ([`SensiConfig`]): The configuration, or a dict with one for each adapter's name.
        adapter_name (`str`): The name of the adapter, `"default"` by default.

    Example:

        ```py
        >>> from peft import get_peft_model
        >>> from peft_sensi import SensiConfig
        >>> model = get_peft_model(base, SensiConfig(budget=0.5, calibration=batches, task_type="SEQ_CLS"))
        >>> print(model.plan())
        ```
    """

    prefix = "sensi_"
    tuner_layer_cls = SensiLayer
    target_module_mapping: dict[str, list[str]] = {}
    peft_config: dict[str, SensiConfig]  # type: ignore[assignment]
    model: nn.Module

    # Like the attributes of `AdapterOperations`, these are set before PEFT's constructor has finished.
    # The decision that the injection in progress carries out.
    _sensi_decision: Decision | None = None
    # The adapter whose values the injection in progress starts from.
    _sensi_source: str | None = None
    # Adapters whose schedule is stepped by a `Schedule`.
    sensi_stepped: frozenset[str] = frozenset()

    def __getstate__(self) -> dict[str, Any]:
        # A copy is another model: its schedules are not stepped until it gets a `Schedule` of its own.
        return {**super().__getstate__(), "sensi_stepped": frozenset()}

    # -- wrapping -----------------------------------------------------------------------------------------------------

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        with undone_on_error(model):
            replicas.check_whole(model)  # before the wrapper that did it is removed
            super().__init__(self._inner(model, peft_config), peft_config, adapter_name, *args, **kwargs)

    @staticmethod
    def _inner(model: nn.Module, peft_config: Any) -> nn.Module:
        """The model that is adapted, without the wrappers of `torch.compile`, DataParallel and DDP around it."""
        inner = unwrapped(model)
        if inner is not model:
            warnings.warn(
                f"The adapter is put into the model inside of the {type(model).__name__}, and the wrapper itself is "
                f"left out. Compile or parallelize the model that PEFT returns.",
                stacklevel=2,
            )
            for config in peft_config.values() if isinstance(peft_config, dict) else [peft_config]:
                config.base_model_name_or_path = config.base_model_name_or_path or inner.__dict__.get("name_or_path")
        compiled = [name for name, _ in inner.named_modules() if name.endswith("._orig_mod")]
        if compiled:
            part = compiled[0].removesuffix("._orig_mod")
            raise SensiError(
                f"The module {part!r} was compiled on its own. This renames its parts, so an adapter of this model "
                f"would fit no other. Add the adapter before `torch.compile`, or use `model.{part}.compile()`."
            )
        return inner

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        try:
            with undone_on_error(self):
                self._inject(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        except BaseException:
            self.peft_config.pop(adapter_name, None)  # `PeftModel.add_adapter` has set it
            raise

    def _inject(
        self, model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool, low_cpu_mem_usage: bool
    ) -> None:
        users_config = self.peft_config[adapter_name]
        check_addition(model, adapter_name, users_config)
        # PEFT does not copy configs, so without a copy the plan of this model would end up in the user's object.
        config = self.peft_config[adapter_name] = users_config.own_copy()
        self._sensi_source = described_by(self.peft_config, users_config, adapter_name)
        file = loading.file_to_check(config)
        has_plan = config.plan is not None
        config.from_file = config.from_file and has_plan  # a plan that is made here contradicts no file
        # With a finished plan, one process may load an adapter while the others do something else.
        joint = nullcontext() if has_plan else distributed.synchronized("wrapping the model")
        try:
            with joint, replicas.weights_from_rank_0(model, keep=True):
                with loading.errors_of_file(users_config):
                    loading.check_task(model, config)
                    decision = prepare(model, config, users_config.inputs)
                    check_adapter_name_in_saved(model, config, adapter_name)
                if file is not None:
                    loading.check_slices(file, model, {} if decision is None else decision.slices)
                self._sensi_decision = decision
                saved, excluded, heads = config.modules_to_save, config.exclude_modules, task_head(model)
                heads = [name for name in heads if name in (saved or [])]
                if decision is not None:
                    config.modules_to_save = [name for name in saved or [] if name not in heads] or None
                    config.exclude_modules = None  # an excluded module is not tuned, but its units may be trimmed
                if not self.active_adapters:  # all others were deleted
                    self.active_adapter = adapter_name
                # The decision says which modules are replaced, so a state dict adds nothing.
                super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict=None)
                config.modules_to_save, config.exclude_modules = saved, excluded
                wrap_head(model, heads, adapter_name, config.inference_mode, adapter_name in self.active_adapters)
                hold_masters(model, adapter_name)
                if file is not None:
                    loading.check_saved_modules(file, model, adapter_name)
                if decision is not None:
                    note_plan(model, config, adapter_name)
                    self.sensi_stepped = self.sensi_stepped - {adapter_name}
                    self._sensi_anatomies = {**self._sensi_anatomies, adapter_name: decision.plan.anatomy}
                    self.note_scores(adapter_name, decision.scores)
                    set_head(model, adapter_name, decision.head)
                    if self._sensi_source is not None:
                        copy_saved_modules(model, self._sensi_source, adapter_name)
                    replicas.check_launcher(any(slice_.has_integers for slice_, _ in decision.slices.values()))
                if not low_cpu_mem_usage and not replicas.new_parameters_are_empty():
                    replicas.allocate_adapter(model)
                replicas.copy_weights_from_rank_0(model)  # some parts of an adapter start from random values
        finally:
            self._sensi_decision = self._sensi_source = None
        companions = [m for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
        for layer in layers_of(model).values():
            layer.sensi_saved_modules = companions
        for wrapper in companions:  # a second adapter is active before those of the first have a copy for it
            activate(wrapper, self.active_adapters, config.inference_mode)
        if config.from_file:  # if Transformers reads the file, it calls no hook
            loading.warn_of_pending_cut(config)
            layers = layers_of(model, adapter_name)
            for layer in layers.values():
                layer.note_start(adapter_name, layers)
        if decision is not None and not config.keep_base:
            drop_base(model, adapter_name)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> SensiConfig:
        return peft_config  # `prepare` has filled in the targets

    def _check_target_module_exists(self, peft_config: SensiConfig, key: str) -> Any:  # type: ignore[override]
        if self._sensi_decision is None:
            return check_target_module_exists(peft_config, key)
        return key in self._sensi_decision.slices

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
        assert self._sensi_decision is not None
        slice_, group = self._sensi_decision.slices[current_key]
        refitted = self._sensi_decision.refitted.pop(current_key, None)  # popped: the copy in the layer is enough
        kept = None
        if isinstance(target, SensiLayer) and self._sensi_source in target.sensi_slices:
            kept = target.own_parts(self._sensi_source)
        layer = wrap_module(self.model, current_key, adapter_name, slice_, group, sensi_config, refitted, kept)
        if adapter_name not in self.active_adapters:
            layer.set_requires_grad(adapter_name, False)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # Trained values are float32 already, and PEFT's version would re-wrap them and set `requires_grad`. Only under
        # `low_cpu_mem_usage` an older file can have brought modules in 16 bits.
        hold_masters(self.model, adapter_name, autocast_adapter_dtype)

    # -- several adapters, merging ------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._check_merge(adapter_names or self.active_adapters)
        with undone_on_error(self):
            super().merge_adapter(adapter_names, safe_merge=safe_merge)

    def disable_adapter_layers(self) -> None:
        self._check_base("disable the adapter")
        super().disable_adapter_layers()

    def delete_adapter(self, adapter_name: str) -> None:
        self._check_base("delete the adapter")
        others = [name for name in self.active_adapters if name != adapter_name]
        was_active = len(others) < len(self.active_adapters)
        with undone_on_error(self):
            super().delete_adapter(adapter_name)
            if was_active and self.peft_config and not any(layer.merged for layer in self._layers()):
                # Each layer has activated one of the adapters that it has, which can be different ones.
                self.set_adapter(others or min(self.peft_config))

    def _unload_and_optionally_merge(
        self, merge: bool = True, progressbar: bool = False, safe_merge: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        if merge:
            self._check_mergeable()  # before anything is replaced
            names = kwargs.get("adapter_names") or self.active_adapters
            merged_before = {name for layer in self._layers() for name in layer.merged_adapters}
            self._check_combination([*names, *sorted(merged_before - {*names})])
            if cuts := [name for name in names if self.peft_config[name].phase == "cut"]:
                what = f"The cuts of the adapter {cuts[0]!r} are not finished, so the merged model keeps all units"
                warnings.warn(
                    f"{what}: train on with a `SensiCallback` or a `Schedule`, or call `trim`.", stacklevel=4
                )
            if set(names) != set(self.active_adapters) and not any(layer.merged for layer in self._layers()):
                # PEFT would merge the Linears of these adapters and the task head of the active one.
                self.set_adapter(names if len(names) > 1 else names[0])
        else:
            self._check_base("unload the adapter")
        merged = merge or any(layer.merged for layer in self._layers())
        trims = merged and any(p.trims for layer in self._layers() for p in layer.sensi_slices.values())
        unload = super()._unload_and_optionally_merge

        def finish() -> Any:
            if not merge and not any(layer.merged for layer in self._layers()):
                for module in self.model.modules():
                    if isinstance(module, (SensiLayer, AuxiliaryTrainingWrapper)):
                        module.set_adapter([])  # restores the numbers of heads, and the base's own head
            model: Any = unload(merge, progressbar, safe_merge, *args, **kwargs)
            if trims:
                note_widths(model)  # its `save_pretrained` then writes the widths into the config
            return model

        with undone_on_error(self) if safe_merge or not merge else nullcontext():
            try:
                return finish()
            except KeyboardInterrupt:
                if merge and not safe_merge:
                    # To undo it, all weights of the base would have to stay in memory. So the rest is merged, too.
                    finish()
                raise

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, AuxiliaryTrainingWrapper):
            # PEFT's version copies `weight`, but a head or pooler may consist of several modules and have none.
            setattr(parent, child_name, new_module)
        else:
            if isinstance(child, SensiLayer):
                wrapping.release(child, new_module)
            super()._replace_module(parent, child_name, new_module, child)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise SensiError("`adapter_names` in forward is not supported: call `set_adapter` before each batch.")
        if self.model.training and torch.is_grad_enabled():
            check_wrapper()
            replicas.check_values(self.model)
            self._check_training()
        yield

    # -- state dicts --------------------------------------------------------------------------------------------------

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *lists: Any
    ) -> None:
        # All marks are compared before PyTorch writes the first value. Two plans may have no layer in common.
        if prefix + EXTRA in state_dict:
            check_marks(state_dict[prefix + EXTRA], self.marks(), prefix + EXTRA)
        for name, layer in layers_of(self).items():
            check_plain_state(layer, state_dict, f"{prefix}{name}.")
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *lists)
        missing[:] = [name for name in missing if name != prefix + EXTRA]  # the layers warn of it

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict, unwanted_adapter_names: list
    ) -> dict[str, torch.Tensor]:
        check_collected(state_dict, model)
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        # This is PEFT's own copy. From it, PEFT takes all entries of embeddings if the vocabulary was resized.
        for name in [name for name in state_dict if name.endswith(LAYER_MARK)]:
            del state_dict[name]
        return completed(tensors, model, config, adapter_name)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # Embeddings that are saved whole would be in the file twice if the vocabulary was resized.
        key = key.replace(f".modules_to_save.{adapter_name}.", ".")
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        check_takes_values(model, adapter_name)
        state_dict = dict(state_dict)
        stored = state_dict.pop(plan_key(state_dict))
        if config.from_file:
            check_pair(stored, config)
        plan, _, hidden = plan_from_tensor(stored)
        check_hidden(hidden, config)
        gated = any(name.rpartition(".")[2] == "sensi_gate" for name in state_dict)
        as_is = plan == config.plan and gated == (config.phase == "cut")
        with nullcontext() if as_is else replanned(model, config, adapter_name, plan, gated):
            tensors = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
            tensors = loading.check_state(tensors, model, adapter_name)
        # The plan has been compared, so the layers need not warn that these tensors have no marks.
        layers = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, SensiLayer)]
        tensors |= {f"{name}.{LAYER_MARK}": marks_to_tensor(layer.marks()) for name, layer in layers}
        config.from_file = False  # from now on its values are trained here, and a checkpoint may bring another plan
        return tensors
