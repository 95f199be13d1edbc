"""What changes during training: phases of a schedule, stepped by an own loop or by a Trainer callback.

`SensiConfig.schedule` is one phase as a dict:

- `{"phase": "freeze_dense", "epochs": 2}`: after so many epochs the dense part (attention, in Learners + priming,
  arXiv 2208.02070) is frozen; what it learned stays part of the adapter.
- `{"phase": "draw_mask", "at": 0.5}`: after this share of the steps the mask on the base is drawn once (DSEE, arXiv
  2111.00160): by the size of the update where there is one, by the size of the weight elsewhere.

Somebody must step the schedule. If nobody does, the first forward pass in training mode raises, instead of training
silently without it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback

from .config import SensiConfig
from .errors import SensiError
from .layer import SensiLayer


class Schedule:
    """Steps the schedule of a model's active adapter, once before each optimizer step.

    Deterministic in the step number, so a resumed run, and every process of a distributed one, does the same.

    Args:
        model: A `PeftModel` with a `SensiConfig` that has a `schedule`.
        total_steps: Optimizer steps of the whole training.
        steps_per_epoch: Needed for a phase that counts epochs.

    Raises:
        SensiError: There is no schedule, or a length that it needs is missing.
    """

    def __init__(self, model: nn.Module, total_steps: int, steps_per_epoch: int | None = None) -> None:
        self.model = model
        self.adapter_name, config = scheduled_adapter(model)
        phase: dict[str, Any] = config.schedule or {}
        if "epochs" in phase:
            if not steps_per_epoch:
                raise SensiError("This schedule counts epochs: `Schedule` needs `steps_per_epoch`.")
            self.switch = math.ceil(phase["epochs"] * steps_per_epoch)
        else:
            self.switch = math.ceil(phase["at"] * total_steps)
        self.phase = phase["phase"]
        self.done_steps = 0
        tuner(model).sensi_schedule_is_stepped = True

    def step(self, optimizer: torch.optim.Optimizer | None = None, done_steps: int | None = None) -> bool:
        """To be called before each optimizer step, of which there were `done_steps`. Whether a phase changed.

        The optimizer is told to forget its moments of what is frozen.
        """
        done = self.done_steps if done_steps is None else done_steps
        self.done_steps = done + 1
        layers = [m for m in self.model.modules() if isinstance(m, SensiLayer) and self.adapter_name in m.sensi_slices]
        if self.phase == "freeze_dense":
            return self._freeze_dense(layers, done >= self.switch, optimizer)
        if done == self.switch:
            for layer in layers:
                if layer.part("bits", self.adapter_name) is not None:
                    layer.draw_mask(self.adapter_name, mask_scores(layer, self.adapter_name))
            return True
        return False

    def _freeze_dense(self, layers: list[SensiLayer], freeze: bool, optimizer: torch.optim.Optimizer | None) -> bool:
        changed = False
        for layer in layers:
            parameter = layer.part("weight", self.adapter_name)
            if parameter is None or freeze == ("weight" in layer.sensi_frozen.get(self.adapter_name, ())):
                continue
            changed = True
            layer.sensi_frozen[self.adapter_name] = ("weight",) if freeze else ()
            parameter.requires_grad_(not freeze)
            if freeze:
                parameter.grad = None
                if optimizer is not None:
                    optimizer.state.pop(parameter, None)
        return changed


class SensiCallback(TrainerCallback):
    """Steps the schedule in a `transformers.Trainer`; harmless without one."""

    def __init__(self) -> None:
        self.schedule: Schedule | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.schedule = None
        if scheduled_adapter(model, required=False)[1].schedule is not None:
            steps_per_epoch = math.ceil(state.max_steps / max(1, args.num_train_epochs))
            self.schedule = Schedule(model, state.max_steps, steps_per_epoch)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.schedule is not None:
            self.schedule.step(kwargs.get("optimizer"), state.global_step)


def mask_scores(layer: SensiLayer, adapter_name: str) -> torch.Tensor:
    """What decides which weights a mask keeps, `[out, in]` in the base's order."""
    with torch.no_grad():
        effective, _ = layer.effective(adapter_name)
        if layer.part("down", adapter_name) is None and layer.part("values", adapter_name) is None:
            return effective.abs()
        return (effective - layer.weight.to(effective.dtype)).abs()


def tuner(model: nn.Module) -> Any:
    return model.base_model if isinstance(model, PeftModel) else model


def scheduled_adapter(model: nn.Module, required: bool = True) -> tuple[str, SensiConfig]:
    """The active adapter and its config. Raises `SensiError` when it has no schedule but one is required."""
    model = getattr(model, "module", model)
    config = getattr(model, "peft_config", {}).get(name := _active(model))
    if not isinstance(config, SensiConfig) or (required and config.schedule is None):
        raise SensiError("The model's active adapter has no schedule.")
    return name, config


def _active(model: nn.Module) -> str:
    active = getattr(model, "active_adapter", "default")
    active = active() if callable(active) else active
    return active if isinstance(active, str) else active[0]
