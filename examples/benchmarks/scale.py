"""Peak memory of each stage with a model of 1.1 billion parameters: from the score to the merged model.

    python examples/benchmarks/scale.py
    python examples/benchmarks/scale.py --layers 2 --vocabulary 1000

The model has the shape of TinyLlama and random weights in bfloat16, so nothing is downloaded and nothing is learned.
It is scored, planned, trimmed and refitted, trained, saved, loaded on a fresh base, merged, saved and loaded again.
The table has the peak of each stage: the resident memory of the process (Linux), without what Python and the libraries
had before the model was built. `docs/scale.md` explains the numbers.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_sensi import SensiConfig, compute_scores, load_merged, save_merged

from memory_split import free_at_once, peak_of_process


class Stages:
    """Measures each stage: its seconds, its peak, and the memory that is held after it, in MiB."""

    def __init__(self) -> None:
        free_at_once()
        self.rows: list[dict[str, Any]] = []
        self.empty = peak_of_process(reset=True)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        gc.collect()
        peak_of_process(reset=True)
        start = time.perf_counter()
        yield
        seconds, peak = time.perf_counter() - start, peak_of_process() - self.empty
        gc.collect()
        held = peak_of_process(reset=True) - self.empty
        self.rows.append({"stage": name, "seconds": seconds, "peak": peak / 2**20, "held": held / 2**20})
        print(f"{name}: {seconds:.0f} s, peak {peak / 2**20:,.0f} MiB, held {held / 2**20:,.0f} MiB", flush=True)

    def table(self) -> str:
        lines = ["| stage | peak, MiB | held after it, MiB |", "| --- | ---: | ---: |"]
        return "\n".join([*lines, *(f"| {r['stage']} | {r['peak']:,.0f} | {r['held']:,.0f} |" for r in self.rows)])


def build(options: argparse.Namespace) -> nn.Module:
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=32,
        num_key_value_heads=4,
    )
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(previous)


def batches(options: argparse.Namespace, count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shape = (options.batch, options.length)
    ids = [torch.randint(5, options.vocabulary, shape, generator=generator) for _ in range(count)]
    return [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in ids]


def train(model: nn.Module, steps: list[dict[str, torch.Tensor]]) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model.train()
    for batch in steps:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    stages, data = Stages(), batches(options, options.calibration)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        adapter, merged = Path(name) / "adapter", Path(name) / "merged"
        with stages.stage("base"):
            base = build(options)
        print(f"{sum(p.numel() for p in base.parameters()):,} parameters")
        with stages.stage(f"score (priming with {options.priming_optimizer})"):
            scores = compute_scores(
                base,
                data,
                priming_steps=options.priming_steps,
                priming_optimizer=options.priming_optimizer,
                calibration_steps=options.calibration,
                progress=False,
            )
        with stages.stage("plan, trim, refit"):
            config = SensiConfig(
                budget=json.loads(options.budget),
                scores=scores,
                calibration=data,
                calibration_steps=options.calibration,
                task_type="CAUSAL_LM",
            )
            model = get_peft_model(base, config)
        print(model.base_model.plan().summary())
        with stages.stage(f"train {options.steps} steps"):
            train(model, batches(options, options.steps))
        with torch.no_grad():
            expected = model(**data[0]).logits
        with stages.stage("save"):
            model.save_pretrained(adapter)
        del model, base, scores
        with stages.stage("fresh base"):
            base = build(options)
        with stages.stage("load the adapter"):
            model = PeftModel.from_pretrained(base, adapter)
        with torch.no_grad():
            assert torch.equal(model.eval()(**data[0]).logits, expected)
        with stages.stage("merge"):
            small = model.merge_and_unload()
        del model, base
        with stages.stage("save the merged model"):
            save_merged(small, merged)
        with torch.no_grad():
            expected = small(**data[0]).logits
        del small
        with stages.stage("load the merged model"):
            small = load_merged(merged)
        with torch.no_grad():
            assert torch.equal(small(**data[0]).logits, expected)
    print(stages.table())
    return stages.rows


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--budget", default="0.5", help='as JSON, such as \'{"params": 0.5, "trainable": 0.05}\'')
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--calibration", type=int, default=4, help="number of calibration batches")
    parser.add_argument("--priming-steps", type=int, default=4)
    parser.add_argument("--priming-optimizer", default="sign", choices=["sign", "adamw"])
    parser.add_argument("--steps", type=int, default=10, help="training steps")
    parser.add_argument("--folder", help="where the files are written; a temporary folder by default")
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
