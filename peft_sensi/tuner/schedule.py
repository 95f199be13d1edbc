"""The phases of a training: what is trained or kept changes at certain steps."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import nn

from ..anatomy.modules import unwrapped
from ..layers.layer import SensiLayer, layers_of
from ..planning.plan import Plan
from ..scoring.calibration import LossFn
from ..scoring.criteria import DATA_METHODS, UNPRIMED_METHODS
from ..scoring.scores import Scores
from ..utils import distributed, replicas
from ..utils.checks import is_number, shown
from ..utils.errors import SensiError
from .carry import obstacle
from .combinations import recheck
from .cuts import check_cut, close_units, is_cut, open_units
from .latencies import exceeds
from .rescoring import read_batches
from .scheduled import scheduled_adapters, scheduled_model, unfreeze_dense
from .slicing import config_after, slices_of
from .wrapping import root_of, shrink


logger = logging.getLogger(__name__)


class Schedule:
    """Steps the schedule of a model's active adapter: `step` before each optimizer step, `finish` after the last one.

    What it does depends only on the step number and the calibration data. So a resumed run, and every process of a
    distributed one, does the same.

    `SensiConfig.schedule` is one phase as a dict:

    - `{"phase": "freeze_dense", "epochs": 2}`: After this number of epochs the dense part of the update is frozen (in
      Learners + priming, arXiv 2208.02070, that is attention). Its trained values stay part of the adapter.
    - `{"phase": "cut", "start": 0.1, "end": 0.6, "cuts": 4}`: Between these shares of the training the units are
      scored again, and more and more of them are closed (Sensi-BERT, arXiv 2307.11764), on a cubic schedule (Zhu &
      Gupta 2017, arXiv 1710.01878). A closed unit is masked. `start` = `end` with one cut is a cut after a warm-up, or
      a late cut. After each cut the output projections are refitted to the model before it, if there are calibration
      batches and the adapter trains output biases; `"refit": False` switches that off. A cut that keeps less than
      about a third of what is open is made in stages, like a trim, and fits whole layers. After the last cut the
      closed units leave the model (see below).
    - `{"phase": "draw_mask", "at": 0.5}`: After this share of the training the mask on the base's weights is drawn
      once (DSEE, arXiv 2111.00160). It keeps the weights with the largest update, or the largest weights without an
      update.

    If nothing steps a schedule, the first forward pass in training mode raises an error.

    After the last cut of the phase `"cut"`, the closed units leave the model at once, and the remaining steps cost
    less, if one process trains, the model is neither wrapped nor compiled, and `step` gets one of PyTorch's
    elementwise optimizers (such as AdamW or SGD), which holds all trained parameters of the adapter. The parameters
    are the same objects with smaller values, and the optimizer's state and the gradients are sliced like the values.
    In all other cases, masks stay until `finish`. The result is the same up to rounding, except that dropout of
    attention weights draws other random numbers.

    Args:
        model: A `PeftModel` whose active adapter has a `schedule` in its `SensiConfig`; also under DDP or
            `torch.compile`, or inside of a module of your own.
        total_steps: Number of optimizer steps of the whole training.
        steps_per_epoch: Number of optimizer steps of one epoch, for a phase that counts epochs.
        calibration: Batches for scoring the units again, for cuts by a score that needs data.
        loss_fn: A function of the model and a batch that returns the loss, for these scores. The config's own
            `loss_fn` is not kept with the model. Default: the model's loss.

    Raises:
        SensiError: If not exactly one active adapter has a schedule, an argument is missing that its phase needs, or
            the phase would freeze all that is trained.
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
        self.model = scheduled_model(model)
        scheduled = scheduled_adapters(self.model)
        if len(scheduled) != 1:
            found = f"the active adapters {sorted(scheduled)} have one each" if scheduled else "none has one"
            after = "" if scheduled else " A checkpoint from after the last cut has none: train on without `Schedule`."
            raise SensiError(
                f"`Schedule` needs a model with one active adapter that has a schedule, but {found}. Set "
                f"`SensiConfig.schedule`, or activate one adapter with `set_adapter`.{after}"
            )
        self.adapter_name, self.config = next(iter(scheduled.items()))
        self.phase: dict[str, Any] = dict(self.config.schedule or self.config.past_cuts or {})
        # Whether something other than the optimizer may depend on the shapes of the parameters.
        self.keeps_shapes = unwrapped(model) is not model or _is_compiled(model) or _has_process_group()
        self.batches: list[Mapping[str, Any]] | None = None
        with distributed.synchronized("preparing the schedule"):
            recheck(self.config)
            for name, steps in (("total_steps", total_steps), ("steps_per_epoch", steps_per_epoch or 0)):
                if not is_number(steps) or steps < 0:
                    raise SensiError(f"`{name}` must be a number of optimizer steps, got {shown(steps)}.")
            if calibration is not None and self.phase["phase"] == "cut":
                self.batches = read_batches(calibration, self.config)
            self.switches = self._switches(total_steps, steps_per_epoch)
            self._check_dense()
            if self.config.phase == "cut" and not replicas.is_sharded(self.model):
                # Now: at the cut, a part of the training would be lost.
                check_cut(root_of(self.model), self.config, self.adapter_name)
        self.done_steps, self.made = 0, 0
        self.scores: Scores | None = None  # of the latest cut
        if (tuner := self._tuner()) is not None:
            tuner.sensi_stepped = tuner.sensi_stepped | {self.adapter_name}

    def _switches(self, total_steps: int, steps_per_epoch: int | None) -> list[int]:
        if self.phase["phase"] == "freeze_dense":
            if not steps_per_epoch:
                raise SensiError(
                    "This schedule counts epochs: give `steps_per_epoch` to `Schedule`. `SensiCallback` takes it from "
                    "the training data, and needs it only for data without a length."
                )
            switch = math.ceil(self.phase["epochs"] * steps_per_epoch)
            if switch >= total_steps:
                message = f"The phase of {self.phase['epochs']} epochs is as long as the training: nothing is frozen."
                warnings.warn(message, stacklevel=3)
            return [switch]
        if self.phase["phase"] == "draw_mask":
            shares = [self.phase["at"]]
        else:
            if self.batches is None and self.config.score in set(DATA_METHODS) & set(UNPRIMED_METHODS):
                raise SensiError(
                    f"Cuts by score={self.config.score!r} need `calibration`, batches with labels: give them to "
                    "`SensiCallback` or `Schedule`. The batches given to `SensiConfig` are not kept after the wrap."
                )
            cuts, start, end = (self.phase[name] for name in ("cuts", "start", "end"))
            shares = [start + (end - start) * i / max(1, cuts - 1) for i in range(cuts)]
        # The latest switch is before the last step, because `step` is not called after it.
        return [min(math.ceil(round(share * total_steps, 6)), total_steps - 1) for share in shares]

    def _check_dense(self) -> None:
        """Raises `SensiError` if nothing would be trained after the dense part is frozen."""
        if self.phase["phase"] == "freeze_dense":
            dense = {id(layer.part("weight", self.adapter_name)) for layer in self._layers()}
            if not any(p.requires_grad and id(p) not in dense for p in self.model.parameters()):
                raise SensiError(
                    "This schedule freezes the dense part of the update, and nothing else is trained: add another "
                    "part (such as update='dense+low_rank'), or leave the schedule out."
                )

    def step(self, optimizer: torch.optim.Optimizer | None = None, done_steps: int | None = None) -> bool:
        """Changes what is trained or kept, if it is time for that or overdue. Call it before each optimizer step.

        Do not call it between a forward pass and its backward pass.

        Args:
            optimizer: The optimizer. It forgets its state of parameters that are frozen, and goes on with the smaller
                parameters when units leave the model.
            done_steps: Number of optimizer steps so far. Default: the number of calls so far.

        Returns:
            Whether something changed.

        Raises:
            SensiError: If the model is sharded, or DeepSpeed trains it and the phase is not `"draw_mask"`, or
                `optimizer` is something else.
        """
        if optimizer is not None and not hasattr(optimizer, "param_groups"):  # Accelerate's wrapper has them too
            raise SensiError(
                f"The first argument of `step` is the optimizer, got {optimizer!r}. Give the number of steps as "
                f"`step(optimizer, done_steps=...)`."
            )
        if replicas.is_sharded(self.model):
            raise SensiError(
                f"The phase {self.phase['phase']!r} of a schedule changes what is trained or kept, which is not "
                f"possible in a model that is sharded by FSDP or DeepSpeed ZeRO-3. Train it under DDP, or without a "
                f"schedule."
            )
        if self.phase["phase"] != "draw_mask" and any(map(replicas.is_copied, self.model.parameters())):
            raise SensiError(
                f"DeepSpeed's optimizer trains copies of the parameters, so it would undo what the phase "
                f"{self.phase['phase']!r} of a schedule does. Train it under DDP, or without a schedule; units can be "
                f"cut by `trim()` after the training."
            )
        done = self.done_steps if done_steps is None else done_steps
        changed = self._switch(done, optimizer)
        self.done_steps = done + 1  # not before: a step that failed or was interrupted can be called again
        return changed

    def _switch(self, done: int, optimizer: torch.optim.Optimizer | None) -> bool:
        """Does what is due after so many steps. Returns whether something changed."""
        if self.phase["phase"] == "freeze_dense":
            return self._freeze_dense(done >= self.switches[0], optimizer)
        due = sum(switch <= done for switch in self.switches)  # several cuts may fall on one step
        if self.phase["phase"] == "cut" and self.config.schedule is None:  # the closed units have left the model
            return False
        # A resumed training may start after a switch. The values that it has loaded show whether that was made.
        if done not in self.switches and (due <= self.made or self._is_made(due)):
            self.made = due
            return False
        if self.phase["phase"] == "draw_mask":
            self._draw()
        else:
            self._close(self._progress(due), optimizer=optimizer)
            if due == self.phase["cuts"]:
                self._remove(optimizer)
        self.made = due
        return True

    def _progress(self, cuts: int) -> float:
        return 1 - (1 - cuts / self.phase["cuts"]) ** 3

    def _is_made(self, due: int) -> bool:
        """Whether the values are those after so many switches."""
        if self.phase["phase"] == "draw_mask":
            return all(layer.is_masked(self.adapter_name) for layer in self._layers())
        return is_cut(root_of(self.model), self.config, self.adapter_name, self._progress(due))

    def finish(self) -> None:
        """Ends the phase: closed units leave the model, and a frozen part can be trained again.

        Call it after the last optimizer step. If training stopped before the last switch of the schedule, or if the
        best checkpoint is from before it, performs that switch now and warns.
        """
        if self.phase["phase"] == "draw_mask" and not self._is_made(1):
            self._warn("the mask is drawn")
            self._draw()
        if self.phase["phase"] == "cut" and self.config.schedule is not None:
            plan = open_units(root_of(self.model), self.config, self.adapter_name)
            if exceeds(plan, self.config):
                self._warn("units are cut")
                self._close(1.0, trains_on=False)
                plan = open_units(root_of(self.model), self.config, self.adapter_name)
            self._shrink(plan)
        if self.phase["phase"] == "freeze_dense":  # the optimizer of another training must get all parameters
            unfreeze_dense(self.model, self.adapter_name)
        self.config.past_cuts = None

    def _warn(self, what: str) -> None:
        warnings.warn(
            f"Training ended in a state from before the schedule's last switch: {what} now, and the model is not "
            f"trained afterwards.",
            stacklevel=3,
        )

    def _freeze_dense(self, freeze: bool, optimizer: torch.optim.Optimizer | None) -> bool:
        """Freezes the dense part, or unfreezes it in a second training. Returns whether that changed it."""
        name, changed = self.adapter_name, False
        groups = [] if optimizer is None else optimizer.param_groups
        for layer in self._layers():
            parameter = layer.part("weight", name)
            if parameter is None or freeze == layer.sensi_frozen.get(name, False):
                continue
            if not freeze and groups and not any(parameter is p for group in groups for p in group["params"]):
                unfreeze_dense(self.model, name)
                raise SensiError(
                    "The optimizer was made while the dense part of the update was frozen by another training, so it "
                    "would not train that part. The part is trainable again now: make a new optimizer (or a new "
                    "`Trainer`) and start again."
                )
            changed = True
            layer.sensi_frozen[name] = freeze
            parameter.requires_grad_(not freeze)
            if freeze:
                parameter.grad = None
                if optimizer is not None:
                    optimizer.state.pop(parameter, None)
        return changed

    @torch.no_grad()
    def _draw(self) -> None:
        name = self.adapter_name
        for layer in self._layers():
            if layer.part("bits", name) is not None:
                # A training that starts again draws again, and the old mask must not decide: it made weights zero.
                scores, _ = layer.get_adapted_weight(name, masked=False)
                if layer.part("down", name) is not None or layer.part("values", name) is not None:
                    scores = scores - layer.get_original_weight(name).to(scores.dtype)
                layer.draw_mask(name, scores.abs())

    def _close(self, progress: float, trains_on: bool = True, optimizer: torch.optim.Optimizer | None = None) -> None:
        root, name = root_of(self.model), self.adapter_name
        with distributed.synchronized("cutting units"):
            self.scores = close_units(
                root, self.config, name, self.batches, progress, trains_on, self.loss_fn, optimizer
            )

    def _remove(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Removes the closed units during training, if the optimizer can go on with smaller parameters."""
        root, name = root_of(self.model), self.adapter_name
        plan = open_units(root, self.config, name)
        reason: str | None = "several processes train, or the model is wrapped or compiled"
        if not self.keeps_shapes:
            slices = slices_of(root, config_after(self.config, plan), plan)
            reason = obstacle(optimizer, layers_of(root, name), name, slices)
        if reason is None:
            self._shrink(plan, optimizer)
            self.config.past_cuts = self.phase
        else:
            logger.info("The units that were cut stay masked until training is finished: %s.", reason)

    def _shrink(self, plan: Plan, optimizer: torch.optim.Optimizer | None = None) -> None:
        shrink(self.model, self.config, self.adapter_name, plan, optimizer=optimizer)
        if (tuner := self._tuner()) is not None:
            tuner.note_scores(self.adapter_name, self.scores)

    def _tuner(self) -> Any:
        """The `SensiModel` of a `PeftModel`. Other models have none: they guard no schedule and explain no plan."""
        return self.model.base_model if isinstance(self.model, PeftModel) else None

    def _layers(self) -> list[SensiLayer]:
        return list(layers_of(self.model, self.adapter_name).values())


def _is_compiled(model: nn.Module) -> bool:
    """Whether `compile()` was called on the model or a part of it. It does not wrap a module."""
    return any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())


def _has_process_group() -> bool:
    return dist.is_available() and dist.is_initialized()
