"""Model cards: what an adapter is, how it is loaded, what was asked and what was reached.

The template is `card_template.md`, filled in by `huggingface_hub.ModelCard`. In a card that somebody has edited only
our own section, between two comments, is written anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..planning.plan import Plan, drawn_rows, rows_of
from ..plotting.plots import plot_plan
from ..scoring.scores import Scores
from ..tuner.config import SensiConfig
from ..utils.errors import SensiError
from ..utils.formatting import human, size_of
from ..utils.states import TRIMMED
from .saved import (
    AUTO_CLASSES,
    SavedAdapter,
    budget_words,
    number_of_labels,
    plan_without_weights,
    short_fingerprint,
    unit_facts,
)


TEMPLATE = Path(__file__).with_name("card_template.md")
PICTURE = "plan.png"
BEGIN, END = "<!-- peft_sensi: generated", "<!-- peft_sensi: end -->"
PIPELINES = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "CAUSAL_LM": "text-generation",
    "FEATURE_EXTRACTION": "feature-extraction",
}


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
    """Writes README.md and, where matplotlib is installed, the plan's picture; returns the paths.

    Args:
        results: Measured numbers: a mapping (its `validation` part, where it has one), a list of records, or a file.
        base: The base model, if not the one the adapter names.
        plan: With costs; otherwise it is built from the base's configuration, if that can be had.
        scores: For the picture of the ranking; adapters do not hold them.
    """
    folder = folder or saved.folder
    plan = plan or plan_without_weights(saved, base)
    written = [folder / "README.md"]
    try:
        if plan is not None:
            plan.plot(folder / PICTURE, scores=scores)
        else:
            plot_plan(drawn_rows(saved.config.plan), folder / PICTURE)
        written.append(folder / PICTURE)
    except SensiError:  # no matplotlib
        pass
    name = base or saved.base
    card = new_card(
        saved.config,
        plan,
        base=name,
        repo=repo or saved.folder.name,
        file_bytes=saved.file_bytes,
        picture=PICTURE if len(written) > 1 else None,
        results=results_table(results),
        license=license,
        base_license=license_of(name),
        num_labels=number_of_labels(saved, base),
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
    task = getattr(config.task_type, "value", config.task_type) or ""
    on_hub = base if base and is_repo(base) else None
    # A path says nothing to others, and may say too much.
    base = on_hub or (f"path/to/{Path(base).name}" if base else None)
    data = ModelCardData(
        library_name="peft",
        base_model=on_hub,
        license=license,
        pipeline_tag=PIPELINES.get(task),
        tags=sorted({"peft_sensi", "fine-tuning", *(["pruning"] if trims(config, plan) else []),
                     *([f"base_model:adapter:{on_hub}"] if on_hub else [])}),
    )  # fmt: skip
    auto = config.auto_mapping or {}
    fingerprint = short_fingerprint(config)
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=repo.rpartition("/")[2] or repo,
        base_words=f"[{on_hub}](https://huggingface.co/{on_hub})"
        if on_hub
        else f"`{base or 'an unnamed base model'}`",
        sentence=_sentence(config, plan),
        picture=picture,
        model_class=AUTO_CLASSES.get(task) or str(auto.get("base_model_class") or "AutoModel"),
        base_name=base or "path/to/the/base",
        base_options=f", num_labels={num_labels or '...'}" if task in ("SEQ_CLS", "TOKEN_CLS") else "",
        repo=repo,
        merged_words="a plain model with smaller matrices" if trims(config, plan) else "a plain model",
        budget=_budget_rows(config, plan),
        length_words=f", FLOPs those of one sequence of {plan.sequence_length} tokens" if plan else "",
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
    """Keeps what somebody else wrote into an older card: its metadata, and the text around our section."""
    if path.is_file():
        try:
            old: Any = ModelCard.load(path)
        except (ValueError, OSError):  # not a card
            old = None
        if old is not None:
            ours = _section(card.text)
            before, after = _around(old.text)
            card.text = f"{before}{ours}{after}"
            merged = old.data.to_dict() | {k: v for k, v in card.data.to_dict().items() if v is not None}
            tags = {*(old.data.get("tags") or []), *(card.data.get("tags") or [])}
            # PEFT names a base that may be a path on this machine, which the Hub refuses.
            paths = {tag for tag in tags if tag.startswith("base_model:") and not is_repo(tag.rpartition(":")[2])}
            merged["tags"] = sorted(tags - paths)
            if not is_repo(str(merged.get("base_model") or "")):
                merged.pop("base_model", None)
            card.data = ModelCardData(**merged)
    card.save(path)


def results_table(results: Any) -> str:
    """Markdown. Raises `SensiError` when a file holds no numbers."""
    if results is None:
        return ""
    source = results
    if isinstance(results, (str, Path)):
        try:
            results = json.loads(Path(results).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise SensiError(f"{source} is not JSON: {error}.") from None
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


def license_of(base: str | None) -> str | None:
    """From the base's own card, in its folder or on the Hub; `None` when there is none or the Hub cannot be asked."""
    if not base:
        return None
    try:
        path = Path(base) / "README.md"
        if Path(base).is_dir():
            return ModelCard.load(path).data.get("license") if path.is_file() else None
        return ModelCard.load(base).data.get("license")
    except Exception:  # a card is not worth an error: no network, no repository, no metadata
        return None


