"""What changes during training: phases of a schedule, stepped by an own loop or by a Trainer callback.

`SensiConfig.schedule` is one phase as a dict:

- `{"phase": "freeze_dense", "epochs": 2}`: after so many epochs the dense part (attention, in Learners + priming,
  arXiv 2208.02070) is frozen; what it learned stays part of the adapter.
- `{"phase": "cut", "start": 0.1, "end": 0.6, "cuts": 4}`: trims during training (Sensi-BERT, arXiv 2307.11764).
  Between these shares of the steps units are rescored and closed, along a cubic schedule (Zhu & Gupta 2017, arXiv
  1710.01878); closed units are masked, because parameters cannot change their shape under an optimizer, and leave the
  model when training is finished. `start` = `end` with one cut is a cut after a warm-up.
- `{"phase": "draw_mask", "at": 0.5}`: after this share of the steps the mask on the base is drawn once (DSEE, arXiv
  2111.00160): by the size of the update where there is one, by the size of the weight elsewhere.

Somebody must step the schedule. If nobody does, the first forward pass in training mode raises, instead of training
silently without it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback

from ..layers.layer import SensiLayer
from ..scoring.calibration import LossFn, materialize
from ..scoring.criteria import DATA_METHODS
from ..utils import distributed, replicas
from ..utils.errors import SensiError
from .config import SensiConfig
from .cuts import close_units, exceeds, open_units
from .wrapping import root_of, shrink


class Schedule:
    """Steps the schedule of a model's active adapter: `step` before each optimizer step, `finish` after the last.

    Deterministic in the step number and the calibration data, so a resumed run, and every process of a distributed
    one, does the same.

    Args:
        model: A `PeftModel` with a `SensiConfig` that has a `schedule`.
        total_steps: Optimizer steps of the whole training.
        steps_per_epoch: Needed for a phase that counts epochs.
        calibration: Batches for rescoring, needed for cuts by a gradient score.
        loss_fn: For rescoring, where it is not the model's own loss; that of the config is not kept with the model.

    Raises:
        SensiError: There is no schedule, or something that it needs is missing; or, from `step`, the model is sharded.
    """

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        steps_per_epoch: int | None = None,
        calibration: Iterable[Mapping[str, Any]] | None = None,
        loss_fn: LossFn | None = None,
    ) -> None:
        self.loss_fn = loss_fn
        self.model = unwrapped(model)
        self.adapter_name, self.config = scheduled_adapter(self.model)
        self.phase: dict[str, Any] = dict(self.config.schedule or {})
        self.batches: list[Mapping[str, Any]] | None = None
        with distributed.synchronized("preparing the schedule"):
            self._prepare(total_steps, steps_per_epoch, calibration)
        self.done_steps = 0
        tuner(self.model).sensi_schedule_is_stepped = True

    def _prepare(
        self, total_steps: int, steps_per_epoch: int | None, calibration: Iterable[Mapping[str, Any]] | None
    ) -> None:
        if self.phase["phase"] == "cut":
            if calibration is None and self.config.score in DATA_METHODS and self.config.score != "movement":
                raise SensiError(f"Cuts by score={self.config.score!r} need `calibration`, batches with labels.")
            if calibration is not None:
                self.batches = materialize(calibration, self.config.calibration_steps)
            cuts, start, end = (self.phase[name] for name in ("cuts", "start", "end"))
            shares = [start + (end - start) * i / max(1, cuts - 1) for i in range(cuts)]
        elif "epochs" in self.phase:
            if not steps_per_epoch:
                raise SensiError("This schedule counts epochs: `Schedule` needs `steps_per_epoch`.")
            self.switches = [math.ceil(self.phase["epochs"] * steps_per_epoch)]
            if self.switches[0] >= total_steps:
                message = f"The phase of {self.phase['epochs']} epochs is as long as the training: nothing is frozen."
                warnings.warn(message, stacklevel=3)
            return
        else:
            shares = [self.phase["at"]]
        # The last one comes before the last step, or it would never come.
        self.switches = [min(math.ceil(round(share * total_steps, 6)), total_steps - 1) for share in shares]

    def step(self, optimizer: torch.optim.Optimizer | None = None, done_steps: int | None = None) -> bool:
        """To be called before each optimizer step, of which there were `done_steps`. Whether a phase changed.

        The optimizer is told to forget its moments of what is frozen.
        """
        if replicas.is_sharded(self.model):
            raise SensiError(
                f"The phase {self.phase['phase']!r} of a schedule changes what is trained or kept, which a model "
                f"that is sharded by FSDP cannot. Train it under DDP, or without a schedule."
            )
        done = self.done_steps if done_steps is None else done_steps
        self.done_steps = done + 1
        if self.phase["phase"] == "freeze_dense":
            return freeze_dense(self._layers(), self.adapter_name, done >= self.switches[0], optimizer)
        if done not in self.switches:
            return False
        if self.phase["phase"] == "draw_mask":
            self._draw()
        else:
            cuts = self.phase["cuts"]
            made = max(i + 1 for i, switch in enumerate(self.switches) if switch == done)
            self._close(1 - (1 - made / cuts) ** 3)
        return True

    def finish(self) -> None:
        """Removes closed units from the model. Makes up, with a warning, for what training ended too early for.

        That happens when it is stopped early, or when the best checkpoint is from before the last switch.
        """
        if self.phase["phase"] == "draw_mask" and not all(
            layer.is_masked(self.adapter_name) for layer in self._layers()
        ):
            self._warn("the mask is drawn")
            self._draw()
        if self.phase["phase"] == "cut" and self.config.schedule is not None:
            plan = open_units(root_of(self.model), self.config, self.adapter_name)
            if exceeds(plan, self.config.limits):
                self._warn("units are cut")
                self._close(1.0)
                plan = open_units(root_of(self.model), self.config, self.adapter_name)
            shrink(self.model, self.config, self.adapter_name, plan)

    def _warn(self, what: str) -> None:
        message = (
            f"Training ended in a state from before the schedule's last switch: {what} now, and not trained after."
        )
        warnings.warn(message, stacklevel=3)

    def _draw(self) -> None:
        for layer in self._layers():
            if layer.part("bits", self.adapter_name) is not None:
                layer.draw_mask(self.adapter_name, mask_scores(layer, self.adapter_name))

    def _close(self, progress: float) -> None:
        with distributed.synchronized("cutting units"):
            close_units(root_of(self.model), self.config, self.adapter_name, self.batches, progress, self.loss_fn)

    def _layers(self) -> list[SensiLayer]:
        return [m for m in self.model.modules() if isinstance(m, SensiLayer) and self.adapter_name in m.sensi_slices]


class SensiCallback(TrainerCallback):
    """Steps the schedule in a `transformers.Trainer`; harmless without one.

    `calibration` are the batches by which cuts during training rescore the units, `loss_fn` their loss where it is
    not the model's own.
    """

    def __init__(self, calibration: Iterable[Mapping[str, Any]] | None = None, loss_fn: LossFn | None = None) -> None:
        self.calibration, self.loss_fn = calibration, loss_fn
        self.schedule: Schedule | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.schedule = None
        model = kwargs["model"]
        if scheduled_adapter(model, required=False)[1].schedule is not None:
            # Not from the number of epochs, which may be a fraction, and which `max_steps` overrules.
            loader: Any = kwargs.get("train_dataloader")
            sized = hasattr(loader, "__len__")
            steps_per_epoch = math.ceil(len(loader) / args.gradient_accumulation_steps) if sized else None
            self.schedule = Schedule(model, state.max_steps, steps_per_epoch, self.calibration, self.loss_fn)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.schedule is not None:
            self.schedule.step(kwargs.get("optimizer"), state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.schedule is not None:
            self.schedule.finish()  # Trainer has put the best model back by now, if it was asked to


def freeze_dense(
    layers: Sequence[SensiLayer], adapter_name: str, freeze: bool, optimizer: torch.optim.Optimizer | None
) -> bool:
    """Freezes (or, in a run that starts again, thaws) the dense part of an adapter. Whether that changed anything."""
    changed = False
    for layer in layers:
        parameter = layer.part("weight", adapter_name)
        if parameter is None or freeze == ("weight" in layer.sensi_frozen.get(adapter_name, ())):
            continue
        if (
            not freeze
            and optimizer is not None
            and not any(parameter is p for group in optimizer.param_groups for p in group["params"])
        ):
            continue  # made after an earlier training had frozen it, the optimizer could not move it
        changed = True
        layer.sensi_frozen[adapter_name] = ("weight",) if freeze else ()
        parameter.requires_grad_(not freeze)
        if freeze:
            parameter.grad = None
            if optimizer is not None:
                optimizer.state.pop(parameter, None)
    return changed


def mask_scores(layer: SensiLayer, adapter_name: str) -> torch.Tensor:
    """What decides which weights a mask keeps, `[out, in]` in the base's order."""
    with torch.no_grad():
        effective, _ = layer.get_adapted_weight(adapter_name)
        if layer.part("down", adapter_name) is None and layer.part("values", adapter_name) is None:
            return effective.abs()
        return (effective - layer.get_original_weight(adapter_name).to(effective.dtype)).abs()


def unwrapped(model: nn.Module) -> nn.Module:
    """Without what DDP, and `torch.compile`, put around a model."""
    while (inner := getattr(model, "module", None) or getattr(model, "_orig_mod", None)) is not None:
        model = inner
    return model


def tuner(model: nn.Module) -> Any:
    return model.base_model if isinstance(model, PeftModel) else model


def scheduled_adapter(model: nn.Module, required: bool = True) -> tuple[str, SensiConfig]:
    """The active adapter and its config. Raises `SensiError` when it has no schedule but one is required."""
    model = unwrapped(model)
    config = getattr(model, "peft_config", {}).get(name := _active(model))
    if not isinstance(config, SensiConfig) or (required and config.schedule is None):
        raise SensiError("The model's active adapter has no schedule.")
    return name, config


def _active(model: nn.Module) -> str:
    active = getattr(model, "active_adapter", "default")
    active = active() if callable(active) else active
    return active if isinstance(active, str) else active[0]
