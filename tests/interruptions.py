"""Interrupts a command that trains with a signal, and compares what was resumed with what was not interrupted."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from command import run
from safetensors.torch import load_file
from transformers import TrainerCallback

from peft_sensi.cli.run import Run


class Signal(TrainerCallback):
    """Sends a signal to this process in a step, counted over all trainings."""

    def __init__(self, step: int, number: int) -> None:
        self.steps_left, self.number = step, number

    def on_step_begin(self, args, state, control, **others) -> None:
        self.steps_left -= 1
        if self.steps_left == 0:
            os.kill(os.getpid(), self.number)


def interrupted(monkeypatch, step: int, *arguments, number: int = signal.SIGINT) -> str:
    """The output of a command that gets a signal in a step: Ctrl-C, or the one with this number."""
    trainer, press = Run.trainer, Signal(step, number)
    # A signal that is ignored stays ignored, and the tests may run under `nohup`.
    before = signal.signal(number, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(
                Run, "trainer", lambda self, epochs=0.0, more=None: trainer(self, epochs, [*(more or []), press])
            )
            result = run(*arguments)
    finally:
        signal.signal(number, before)
    assert result.exit_code == 128 + number, result.output
    return result.output


def assert_same_adapter(a: Path, b: Path) -> None:
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (a, b))
    assert first.keys() == second.keys()
    for key, value in first.items():
        if not key.endswith("plan"):  # it has a mark of its own in each run
            # Attention does not depend on the bias of its keys. Its gradient is rounding noise, and Adam scales it up.
            atol = 1e-3 if ".key." in key and "bias" in key else 1e-5
            torch.testing.assert_close(second[key], value, rtol=1e-4, atol=atol, msg=partial("{}: {}".format, key))
    values = [json.loads((folder / "metrics.json").read_text())["validation"] for folder in (a, b)]
    assert values[0] == pytest.approx(values[1])
    assert not list(b.glob("checkpoint-*")) and not (b / "unfinished.json").exists()
