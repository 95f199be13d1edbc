"""Steps the schedule of an adapter in `transformers.Trainer`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from ..scoring.calibration import LossFn
from .schedule import Schedule
from .scheduled import scheduled_adapters, scheduled_model


class SensiCallback(TrainerCallback):
    """Steps the schedule of the active adapter in a `transformers.Trainer`. Does nothing if there is no schedule.

    Args:
        calibration: Batches for scoring the units again, for cuts by a score that needs data.
        loss_fn: A function of the model and a batch that returns the loss, for these scores. Default: the model's
            loss.
        steps_per_epoch: Number of optimizer steps that count as one epoch, for a phase that counts epochs and data
            without a length (a stream). Default: taken from the data.
    """

    def __init__(
        self,
        calibration: Iterable[Mapping[str, Any]] | None = None,
        loss_fn: LossFn | None = None,
        steps_per_epoch: int | None = None,
    ) -> None:
        self.calibration, self.loss_fn, self.steps_per_epoch = calibration, loss_fn, steps_per_epoch
        self.schedule: Schedule | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.schedule = None
        model = kwargs["model"]
        if scheduled_adapters(scheduled_model(model)):
            # From the data: the number of epochs may be a fraction, and `max_steps` takes precedence over it.
            loader: Any = kwargs.get("train_dataloader")
            steps = self.steps_per_epoch
            if steps is None and has_length(loader):
                steps = math.ceil(len(loader) / args.gradient_accumulation_steps)
            self.schedule = Schedule(model, state.max_steps, steps, self.calibration, self.loss_fn)
            # `Trainer` hands over the inner model.
            self.schedule.keeps_shapes |= args.torch_compile or args.n_gpu > 1

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.schedule is not None:
            self.schedule.step(kwargs.get("optimizer"), state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.schedule is not None:
            # A schedule-free optimizer (arXiv 2405.15682) trains other values than those that it results in. It cannot
            # exchange them any more when the parameters have been replaced. Those of the best model are results.
            exchange = getattr(kwargs.get("optimizer"), "eval", None)
            if callable(exchange) and not (args.load_best_model_at_end and state.best_model_checkpoint):
                exchange()
            self.schedule.finish()  # after `Trainer` has loaded the best model
