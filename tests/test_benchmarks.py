"""The speed benchmark still runs, resumes, and writes its tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_speed_in_its_quick_form(tmp_path):
    output, page = tmp_path / "speed.json", tmp_path / "speed.md"
    page.write_text("# Before\n<!-- speed.py: begin -->\nold\n<!-- speed.py: end -->\nafter\n")
    command = [sys.executable, "examples/benchmarks/speed.py", "--quick", "--device", "cpu", "--output", str(output)]
    command += ["--table", str(page), "--only", "full", "lora_all", "half", "far10_small"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=300)
    methods = json.loads(output.read_text())["tiny/fp32/cpu"]["methods"]
    assert not [part for parts in methods.values() for part in parts.values() if "error" in part]
    assert methods["half"].keys() == {"step", "memory", "files", "wrap"}
    assert methods["half"]["memory"]["activations"] < methods["full"]["memory"]["activations"]
    assert methods["half"]["memory"]["gradients_and_state"] < methods["full"]["memory"]["gradients_and_state"]
    assert methods["far10_small"]["files"]["bytes"] > 0 and methods["half"]["wrap"]["wrap_steps"] > 0
    text = page.read_text()
    assert text.startswith("# Before") and text.endswith("after\n") and "old" not in text and "LoRA r=8" in text
    # A second run finds everything done.
    before = output.read_text()
    again = subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=100, capture_output=True, text=True)
    assert output.read_text() == before and "step" not in again.stdout
