"""Ctrl-C, SIGTERM and SIGHUP end a training with a checkpoint after the running step, or after its last save."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import TrainerCallback

from .terminal import err, leave_lost_terminal, stop_at_once


class StopAfterStep(TrainerCallback):
    """A signal ends the training after the running step, with a checkpoint. A second Ctrl-C ends it at once.

    A second SIGTERM or SIGHUP does nothing, and nor does a Ctrl-C within a second: launchers pass on what they get, so
    it may be the same. Of several processes, all stop after the same step: one that went on would wait for the others
    forever. `on_checkpoint` is called after each checkpoint that was written.
    """

    def __init__(self, on_checkpoint: Callable[[], None] = lambda: None) -> None:
        self.on_checkpoint = on_checkpoint
        self.signal: int | None = None
        self.since = 0.0
        self.has_begun = False
        self.all_stop = False

    def request(self, number: int, *_: Any) -> None:
        """Handles the signal."""
        if self.signal is None:
            self.signal, self.since = number, time.monotonic()
            leave_lost_terminal()
            if PartialState().process_index == 0:
                err.print("stopping after this step, and writing a checkpoint; Ctrl-C again stops at once")
        elif number == signal.SIGINT and time.monotonic() - self.since > 1:
            raise KeyboardInterrupt

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.has_begun = True

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        # After the last step of an epoch, the checkpoint waits for the evaluation. A resumed training goes on with the
        # next epoch, so the evaluation would be lost, and this epoch's model could not be the best one.
        if self._must_stop() and not (args.eval_strategy == "epoch" and float(state.epoch).is_integer()):
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.on_checkpoint()
        # Not `should_training_stop`: what belongs to the end of a training (a cut, the best model) must not happen.
        if self.all_stop:
            if state.is_world_process_zero:
                err.print(f"saved step {state.global_step} of {state.max_steps}")
            self._stop()

    def after_save(self) -> None:
        """Ends the command if a signal came after the last step. What was trained must have been saved."""
        if self._must_stop():
            self._stop()

    def _must_stop(self) -> bool:
        """Whether a process got a signal. All of them must ask."""
        self.all_stop = self.signal is not None
        if (processes := PartialState()).num_processes > 1:
            self.all_stop = bool(reduce(torch.tensor([float(self.all_stop)], device=processes.device)).item())
        return self.all_stop

    def _stop(self) -> None:
        PartialState().wait_for_everyone()  # a launcher ends all processes if one ends
        stop_at_once(self.signal or signal.SIGINT)
