"""Where the time of a wrap goes: priming, scoring and the refit, in full training steps.

    python examples/benchmarks/wrap_cost.py --shapes minilm bert-base --rows 2000 20000

The models have random weights, because values do not change the cost. Rows are random tokens whose lengths have a
gamma distribution, in batches of similar length, as in training. One unit is the mean time of a full fine-tuning step
in float32 over every fourth of the batches that the wrap reads; these steps are made before the wrap and again after
it. Times are CPU times of one process with one thread, because other work on the machine changes them the least.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification
from transformers.trainer_pt_utils import LengthGroupedSampler

from peft_sensi import SensiConfig
from peft_sensi.planning import least_squares, refit
from peft_sensi.scoring import criteria, learned, priming
from peft_sensi.utils.files import write_json_atomically


SHAPES = {
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "bert-base": {},
}
# The parts of a wrap, and the functions that do their work. Time counts for the innermost function.
PARTS: dict[str, tuple[tuple[Any, str], ...]] = {
    "priming": ((priming, "_prime"),),
    "learned": ((learned, "share_learned"),),
    "scoring": ((criteria, "find_weighting"), (criteria, "gate_gradients")),
    "refit: layers": ((refit, "refit"),),
    "refit: sums": ((least_squares.LeastSquares, "add"),),
    "refit: solving": ((least_squares.LeastSquares, "solve"),),
    "refit: guards": ((least_squares.GuardErrors, "add"), (refit, "_trimmed_loss")),
}


class Clock:
    """Adds up CPU time by part. Inside `part`, the time of the part around it stands still."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.parts: list[str] = []
        self.since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._book()
        self.parts.append(name)
        try:
            yield
        finally:
            self._book()
            self.parts.pop()

    def _book(self) -> None:
        now = time.process_time()
        if self.parts:
            self.seconds[self.parts[-1]] += now - self.since
        self.since = now

    def timed(self, name: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return call


def batches_of(rows: int, length: float, vocabulary: int, size: int) -> list[dict[str, torch.Tensor]]:
    """Padded batches of `size` rows, in the order of one epoch. `length` is the mean length of a row in tokens."""
    generator = torch.Generator().manual_seed(0)
    gamma = torch.distributions.Gamma(4.0, 4.0 / length)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lengths = gamma.sample((rows,)).round().clamp(4, 128).long().tolist()
    order = list(LengthGroupedSampler(size, lengths=lengths, generator=generator))
    made = []
    for at in range(0, rows - size + 1, size):
        own = torch.tensor([lengths[i] for i in order[at : at + size]])
        mask = (torch.arange(int(own.max())) < own[:, None]).long()
        ids = torch.randint(5, vocabulary, mask.shape, generator=generator) * mask
        labels = torch.randint(0, 2, (size,), generator=generator)
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def full_steps(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> list[float]:
    """CPU seconds of a full fine-tuning step on each batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    model.train()
    seconds = []
    for batch in [batches[0], *batches]:
        start = time.process_time()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - start)
    return seconds[1:]  # the first step makes the optimizer's state


def measure(shape: str, rows: int, length: float, size: int, **settings: Any) -> dict[str, float]:
    """Costs of the parts in full training steps, their sum, and what share of an epoch that is."""
    config = SensiConfig(task_type="SEQ_CLS", **settings)
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SHAPES[shape]))
    calibration = batches_of(rows, length, model.config.vocab_size, size)
    config.calibration = calibration
    sample = calibration[: max(config.priming_steps, config.calibration_steps) : 4]
    clock = Clock()
    steps = full_steps(model, sample)
    with ExitStack() as stack:
        for name, functions in PARTS.items():
            for owner, function in functions:
                replacement = clock.timed(name, getattr(owner, function))
                stack.enter_context(mock.patch.object(owner, function, replacement))
        # These labels are random. Priming would go on, as it does not where something can be learned.
        stack.enter_context(mock.patch.object(learned, "ENOUGH", -math.inf))
        # `decision` has imported the function under its own name.
        stack.enter_context(mock.patch("peft_sensi.tuner.decision.refit", refit.refit))
        with clock.part("the rest"):
            get_peft_model(model, config)
    model = BertForSequenceClassification(BertConfig(**SHAPES[shape]))
    steps += full_steps(model, sample)
    unit = statistics.fmean(steps)
    found = {part: clock.seconds[part] / unit for part in (*PARTS, "the rest")}
    total = sum(found.values())
    return {"step, s": unit, **found, "the wrap": total, "share of an epoch": total / len(calibration)}


def table(results: dict[str, dict[str, float]]) -> str:
    columns = list(next(iter(results.values())))
    lines = [f"| | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    for name, found in results.items():
        lines.append(f"| {name} | {' | '.join(f'{found[column]:.2f}' for column in columns)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["minilm", "bert-base"])
    parser.add_argument("--rows", nargs="+", type=int, default=[2000, 20000])
    parser.add_argument("--lengths", nargs="+", type=float, default=[12.0, 32.0], help="mean tokens of a row")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--budget", type=float, default=0.5)
    for name in ("priming_steps", "calibration_steps"):
        default = getattr(SensiConfig, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    results = {}
    for shape in options.shapes:
        for length in options.lengths:
            for rows in options.rows:
                name = f"{shape}, {rows} rows of {length:g} tokens"
                settings = {key: getattr(options, key) for key in ("budget", "priming_steps", "calibration_steps")}
                results[name] = measure(shape, rows, length, options.batch_size, **settings)
                print(table({name: results[name]}), flush=True)
    print(table(results))
    if options.output:
        write_json_atomically(options.output, results)
    return results


if __name__ == "__main__":
    main()
