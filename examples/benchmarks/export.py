"""The gain of trimming and int8 in onnxruntime: bytes, latency and accuracy of the whole model and of the half model.

    python examples/benchmarks/export.py runs/export            # trains, exports, measures
    python examples/benchmarks/export.py runs/export --rounds 99  # measures again

The task is that of `make demo`, with more and longer rows. all-MiniLM-L6-v2 is fine-tuned whole, and with
`SensiConfig(budget=0.5)`. Both are exported, and both exports are also quantized. The four files take turns in
onnxruntime on the same batches, so that other load on the machine affects all of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from peft import get_peft_model
from transformers import set_seed

from peft_sensi import SensiConfig, export_onnx, load_merged, save_merged

import examples_path  # noqa: F401 (for the imports from examples/)
from common import batches, interleaved_medians, parameters, write_json
from quickstart import SEED, Task, build_task, fresh_base, train


MODELS = ("base", "half")
SHAPES = ((1, 16), (1, 48), (32, 48))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if not (options.folder / "files.json").exists():
        prepare(options.folder)
    files = json.loads((options.folder / "files.json").read_text())
    latencies = measure(options.folder, options.rounds, options.threads)
    for name, row in files.items():
        row["milliseconds"] = {key: seconds * 1e3 for key, seconds in latencies[name].items()}
    settings = {"rounds": options.rounds, "threads": options.threads, "onnxruntime": onnxruntime.__version__}
    write_json(options.folder / "results.json", {**settings, "files": files})
    print(table(files))


def prepare(folder: Path) -> None:
    """Trains both models and exports them. `files.json` is written last, and shows that everything is complete."""
    task = build_task(rows=400, words=40, max_length=48)
    test = list(batches(task.test, task.collator))
    files: dict[str, dict[str, Any]] = {}
    for name in MODELS:
        set_seed(SEED)
        model, _ = train(
            base_or_half(name, task), task, folder / "training", per_device_train_batch_size=32, learning_rate=5e-5
        )
        save_merged(model, folder / name)
        report = export_onnx(load_merged(folder / name), folder / f"{name}.onnx", int8=True, data=test)
        print(f"{name}: {report}")
        for key, file in ((name, report.file), (f"{name} int8", report.int8)):
            assert file is not None
            row = {k: v for k, v in dataclasses.asdict(file).items() if k != "path"}
            files[key] = {**row, "parameters": parameters(load_merged(folder / name))}
    write_json(folder / "files.json", files)


def base_or_half(name: str, task: Task) -> torch.nn.Module:
    if name == "base":
        return fresh_base()
    calibration = batches(task.train, task.collator, seed=SEED)
    return get_peft_model(fresh_base(), SensiConfig(budget=0.5, calibration=calibration, task_type="SEQ_CLS"))


def measure(folder: Path, rounds: int, threads: int) -> dict[str, dict[str, float]]:
    """Median seconds of each file, for each batch shape."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    sessions = {
        f"{name}{suffix.replace('.', ' ')}": onnxruntime.InferenceSession(folder / f"{name}{suffix}.onnx", options)
        for name in MODELS
        for suffix in ("", ".int8")
    }
    generator = np.random.default_rng(SEED)
    latencies: dict[str, dict[str, float]] = {name: {} for name in sessions}
    for size, length in SHAPES:
        ids = generator.integers(1000, 20000, (size, length))
        batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        calls = {name: partial(session.run, None, batch) for name, session in sessions.items()}
        for name, seconds in interleaved_medians(calls, rounds, warm_up=5).items():
            latencies[name][f"{size} x {length}"] = seconds
    return latencies


def table(files: dict[str, dict[str, Any]]) -> str:
    shapes = [f"{size} x {length}" for size, length in SHAPES]
    lines = [
        f"| | parameters | MB | accuracy | agreement | {' | '.join(f'ms, {shape}' for shape in shapes)} |",
        "|" + " --- |" * (5 + len(shapes)),
    ]
    for name, row in files.items():
        milliseconds, whole = row["milliseconds"], files["base"]["milliseconds"]
        times = [f"{milliseconds[shape]:.2f} ({milliseconds[shape] / whole[shape]:.2f} x)" for shape in shapes]
        shares = f"{row['accuracy']:.3f} | {row['agreement']:.1%}"
        lines.append(
            f"| {name} | {row['parameters'] / 1e6:.2f} M | {row['bytes'] / 1e6:.1f} | {shares} | {' | '.join(times)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
