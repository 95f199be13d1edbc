"""Model cards: what an adapter is, how it is loaded, what its budget asked for and what was reached.

`huggingface_hub.ModelCard` fills in the template, `card_template.md`. In a card that exists already, only the section
between our two comments is replaced; what others wrote around it stays.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..anatomy.latency import LABELS, latency_facts
from ..planning.plan import Plan, drawn_rows, rows_of
from ..plotting.plots import plot_plan
from ..scoring.scores import Scores
from ..tuner.config import SensiConfig
from ..utils.errors import SensiError, how_to_install
from ..utils.files import read_json
from ..utils.formatting import human, size_of
from ..utils.states import TRIMMED
from .facts import limit_words, unit_facts
from .saved import TASKS, SavedAdapter, base_config, plan_without_weights, short_fingerprint, task_of


TEMPLATE = Path(__file__).with_name("card_template.md")
PICTURE = "plan.png"
BUDGET_LABELS = {"params": "prunable parameters kept", "flops": "prunable FLOPs kept", "trainable": "trained values"}
BEGIN, END = "<!-- peft_sensi: generated", "<!-- peft_sensi: end -->"


def write_card(
    saved: SavedAdapter,
    *,
    results: str | Path | Mapping[str, Any] | list | None = None,
    license: str | None = None,
    base: str | None = None,
    plan: Plan | None = None,
    scores: Scores | None = None,
    repo: str | None = None,
    folder: Path | None = None,
) -> list[Path]:
    """Writes README.md and, if matplotlib is installed, a picture of the plan. Returns the paths of both.

    Args:
        saved: The adapter that the card is about.
        results: Measured numbers: a mapping (with a key `validation`, only the numbers in it are shown), a list of
            records, or the path of a JSON file with one of them.
        license: The adapter's license, for the metadata.
        base: Name or folder of the base model, if not the one that the adapter names.
        plan: The adapter's plan with its costs. By default it is computed from the base model's config, if possible.
        scores: The scores of the units, for a picture of the ranking. Adapters do not contain them.
        repo: The adapter's name on the Hub, for the title and the example.
        folder: Where the files are written. Default: the adapter's folder.

    Raises:
        SensiError: `results` contains no numbers, or a file of results cannot be read.
    """
    folder = folder or saved.folder
    plan = plan or plan_without_weights(saved, base)
    written = [folder / "README.md"]
    with suppress(SensiError):  # no matplotlib
        if plan is not None:
            plan.plot(folder / PICTURE, scores=scores)
        else:
            plot_plan(drawn_rows(saved.config.plan), folder / PICTURE)
        written.append(folder / PICTURE)
    name, base_license, num_labels = base or saved.base, None, None
    with suppress(SensiError, OSError, ValueError):  # the base model's config cannot be loaded
        num_labels = base_config(saved, base).num_labels
    with suppress(Exception):  # no card, no license in it, no network: the adapter's card is written all the same
        source = Path(str(name)) / "README.md" if Path(str(name)).is_dir() else str(name)
        base_license = ModelCard.load(source).data.get("license") if name else None
    card = new_card(
        saved.config,
        plan,
        base=name,
        repo=repo or saved.folder.name,
        file_bytes=saved.file_bytes,
        picture=PICTURE if len(written) > 1 else None,
        results=results_table(results),
        license=license,
        base_license=base_license,
        num_labels=num_labels,
    )
    save_card(card, folder / "README.md")
    return written


def new_card(
    config: SensiConfig,
    plan: Plan | None,
    *,
    base: str | None,
    repo: str,
    file_bytes: int | None = None,
    picture: str | None = None,
    results: str = "",
    license: str | None = None,
    base_license: str | None = None,
    num_labels: int | None = None,
) -> ModelCard:
    """Fills in the template. Without a plan, the card contains numbers of units instead of shares."""
    task = task_of(config) or ""
    auto_class, pipeline = TASKS.get(task, (None, None))
    on_hub = base if base and is_repo(base) else None
    # Only the last part of a path is shown: the rest helps nobody and may be private.
    base = on_hub or (f"path/to/{Path(base).name}" if base else None)
    trims = plan.trims if plan is not None else any(row.count(TRIMMED) for row in rows_of(config.plan))
    data = ModelCardData(
        library_name="peft",
        base_model=on_hub,
        license=license,
        pipeline_tag=pipeline,
        tags=sorted({"peft_sensi", "fine-tuning", *(["pruning"] if trims else []),
                     *([f"base_model:adapter:{on_hub}"] if on_hub else [])}),
    )  # fmt: skip
    fingerprint = short_fingerprint(config)
    facts, budget = None if plan is None else plan.facts(human), []
    for name, label in BUDGET_LABELS.items():
        limit = getattr(config.limits, name)
        reached = "unknown without the base" if facts is None else facts.get(label, "all: this adapter trims nothing")
        budget.append((label, "-" if limit is None else limit_words(limit), reached))
    for name in config.latency or {}:
        limit, predicted = getattr(config.limits, name), latency_facts(config.latency)[LABELS[name]]
        budget.append((LABELS[name], "-" if limit is None else limit_words(limit), predicted))
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=repo.rpartition("/")[2] or repo,
        base_words=f"[{on_hub}](https://huggingface.co/{on_hub})"
        if on_hub
        else f"`{base or 'an unnamed base model'}`",
        sentence=_sentence(config, plan),
        picture=picture,
        install=how_to_install(),
        model_class=auto_class or str((config.auto_mapping or {}).get("base_model_class") or "AutoModel"),
        base_name=base or "path/to/the/base",
        base_options=f", num_labels={num_labels or '...'}" if task in ("SEQ_CLS", "TOKEN_CLS") else "",
        repo=repo,
        merged_words="a plain model with smaller matrices" if trims else "a plain model",
        budget=budget,
        results=results,
        provenance=[
            ("base model", f"`{base or 'unknown'}`"),
            ("license of the base", base_license or "see the base model's card"),
            ("license of the adapter", license or "not stated"),
            ("fingerprint of the base", f"`{fingerprint}`" if fingerprint else "none"),
            ("ranked by", f"`{config.score}`, seed {config.seed}"),
            (
                "update",
                f"`{config.update}`{f' of rank {config.rank}' if config.rank else ''}, by {config.granularity}",
            ),
            *([("size", size_of(file_bytes))] if file_bytes else []),
        ],
    )


def save_card(card: ModelCard, path: Path) -> None:
    """Saves the card. If there is one already, its metadata and the text around our section stay."""
    try:
        old: Any = ModelCard.load(path) if path.is_file() else None
    except (ValueError, OSError):  # the file is not a card, and is replaced
        old = None
    if old is not None:
        section = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
        ours = section.search(card.text)[0]  # type: ignore[index]
        replaced, count = section.subn(lambda _: ours, old.text, count=1)
        card.text = replaced if count else f"{old.text.rstrip()}\n\n{ours}\n"  # a new section belongs at the end
        merged = old.data.to_dict() | {k: v for k, v in card.data.to_dict().items() if v is not None}
        tags = {*(old.data.get("tags") or []), *(card.data.get("tags") or [])}
        # PEFT writes the base's name even if it is a path on this machine, and the Hub refuses such metadata.
        paths = {tag for tag in tags if tag.startswith("base_model:") and not is_repo(tag.rpartition(":")[2])}
        merged["tags"] = sorted(tags - paths)
        if not is_repo(str(merged.get("base_model") or "")):
            merged.pop("base_model", None)
        card.data = ModelCardData(**merged)
    card.save(path)


def results_table(results: Any) -> str:
    """Measured numbers as a Markdown table; see `write_card` for their forms and the errors. Empty for `None`."""
    if results is None:
        return ""
    source = results
    if isinstance(results, (str, Path)):
        results = read_json(results)
    if isinstance(results, Mapping):
        numbers = results["validation"] if isinstance(results.get("validation"), Mapping) else results
        rows = [(name, _cell(value)) for name, value in numbers.items() if _is_number(value)]
        counts = results.get("rows")
        if isinstance(counts, Mapping):
            rows += [(f"{name} rows", _cell(value)) for name, value in counts.items() if _is_number(value)]
        header = ["measure", "value"]
    else:
        records = [record for record in results if isinstance(record, Mapping)] if isinstance(results, list) else []
        header = list(dict.fromkeys(k for r in records for k, v in r.items() if isinstance(v, str) or _is_number(v)))
        rows = [tuple(_cell(record.get(name)) for name in header) for record in records]  # type: ignore[misc]
    if not rows:
        raise SensiError(f"There are no numbers for the card in {source!r:.80}.")
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else f"{value:,}" if _is_number(value) else str(value)


def is_repo(name: str) -> bool:
    """Whether this can be the name of a repository on the Hub. An existing folder is not one."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).is_dir()


def _sentence(config: SensiConfig, plan: Plan | None) -> str:
    if plan is None:
        facts = "; ".join(f"{name}: {what}" for name, what in unit_facts(config.plan).items())
        return f"{facts or 'its plan has no units'}."
    update = f": {plan.update_words}" if plan.update else ""
    trained = f"{plan.trainable_params:,} values were trained ({plan.trainable_share:.2%} of the base){update}."
    if not plan.trims:
        return trained
    return (
        f"it keeps {plan.params_share:.1%} of the parameters of the base's heads and neurons "
        f"({plan.model_params_share:.1%} of the whole model), with {plan.flops_share:.1%} of their FLOPs; {trained}"
    )
