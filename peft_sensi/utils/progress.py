"""Progress of long loops: a bar on a terminal or in a notebook, and a line every few seconds anywhere else."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm
from tqdm.notebook import tqdm_notebook
from transformers import ProgressCallback
from transformers.trainer_utils import has_length


if TYPE_CHECKING:
    from transformers import Trainer  # takes a second to import


SECONDS = 5.0  # between two lines; shorter loops get none


def progress_bar(
    items: Iterable[Any] | None = None, what: str = "", total: int | None = None, show: bool = True
) -> Any:
    """A `tqdm` over `items`, or for `total` calls of its `update`. It writes to stderr, and disappears at the end.

    A pipe or a file gets lines instead of a bar, because the carriage returns of a bar would make one endless line.
    """
    how: dict[str, Any] = {}
    if not (sys.stderr.isatty() or issubclass(tqdm, tqdm_notebook)):
        how = {"file": Lines(), "mininterval": SECONDS, "delay": SECONDS, "miniters": 1}
    elif _has_no_width():
        how = {"ncols": 80, "nrows": 24}
    return tqdm(items, desc=what, total=total, leave=False, disable=not show, **how)


def _has_no_width() -> bool:
    """Whether the terminal says that it has no columns, as in some containers: tqdm would show nothing."""
    with suppress(OSError, ValueError):
        return os.get_terminal_size(sys.stderr.fileno()).columns == 0
    return False


class Lines:
    """A file for `tqdm` that writes each state of a bar to stderr as a line of its own."""

    def write(self, text: str) -> None:
        if line := text.strip():
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


class TrainerProgress(ProgressCallback):
    """The bars of a `Trainer`, with `progress_bar`."""

    training_bar: Any
    prediction_bar: Any

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.training_bar = progress_bar(what="training", total=state.max_steps, show=state.is_world_process_zero)
        self.current_step = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        """Shows the loss beside the bar, and an evaluation as a line. Both go to stderr."""
        if not state.is_world_process_zero or self.training_bar is None:
            return
        if "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {float(logs['loss']):.4g}", refresh=False)
        kept = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
        timing = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
        texts = [f"{name} {value:.4g}" for name, value in kept.items() if name not in timing]
        if texts:
            self.training_bar.write(f"epoch {logs.get('epoch', 0):.3g}: {', '.join(texts)}", file=sys.stderr)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **others: Any
    ) -> None:
        if state.is_world_process_zero and self.prediction_bar is None and has_length(eval_dataloader):
            self.prediction_bar = progress_bar(what="evaluation", total=len(eval_dataloader))
        super().on_prediction_step(args, state, control, eval_dataloader, **others)


def show_progress(trainer: Trainer) -> None:
    """Replaces the bars of a `Trainer`, if it has them. They would write carriage returns to a pipe."""
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(TrainerProgress)