def is_repo(name: str) -> bool:
    """Whether this is the name of a repository and not a folder of this machine."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).is_dir()


def trims(config: SensiConfig, plan: Plan | None) -> bool:
    return plan.trims if plan is not None else any(row.count(TRIMMED) for row in rows_of(config.plan))


def _sentence(config: SensiConfig, plan: Plan | None) -> str:
    if plan is None:
        return "; ".join(f"{name}: {what}" for name, what in unit_facts(config.plan).items()) + "."
    parts = []
    if plan.trims:
        parts.append(
            f"{plan.params_share:.1%} of the parameters of its heads and neurons stay "
            f"({plan.model_params_share:.1%} of the whole model), with {plan.flops_share:.1%} of their FLOPs"
        )
    parts.append(f"{plan.trainable_params:,} values were trained ({plan.trainable_share:.2%} of the base)")
    return "; ".join(parts) + "."


def _budget_rows(config: SensiConfig, plan: Plan | None) -> list[tuple[str, str, str]]:
    limits = config.limits if config.budget is not None else None
    asked = {name: getattr(limits, name, None) for name in ("params", "flops", "trainable")}
    reached = dict.fromkeys(asked, "unknown without the base")
    if plan is not None:
        reached = {
            "params": f"{plan.params_share:.2%} ({human(plan.kept_params)})",
            "flops": f"{plan.flops_share:.2%} ({human(plan.kept_flops)})",
            "trainable": f"{plan.trainable_share:.2%} ({plan.trainable_params:,})",
        }
        if not plan.anatomy.trimmable:
            reached |= dict.fromkeys(("params", "flops"), "all: the model has nothing that could be trimmed")
    names = {"params": "parameters kept", "flops": "FLOPs kept", "trainable": "trained values"}
    words = {
        name: budget_words({name: value}).partition(" ")[2] if value is not None else "-"
        for name, value in asked.items()
    }
    return [(names[name], words[name], reached[name]) for name in names]


def _section(text: str) -> str:
    start, end = text.index(BEGIN), text.index(END) + len(END)
    return text[start:end]


def _around(text: str) -> tuple[str, str]:
    """What stands before and after our section; where there is none, everything stands before."""
    if BEGIN in text and END in text[text.index(BEGIN) :]:
        return text[: text.index(BEGIN)], text[text.index(END) + len(END) :]
    return text.rstrip() + "\n\n", "\n"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else f"{value:,}" if _is_number(value) else str(value)
