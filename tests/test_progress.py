"""Progress: bars on a terminal, lines without carriage returns elsewhere."""

from __future__ import annotations

import io
import os
import re
import sys
from weakref import WeakSet

import pytest
from tiny import tiny_model
from transformers import Trainer, TrainingArguments

from peft_sensi.utils import progress
from peft_sensi.utils.progress import TrainerProgress, progress_bar, show_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def no_bars_of_other_tests(monkeypatch):
    """A bar that a test has interrupted may still be there. tqdm would show the next one some lines below it."""
    monkeypatch.setattr(progress.tqdm, "_instances", WeakSet())


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_a_pipe_gets_lines_and_a_terminal_gets_a_bar(kind, monkeypatch):
    stream = kind()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    assert list(progress_bar(range(3), "scores")) == [0, 1, 2]
    text = stream.getvalue()
    if kind is Terminal:
        assert "\r" in text and "\n" not in text
    else:
        lines = text.splitlines()
        assert "\r" not in text and [line[: line.index("%")].split() for line in lines][0] == ["scores:", "0"]
        assert len(lines) == 4 and "3/3" in lines[-1]


def test_a_terminal_without_a_width_gets_a_bar(monkeypatch):
    stream = Terminal()
    stream.fileno = lambda: 2
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((0, 0)))
    assert list(progress_bar(range(3), "scores")) == [0, 1, 2]
    assert "scores:   0%" in stream.getvalue()


def test_lines_are_rare_and_can_be_switched_off(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "SECONDS", 1e9)
    assert list(progress_bar(range(100), "refit")) == list(range(100))
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    assert list(progress_bar(range(100), "refit", show=False)) == list(range(100))
    assert stream.getvalue() == ""


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_a_trainer_shows_step_loss_and_time_left(kind, rows, tmp_path, monkeypatch, capsys):
    stream = kind()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    options = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no", "report_to": []}
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=False, logging_steps=1, **options)
    trainer = Trainer(tiny_model(), arguments, train_dataset=rows, eval_dataset=rows)
    show_progress(trainer)
    trainer.train()
    trainer.predict(rows)
    assert capsys.readouterr().out == ""  # stdout is for results
    text = stream.getvalue()
    states = text.replace("\r", "\n").splitlines()
    assert any(re.search(r"[1-4]/4 \[.*<.*loss \d", line) for line in states), states
    assert any(re.search(r"epoch [\d.]+: loss \d", line.strip()) for line in states)  # of the evaluation
    assert "train_runtime" not in text
    if kind is io.StringIO:
        assert "\r" not in text
        assert [f"{step}/4" in text for step in range(5)] == 5 * [True]
        assert sum("evaluation:   0%" in line for line in states) == 3


def test_a_trainer_without_bars_gets_none(rows, tmp_path):
    trainer = Trainer(tiny_model(), TrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True, report_to=[]))
    show_progress(trainer)
    assert not [c for c in trainer.callback_handler.callbacks if isinstance(c, TrainerProgress)]
