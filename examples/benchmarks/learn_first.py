"""Trim first, or learn first? Compares the two ways to the same budget on real tasks, also without training after.

    python examples/benchmarks/learn_first.py run --model minilm=FOLDER --data FOLDER --tasks cola trec6 --seeds 0 1 2
    python examples/benchmarks/learn_first.py table --page docs/quality.md

For each model, task and seed, `--ways` selects from:

- `full`: full fine-tuning, and `longer`: with twice the epochs. `prior`: its head starts at the prior of the labels.
- `fast`: `SensiConfig(budget=...)` on the pretrained model, then as many epochs as full fine-tuning, and
  `fast_longer`: then twice the epochs, because the steps of a small model are short.
- `late`: one training of as many epochs, trimmed on the way; `--late-cuts` says after which shares of it.
- `trimmed`: the fully fine-tuned model wrapped with `SensiConfig(budget=1.0)`, then `trim(...)`, no training after.
- `random`: the same with random units, the control that shows what the ranking is worth.
- `healed`: `trimmed`, then one epoch. `taught` is the same; half of its loss is the distance to the fine-tuned model.
- `thorough`: `SensiConfig(budget=1.0)` is trained like full fine-tuning; then `trim(...)`; then no training
  (`0 epochs`), one epoch, or as many epochs as before.

Each row has its own JSON file. Finished rows are not repeated. `--data` has the folders that docs/quality.md
describes.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from collections.abc import Iterable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from torch.nn.functional import kl_div
from transformers import set_seed
from transformers.utils import logging

from peft_sensi import SensiConfig, recipes
from peft_sensi.scoring.head import head_to_train, start_head_at_prior
from peft_sensi.utils.files import read_json_object

import examples_path  # noqa: F401 (for the imports from examples/)
from common import is_done, write_json
from grid import base_name, fit, fresh_base, on_cpu, own_loss, score, slug
from methods import task_type
from pages import write_part
from runner import readable_errors
from tables import read_results, shares_table, ways_summary, ways_table
from tasks import TASKS, Data, load_task


RESULTS = Path(__file__).resolve().parent / "results" / "learn_first"
RATES = (5e-5, 1e-4)  # of a model that learns as a whole, and of one that is trimmed before
LATE = recipes.LATE_CUT["start"]  # when the late way trims


class Rows:
    """Writes one file per row, and skips the work of rows that have one.

    `common` names the rows. `settings` are further settings that change them (see `is_done`).
    """

    def __init__(self, folder: Path, common: dict[str, Any], data: Data, settings: dict[str, Any]) -> None:
        self.folder, self.common, self.data, self.settings = folder, common, data, settings

    def path(self, row: str) -> Path:
        return self.folder / self.common["task"] / f"{self.common['model']}-{slug(row)}-{self.common['seed']}.json"

    def missing(self, *rows: str) -> bool:
        # The precision is that of the machine, and the rows of several machines lie in one folder.
        return not all(is_done(self.path(row), self.settings, noted=["bf16"]) for row in rows)

    def add(self, row: str, model: nn.Module, seconds: float, **more: Any) -> None:
        figures = {split: score(model, self.data, split, self.settings["bf16"]) for split in ("held_out", "dev")}
        named = {**self.common, **self.settings, "method": row}
        write_json(self.path(row), {**named, "seconds": seconds, **figures, **more})
        print(*self.common.values(), row, figures, f"{seconds:.0f} s", flush=True)


class Seed:
    """The trainings of one model, task and seed. A model that several ways need is trained once."""

    def __init__(
        self,
        rows: Rows,
        model_name: str,
        models: Path | None = None,
        rates: Iterable[float] = (),
        late_cuts: Iterable[float] = (LATE,),
    ) -> None:
        self.rows, self.data, self.model_name, self.models = rows, rows.data, model_name, models
        self.rates, self.late_cuts = list(rates), list(late_cuts)
        self.small: dict[float, tuple[Any, float]] = {}
        self.seed, self.epochs = rows.common["seed"], rows.data.task.epochs
        self.rate, self.fast_rate = rows.settings["usual_rates"]
        self.accelerator = on_cpu(rows.settings["bf16"])

    def named(self, row: str, usual: float | None = None) -> dict[str, float]:
        """The name of a row for each learning rate. The usual rate of a way is not part of the name."""
        usual = usual or self.rate
        return {row + f" at {rate:g}" * (rate != usual): rate for rate in self.rates or [usual]}

    def base(self) -> nn.Module:
        """The pretrained model. Its head starts as `SensiConfig` starts one: very uneven labels at their prior."""
        set_seed(self.seed)
        model = fresh_base(self.data.task, self.model_name)
        model.load_state_dict(head_to_train(model, list(self.data.calibration())), strict=False)
        return model

    def fit(self, model: nn.Module, epochs: int, rate: float, seed: int | None = None, **options: Any) -> float:
        return fit(model, self.data, self.accelerator, epochs, rate, self.seed if seed is None else seed, **options)

    def wrapped(self, model: nn.Module, **options: Any) -> tuple[Any, float]:
        """The wrapped model, and the seconds that wrapping took."""
        given = {"calibration": self.data.calibration(), "seed": self.seed, "task_type": task_type(model), **options}
        with self.accelerator.autocast():
            start = time.perf_counter()
            return get_peft_model(model, SensiConfig(**given)), time.perf_counter() - start

    def trim(self, model: Any, budget: float, **options: Any) -> float:
        """Trims a wrapped model, and returns the seconds that this took."""
        with self.accelerator.autocast():
            start = time.perf_counter()
            model.base_model.trim(budget, calibration=self.data.calibration(), **options)
            return time.perf_counter() - start

    def trained(self, epochs: int, rate: float) -> tuple[nn.Module, float]:
        """A fully fine-tuned model, and the seconds of its training."""
        model = self.base()
        return model, self.fit(model, epochs, rate)

    @cached_property
    def full(self) -> tuple[nn.Module, float]:
        """`trained` at the usual rate. An earlier run may have kept it."""
        if self.models is not None:
            folder = self.models / "-".join(str(self.rows.common[name]) for name in ("model", "task", "seed"))
            settings = {"base": self.rows.settings["base"], "bf16": self.rows.settings["bf16"], "rate": self.rate}
            if is_done(times := folder / "seconds.json", settings):
                return fresh_base(self.data.task, str(folder)), read_json_object(times)["seconds"]
        model, seconds = self.trained(self.epochs, self.rate)
        if self.models is not None:
            model.save_pretrained(folder)
            write_json(times, {**settings, "seconds": seconds})
        return model, seconds


def full(run: Seed, budgets: list[float]) -> None:
    for row, rate in run.named("full").items():
        if run.rows.missing(row):
            run.rows.add(row, *(run.full if rate == run.rate else run.trained(run.epochs, rate)))


def longer(run: Seed, budgets: list[float]) -> None:
    if run.rows.missing(row := "full, twice as long"):
        run.rows.add(row, *run.trained(2 * run.epochs, run.rate))


def prior(run: Seed, budgets: list[float]) -> None:
    if run.rows.missing(row := "full, head at the prior"):
        model = run.base()
        start_head_at_prior(model, list(run.data.calibration()))
        run.rows.add(row, model, run.fit(model, run.epochs, run.rate))


def fast(run: Seed, budgets: list[float], longer: bool = False) -> None:
    for budget in budgets:
        for row, rate in run.named(f"fast to {budget:g}{', twice as long' * longer}", run.fast_rate).items():
            if run.rows.missing(row):
                model, seconds = run.wrapped(run.base(), budget=budget)
                run.rows.add(row, model, seconds + run.fit(model, (1 + longer) * run.epochs, rate))


def fast_longer(run: Seed, budgets: list[float]) -> None:
    fast(run, budgets, longer=True)


def late(run: Seed, budgets: list[float]) -> None:
    for budget, cut in itertools.product(budgets, run.late_cuts):
        schedule = {**recipes.LATE_CUT, "start": cut, "end": cut}
        for row, rate in run.named(f"late to {budget:g}" + f", cut at {cut:g}" * (cut != LATE)).items():
            if run.rows.missing(row):
                model, seconds = run.wrapped(run.base(), budget=budget, schedule=schedule)
                run.rows.add(row, model, seconds + run.fit(model, run.epochs, rate))


def trimmed(run: Seed, budgets: list[float]) -> None:
    for budget in budgets:
        if run.rows.missing(row := f"fine-tuned, trimmed to {budget:g}"):
            run.rows.add(row, *small(run, budget))


def random(run: Seed, budgets: list[float]) -> None:
    for budget in budgets:
        if run.rows.missing(row := f"fine-tuned, random units trimmed to {budget:g}"):
            run.rows.add(row, *trimmed_copy(run, budget, score="random"))


def healed(run: Seed, budgets: list[float], teach: bool = False) -> None:
    for budget in budgets:
        rows = run.named(f"fine-tuned, trimmed to {budget:g}, 1 epoch after{', taught' * teach}")
        if not run.rows.missing(*rows):
            continue
        trimmed, seconds = small(run, budget)
        loss_fn = partial(taught_loss, teacher=run.full[0].eval()) if teach else own_loss
        for row, rate in rows.items():
            model = copy.deepcopy(trimmed)
            run.rows.add(row, model, seconds + run.fit(model, 1, rate, run.seed + 100, loss_fn=loss_fn))


def small(run: Seed, budget: float) -> tuple[Any, float]:
    """`trimmed_copy`, made once for all ways that start from it."""
    if budget not in run.small:
        run.small[budget] = trimmed_copy(run, budget)
    return run.small[budget]


def trimmed_copy(run: Seed, budget: float, **options: Any) -> tuple[Any, float]:
    """The fine-tuned model, trimmed, and the seconds that this took."""
    model, seconds = run.wrapped(copy.deepcopy(run.full[0]), budget=1.0)
    return model, seconds + run.trim(model, budget, **options)


def taught(run: Seed, budgets: list[float]) -> None:
    healed(run, budgets, teach=True)


def thorough(run: Seed, budgets: list[float]) -> None:
    """The rates of `--rates` are those after the trim."""
    healing = dict.fromkeys((1, run.epochs))
    rows = {(b, n): run.named(f"thorough to {b:g}, {n} epochs after") for b in budgets for n in healing}
    untouched = {b: f"thorough to {b:g}, 0 epochs after" for b in budgets}
    if not run.rows.missing("thorough, untrimmed", *untouched.values(), *itertools.chain(*rows.values())):
        return
    whole, seconds = run.wrapped(run.base(), budget=1.0)
    seconds += run.fit(whole, run.epochs, run.rate)
    run.rows.add("thorough, untrimmed", whole, seconds)
    for budget in budgets:
        small = copy.deepcopy(whole)
        seconds_there = seconds + run.trim(small, budget)
        run.rows.add(untouched[budget], small, seconds_there)
        for count in healing:
            for row, rate in rows[budget, count].items():
                healed = copy.deepcopy(small)
                more = run.fit(healed, count, rate, run.seed + 100)
                run.rows.add(row, healed, seconds_there + more)


_ALL = (full, trimmed, random, healed, taught, late, thorough, fast, fast_longer, longer, prior)
WAYS = {way.__name__: way for way in _ALL}


def taught_loss(model: nn.Module, batch: Mapping[str, torch.Tensor], teacher: nn.Module) -> torch.Tensor:
    """The mean of the loss of the labels and of the distance to the teacher: the divergence of its classes (Hinton et
    al. 2015), and the squared distance of the last hidden states, relative to their size (Jiao et al. 2020)."""
    with torch.no_grad():
        wanted = teacher(**batch, output_hidden_states=True)
    output = model(**batch, output_hidden_states=True)
    words = batch["attention_mask"].bool()
    if "logits" in output:
        logits = [(output.logits, wanted.logits)]
    else:
        logits = [(output[name], wanted[name]) for name in ("start_logits", "end_logits")]
    parts = []
    for own, target in logits:
        own, target = (x[words] if own.dim() == 3 else x for x in (own.float(), target.float()))
        parts.append(kl_div(own.log_softmax(-1), target.log_softmax(-1), reduction="batchmean", log_target=True))
    states, targets = (o.hidden_states[-1][words].float() for o in (output, wanted))
    distance = (states - targets).square().sum() / targets.square().sum()
    return (output.loss + sum(parts) / len(parts) + distance) / 2


def settings_of(model_name: str, bf16: bool, usual_rates: Iterable[float] = RATES) -> dict[str, Any]:
    """The settings of a run that change its rows and are not in their names."""
    return {"base": base_name(model_name), "bf16": bf16, "usual_rates": list(usual_rates)}


def run_seed(
    rows: Rows,
    model_name: str,
    budgets: list[float],
    ways: Iterable[str] = WAYS,
    models: Path | None = None,
    **more: Any,
) -> None:
    run = Seed(rows, model_name, models, **more)
    for way in ways:
        WAYS[way](run, budgets)


@readable_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--model", required=True, help="NAME=FOLDER; the name is used in the table")
    run.add_argument("--data", type=Path, required=True)
    run.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    run.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    run.add_argument("--budgets", nargs="+", type=float, default=[0.5, 0.25, 0.1])
    run.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    run.add_argument("--models", type=Path, help="folder that keeps fully fine-tuned models for later runs")
    run.add_argument(
        "--usual-rates",
        nargs=2,
        type=float,
        default=RATES,
        help="of all ways, and of those that trim first; not part of the names of rows",
    )
    run.add_argument(
        "--rates",
        nargs="+",
        type=float,
        default=[],
        help="of the ways full, late, fast, fast_longer, healed, taught, thorough",
    )
    run.add_argument("--late-cuts", nargs="+", type=float, default=[LATE], help="when the way `late` trims")
    run.add_argument("--bf16", action="store_true", help="autocast to bfloat16; slow on CPUs without its instructions")
    for command in (run, commands.add_parser("table")):
        command.add_argument("--results", type=Path, default=RESULTS)
        command.add_argument("--page", type=Path, help="page with the markers of the tables")
    options = parser.parse_args()
    if options.command == "run":
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        name, _, folder = options.model.partition("=")
        for seed in options.seeds:
            for task in options.tasks:
                common = {"model": name, "task": task, "seed": seed}
                data = load_task(TASKS[task], options.data, folder, seed)
                settings = settings_of(folder, options.bf16, options.usual_rates)
                rows = Rows(options.results, common, data, settings)
                given = (options.budgets, options.ways, options.models)
                run_seed(rows, folder, *given, rates=options.rates, late_cuts=options.late_cuts)
    results = read_results(options.results)
    tables = {"shares": shares_table, "means": ways_summary, "rows": ways_table}
    for name, found in ((f"learn_first_{name}", table(results)) for name, table in tables.items()):
        print(found)
        if options.page is not None:
            write_part(options.page, name, found)


if __name__ == "__main__":
    main()
