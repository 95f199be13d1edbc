"""An adapter, its task and a folder go in; the adapter is trained, evaluated and saved there, with metrics.json.

A training that was interrupted (see `stopping`) has a checkpoint; `--resume` goes on from it (see `resuming`).
"""

from __future__ import annotations

import contextlib
import errno
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import extract_model_from_parallel
from safetensors import SafetensorError
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME

from ..reporting.facts import plan_figures
from ..reporting.saved import METRICS, WEIGHTS, open_adapter
from ..tasks.class_weights import balanced_weights, weighted_loss
from ..tasks.metrics import Quality, beats_baseline
from ..tasks.task import Task, baseline_words
from ..tuner.checkpoint import check_values
from ..utils.errors import SensiError, number_of_system_error
from ..utils.files import existing_parent, write_json_atomically
from ..utils.formatting import size_of
from ..utils.hub_names import UNFINISHED, is_repo
from ..utils.progress import show_progress
from .rates import WHOLE, default_rate
from .resuming import last_checkpoint, remove_checkpoints
from .stopping import StopAfterStep
from .terminal import ENDING, handling


PACKAGES = ("peft-sensi", "peft", "transformers", "torch", "accelerate", "datasets", "tokenizers", "numpy")


@dataclass(frozen=True)
class Training:
    """The options of the command about training. `lr` is `None` for the default, see `rates`."""

    epochs: float
    lr: float | None
    batch_size: int
    bf16: bool
    seed: int
    class_weights: str | None = None
    early_stopping: int | None = None


def check_training(task: Task, training: Training) -> None:
    """Raises `SensiError` if the data does not allow what the options of the training ask for."""
    if training.class_weights:
        balanced_weights(task)
    if training.early_stopping and not len(task.validation):
        raise SensiError("--early-stopping needs validation rows: give --validation, or a --validation-share above 0.")


