"""How close the ranking of a wrap is to that of a long priming on many examples: the share of best units in common.

    python examples/benchmarks/rankings.py --model BERT --data FOLDER --bf16

A setting is named `<priming steps>x<examples of a step>/<scored batches>`. Its ranking is compared with the mean of
two rankings of `REFERENCE`, made with other seeds. Each row is a mean over seeds. All heads are ranked together, by
score per parameter, and so are all neurons.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from pathlib import Path
from unittest import mock

import torch
from transformers import set_seed
from transformers.utils import logging

from peft_sensi import compute_scores
from peft_sensi.anatomy.build import build_anatomy
from peft_sensi.scoring import priming
from peft_sensi.utils.progress import progress_bar

from grid import fresh_base
from tasks import TASKS, Data, load_task


REFERENCE = "64x32/64"
SHARES = {"head": (0.5, 0.25), "neuron": (0.5, 0.25, 0.1)}

Ranking = dict[str, torch.Tensor]  # scores per parameter of all heads and of all neurons, `[units]`


def ranking(data: Data, model_name: str, setting: str, bf16: bool) -> Ranking:
    """The scores of a fresh model under this setting, each kind divided by its mean."""
    steps, rest = setting.split("x")
    examples, batches = rest.split("/")
    set_seed(data.seed)
    base = fresh_base(data.task, model_name)
    precision = torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()
    options = {"priming_steps": int(steps), "calibration_steps": int(batches), "seed": data.seed, "progress": False}
    with precision, mock.patch.object(priming, "EXAMPLES", int(examples)):
        scores = compute_scores(base, data.calibration(), **options)
    groups = build_anatomy(base).groups
    found = {
        kind: torch.cat([scores.values[g.name] / g.unit_params for g in groups if g.kind == kind]) for kind in SHARES
    }
    return {kind: values / values.mean() for kind, values in found.items()}


def in_common(a: torch.Tensor, b: torch.Tensor, share: float) -> float:
    """The share of the best units of `b` that are among as many best units of `a`."""
    count = max(1, int(share * len(b)))
    best = set(b.topk(count).indices.tolist())
    return len(best & set(a.topk(count).indices.tolist())) / count


def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["sst2", "trec6"])
    parser.add_argument("--settings", nargs="+", default=["32x8/12", "32x32/12", "48x6/8"])
    parser.add_argument("--reference", default=REFERENCE)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--bf16", action="store_true", help="under bfloat16 autocast")
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()  # no warnings about fresh heads
    columns = [f"{share:.0%} of the {kind}s" for kind, shares in SHARES.items() for share in shares]
    lines = ["| task | setting | " + " | ".join(columns) + " |", "| --- | --- " + "| ---: " * len(columns) + "|"]
    others = [max(options.seeds) + extra for extra in (1, 2)]
    for task in options.tasks:
        data = {seed: load_task(TASKS[task], options.data, options.model, seed) for seed in (*options.seeds, *others)}
        both = [ranking(data[seed], options.model, options.reference, options.bf16) for seed in others]
        reference = {kind: both[0][kind] + both[1][kind] for kind in SHARES}
        for setting in progress_bar(options.settings, task):
            found = [ranking(data[seed], options.model, setting, options.bf16) for seed in options.seeds]
            cells = [
                statistics.fmean(in_common(one[kind], reference[kind], share) for one in found)
                for kind, shares in SHARES.items()
                for share in shares
            ]
            lines.append(f"| {task} | {setting} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    table = "\n".join(lines)
    print(table)
    return table


if __name__ == "__main__":
    main()
