"""Mixed precision follows the hardware: instructions, a timed matmul, and the capability of a GPU."""

from __future__ import annotations

import os
import platform
import runpy
import subprocess
import sys

import pytest
import torch
from processes import PATIENCE

from peft_sensi.utils import precision
from peft_sensi.utils.precision import INSTRUCTIONS, X86, bf16_pays


@pytest.fixture
def machine(monkeypatch):
    """Sets the kind of CPU, its instructions (`None`: PyTorch cannot say), and the speedup that is measured."""

    def setup(kind: str, instructions: bool | None, speedup: float) -> list[float]:
        measured: list[float] = []
        monkeypatch.setattr(platform, "machine", lambda: kind)
        for name in INSTRUCTIONS:
            if instructions is None:
                monkeypatch.delattr(torch.cpu, name, raising=False)
            else:
                monkeypatch.setattr(torch.cpu, name, lambda: instructions, raising=False)
        monkeypatch.setattr(precision, "bf16_speedup", lambda: measured.append(speedup) or speedup)
        return measured

    return setup


@pytest.mark.parametrize(
    "kind, instructions, speedup, pays, is_measured",
    [
        ("x86_64", False, 2.0, False, False),
        ("AMD64", True, 2.0, True, True),
        ("x86_64", True, 0.03, False, True),  # the CPU can, but PyTorch does not use it
        ("x86_64", True, 1.1, False, True),
        ("x86_64", None, 2.0, True, True),
        ("aarch64", False, 2.0, True, True),
        ("arm64", False, 0.5, False, True),
    ],
)
def test_a_cpu_is_measured_where_there_is_doubt(machine, kind, instructions, speedup, pays, is_measured):
    measured = machine(kind, instructions, speedup)
    assert bf16_pays("cpu") is pays
    assert bool(measured) is is_measured


@pytest.mark.parametrize("capability, pays", [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_a_gpu_is_judged_by_its_capability(monkeypatch, capability, pays):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert bf16_pays("cuda") is pays
    assert not bf16_pays("mps")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda:0"))
    assert bf16_pays() is pays


def test_without_an_accelerator_the_cpu_decides(machine, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert machine("x86_64", True, 2.0) == [] and bf16_pays()


def test_the_measurement_is_made_once_and_compares_two_precisions(monkeypatch):
    seen = []
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: seen.append((a.dtype, b.dtype)) or matmul(a, b))
    precision.bf16_speedup.cache_clear()
    with torch.autocast("cpu", torch.bfloat16):  # would turn the float32 matmul into a bfloat16 one
        first = precision.bf16_speedup()
    assert precision.bf16_speedup() == first > 0
    assert seen == 5 * [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)]


@pytest.mark.skipif(platform.machine().lower() not in X86, reason="limits the instructions of an x86 CPU")
def test_a_build_that_does_not_use_the_instructions_is_found_out():
    """With AVX2 only, a matmul in bfloat16 takes 30 times as long as in float32, whatever the CPU can do."""
    code = f"import runpy\nprint(runpy.run_path({precision.__file__!r})['bf16_pays']('cpu'))"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    assert run.stdout == "False\n"


def test_the_module_needs_nothing_but_torch():
    assert "bf16_pays" in runpy.run_path(precision.__file__)