class Run:
    """An adapter and its task, and the folder in which it is saved after each training.

    `state` says what was done, for `--resume`: `options` of the command, the `stage` of the training, its number of
    `steps` once it is finished and its adapter saved, and figures.
    """

    def __init__(
        self,
        model: Any,
        task: Task,
        folder: Path,
        training: Training,
        state: Mapping[str, Any],
        is_whole: bool = False,
    ) -> None:
        self.model, self.task, self.folder, self.training = model, task, folder, training
        self.state, self.is_whole = dict(state), is_whole
        self.seconds = float(self.state.get("seconds", 0.0))

    @property
    def rate(self) -> float:
        if self.training.lr is not None:
            return self.training.lr
        return WHOLE if self.is_whole else default_rate(self.model)

    def trainer(self, epochs: float = 0.0, callbacks: list[Any] | None = None) -> Trainer:
        options, stops = self.training, self.training.early_stopping if epochs else None
        best = {
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "load_best_model_at_end": True,
            "metric_for_best_model": self.task.main_metric,
            "save_total_limit": 1,
        }
        arguments = TrainingArguments(
            str(self.folder),
            num_train_epochs=epochs,
            learning_rate=self.rate,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=2 * options.batch_size,
            warmup_steps=0.1,
            bf16=options.bf16 and epochs > 0,  # rounded outputs have ties: the final metrics are those of `evaluate`
            use_cpu=not torch.accelerator.is_available(),  # otherwise TrainingArguments refuses bf16 on a CPU
            seed=options.seed,
            logging_strategy="steps",
            logging_steps=0.02,  # a number below 1 is a share of all steps
            logging_first_step=True,
            report_to="none",
            disable_tqdm=False,
            remove_unused_columns=False,
            average_tokens_across_devices=False,  # otherwise Trainer multiplies these means by the number of devices
            **(best if stops else {"save_strategy": "no"}),  # type: ignore[arg-type]
        )
        trainer = Trainer(
            self.model,
            arguments,
            train_dataset=self.task.train,  # type: ignore[arg-type]
            eval_dataset=self.task.validation if stops else None,  # type: ignore[arg-type]
            data_collator=self.task.collator,
            processing_class=self.task.tokenizer,
            compute_loss_func=weighted_loss(self.task) if options.class_weights else None,
            compute_metrics=self._compute_metrics if stops else None,
            callbacks=[*(callbacks or []), *([EarlyStoppingCallback(stops)] if stops else [])],
        )
        show_progress(trainer)
        return trainer

    def _compute_metrics(self, outcome: Any) -> dict[str, float]:
        values = self.task.metrics(outcome.predictions, self.task.validation)
        return {name: -1.0 if value is None else value for name, value in values.items()}  # undefined is worst

    def train(self, epochs: float, callbacks: list[Any] | None = None, stage: str = "train") -> None:
        """Trains, and saves the adapter. A stage that was interrupted goes on from its checkpoint.

        Raises:
            SensiError: Values are not finite. Nothing is saved then.
            KeyboardInterrupt: Ctrl-C was pressed, or SIGTERM or SIGHUP came. A checkpoint was written.
        """
        is_resumed = self.state.get("stage") == stage
        if is_resumed and self.state.get("steps") is not None:
            return  # only what comes after this stage was interrupted
        checkpoint = last_checkpoint(self.folder) if is_resumed else None
        if checkpoint is None:
            remove_checkpoints(self.folder)
        self.check_room()
        has_earlier_stage = self.state.get("steps") is not None
        self.state |= {"stage": stage, "steps": None, "seconds": self.seconds}
        if not has_earlier_stage:  # otherwise `--resume` starts after that stage, until this one has a checkpoint
            self.note_state()
        stop = StopAfterStep(self.note_state)
        trainer = self.trainer(epochs, [*(callbacks or []), stop])
        with handling([signal.SIGINT, *ENDING], stop.request):  # until all is saved
            self._fit(trainer, stop, checkpoint)
            if not all(bool(torch.isfinite(p).all()) for p in self.model.parameters() if p.requires_grad):
                raise SensiError(
                    "The training ended in values that are not finite, and the adapter was not saved: try a smaller "
                    "--lr."
                )
            self.note_state()  # from here on, the folder's adapter may be of this stage
            self.save(trainer)  # before anything else can go wrong
            self.state |= {"steps": trainer.state.global_step, "seconds": self.seconds}
            self.note_state()  # what comes now can be interrupted, too
            stop.after_save()

    def _fit(self, trainer: Trainer, stop: StopAfterStep, checkpoint: Path | None) -> None:
        """Trains from the checkpoint, if there is one, and counts the seconds."""
        start = time.perf_counter()
        try:
            with self.saving():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except KeyboardInterrupt:  # what was trained until now counts after `--resume`, too
            if last_checkpoint(self.folder) is not None:
                self.state["seconds"] = self.seconds + time.perf_counter() - start
                self.note_state()
            raise
        except Exception as error:  # a damaged file of PyTorch can raise anything
            if checkpoint is None or stop.has_begun or isinstance(error, SensiError):
                raise
            raise SensiError(
                f"{checkpoint} cannot be resumed: it may be damaged ({' '.join(str(error).split()):.200}). Delete it, "
                f"and --resume goes on from an older one if there is one. Or start again with --overwrite."
            ) from error
        self.seconds += time.perf_counter() - start

    def note_state(self) -> None:
        """Writes down what was done, for `--resume`."""
        write_record(self.folder / UNFINISHED, self.state)

    def check_room(self) -> None:
        """Raises `SensiError` if the disk has no room for the adapter (and, with --early-stopping, a checkpoint)."""
        values = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        needed = values * (4 if self.training.early_stopping else 1)  # a checkpoint has two moments of each value, too
        if needed > (free := shutil.disk_usage(existing_parent(self.folder)).free):
            raise SensiError(
                f"{self.folder}: the training would write {size_of(needed)}, and the disk has {size_of(free)} left. "
                f"Make room, or give another --out."
            )

    def save(self, trainer: Trainer) -> None:
        """Saves the adapter; where that fails, in a temporary folder, because the training would be lost."""
        before = _version_of(self.folder / WEIGHTS)
        if not PartialState().process_index:
            (self.folder / METRICS).unlink(missing_ok=True)  # of another adapter: this one is measured later
        try:
            with self.saving():
                trainer.save_model()
        except SensiError as error:
            written = [self.folder] if _version_of(self.folder / WEIGHTS) != before else []
            other = Path(tempfile.mkdtemp(prefix="peft-sensi-"))
            try:
                trainer.save_model(str(other))
                where = f" The adapter, without metrics.json, is in {other} instead."
            except Exception:
                place = next((folder for folder in (*written, other) if _is_whole(folder)), None)
                if place != other:
                    shutil.rmtree(other, ignore_errors=True)
                beside = "files beside it, such as the tokenizer's, may be cut off"
                where = f" The adapter itself is whole in {place}; {beside}." if place else ""
            raise SensiError(f"{error}{where}") from error

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Says what could not be written, and what is left of the training."""
        try:
            yield
        except Exception as error:
            # PyTorch's writer has no class of errors of its own, nor have the tokenizers.
            is_torch = any(part in str(error) for part in ("inline_container.cc", "iostream error"))
            is_full = number_of_system_error(error) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            if not (is_torch or is_full or isinstance(error, SafetensorError)):
                raise
            reason = "a file could not be written whole" if is_torch else str(error).rstrip(".")
            checkpoint = last_checkpoint(self.folder)
            rest = f" The same command with --resume goes on from {checkpoint.name}." if checkpoint else ""
            raise SensiError(
                f"The adapter could not be written to {self.folder}: {reason}. Make room.{rest}"
            ) from error

    def evaluate(self, advice: str = "Give a higher --lr, more --epochs or more rows.") -> Quality:
        """The quality on the validation rows; without such rows, it is empty and says so.

        A remark with `advice` follows if the model is not better than one that always gives the same answer.
        """
        if not len(self.task.validation):
            return Quality({}, remarks=["There are no validation rows, so the quality is not known."])
        extract_model_from_parallel(self.model, keep_fp32_wrapper=False)  # otherwise the training's autocast stays
        outcome = self.trainer().predict(self.task.validation)  # type: ignore[arg-type]
        quality = self.task.quality(outcome.predictions, self.task.validation)
        if quality.remarks or beats_baseline(quality.values, quality.baseline):
            return quality
        answer = baseline_words(self.task.record)
        return replace(quality, remarks=[f"The model is not better than the baseline ({answer}). {advice}"])

    def write_metrics(self, base: Any, **more: Any) -> dict[str, Any]:
        """Writes `metrics.json`, and removes what an interrupted training needs.

        Returns the metrics; `{}` except in process 0. `base` is the config of the base model.
        """
        if PartialState().process_index:
            return {}
        # Loaders take a folder with this file, of an adapter of an older version, for a whole model.
        (self.folder / "config.json").unlink(missing_ok=True)
        plan, names = self.model.base_model.plan(), names_of_data(self.task.hashes)
        result = {
            **more,
            "rows": {"train": len(self.task.train.raw), "validation": len(self.task.validation.raw)},
            "classes": self.task.labels.names,
            "task": self.task.record,
            "learning_rate": self.rate if self.training.epochs else None,
            "batch_size": self.training.batch_size if self.training.epochs else None,
            "class_weights": self.training.class_weights,
            "early_stopping": self.training.early_stopping,
            "seed": self.training.seed,
            "bf16": self.training.bf16,
            "trained_values": plan.trainable_params,
            "plan": plan_figures(plan),
            "weight_bytes": (self.folder / WEIGHTS).stat().st_size,
            "versions": versions(),
            "data_sha256": {names[path]: value for path, value in self.task.hashes.items()},
            "validation_data": [names[path] for path in self.task.validation_data],
            "base_revision": getattr(base, "_commit_hash", None),
            "folder": str(self.folder),
            "command": sys.argv[1:],
        }
        (self.folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle, which nobody needs with the adapter
        write_record(self.folder / METRICS, result)
        remove_checkpoints(self.folder)
        (self.folder / UNFINISHED).unlink(missing_ok=True)
        return result


def write_record(path: Path, value: Mapping[str, Any]) -> None:
    """Writes what was measured or done as JSON, in the first process only. Creates the folder."""
    if PartialState().process_index == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomically(path, value)


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def names_of_data(paths: Collection[str]) -> dict[str, str]:
    """The name of each file without its folder. Files of the same name keep their paths.

    So do data sets of the Hub, such as `user/data (train)`.
    """
    counts = Counter(Path(path).name for path in paths)
    is_alone = {path: counts[Path(path).name] == 1 and not is_repo(path.partition(" (")[0]) for path in paths}
    return {path: Path(path).name if is_alone[path] else path for path in paths}


def _is_whole(folder: Path) -> bool:
    """Whether a save that failed has written the adapter whole."""
    try:
        check_values(str(folder / WEIGHTS), open_adapter(folder).config)
    except Exception:
        return False
    return True


def _version_of(file: Path) -> tuple[int, int] | None:
    """What changes when a file is written again; `None` if there is no such file."""
    return (file.stat().st_mtime_ns, file.stat().st_ino) if file.exists() else None
