"""Writes the results of `speed.py` (a JSON file) as Markdown tables into the generated part of a page."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pages import write_part


MIB = 1 << 20


def write_table(results: dict[str, Any], page: str | None) -> str:
    """Returns the tables. With `page`, also writes them between the two markers there, or to a new file."""
    text = "\n\n".join(_setting(key, setting) for key, setting in results.items())
    if page:
        write_part(Path(page), "speed.py", text)
    return text


def _setting(key: str, setting: dict[str, Any]) -> str:
    from speed_methods import METHODS, SHAPES

    shape, precision, *_ = key.split("/")
    machine = setting["machine"]
    batch = f"{SHAPES[shape].batch} x {SHAPES[shape].length}"
    lines = [
        f"### {shape}, {precision}, batch {batch}, {machine['device']}"
        + (", torch.compile" if key.endswith("compile") else ""),
        "",
        f"PyTorch {machine['torch']}, Transformers {machine['transformers']}, PEFT {machine['peft']}",
        "",
        "| method | step / full | step, s | peak, MiB | weights | gradients + state | activations (units) "
        "| wrap, steps | adapter, MiB | load, s | inference / base | merged / base |",
        "| --- |" + " ---: |" * 11,
    ]
    for name, method in METHODS.items():
        parts = setting["methods"].get(name)
        if parts is None:
            continue
        step, memory, files, wrap = (parts.get(part, {}) for part in ("step", "memory", "files", "wrap"))
        failed = [f"{part}: {values['error']}" for part, values in parts.items() if "error" in values]
        cells = [
            method.label,
            _ratio(step.get("step_over_full")),
            _ratio(step.get("step_s"), spread=False),
            _mib(memory.get("peak")),
            _mib(memory.get("weights")),
            _mib(memory.get("gradients_and_state")),
            f"{_mib(memory['activations'])} ({memory['activation_units']:.1f})" if "activations" in memory else "",
            f"{wrap['wrap_steps']:.0f}" if "wrap_steps" in wrap else "",
            f"{files['bytes'] / MIB:.2f}" if "bytes" in files else "",
            f"{files['load_s']:.2f}" if "load_s" in files else "",
            _ratio(step.get("infer_over_full"), spread=False),
            _ratio(step.get("infer_merged_over_full"), spread=False) if method.merges else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
        lines += [f"| {method.label} | failed: {text} |" + " |" * 10 for text in failed]
    return "\n".join(lines)


def _ratio(values: dict[str, float] | None, spread: bool = True) -> str:
    if not values:
        return ""
    text = f"{values['median']:.2f}"
    return f"{text} ({values['low']:.2f}-{values['high']:.2f})" if spread else text


def _mib(value: float | None) -> str:
    return "" if value is None else f"{value / MIB:,.0f}"


if __name__ == "__main__":
    write_table(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2])
