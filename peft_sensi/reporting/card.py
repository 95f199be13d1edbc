"""Model cards: what an adapter is, how it is loaded, what its budget asked for and what was reached.

`huggingface_hub.ModelCard` fills in the template, `card_template.md`. In a card that exists already, only the section
between our two comments is replaced; what others wrote around it stays.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoConfig

from ..anatomy.latency import LABELS, latency_facts
from ..planning.plan import Plan
from ..planning.rows import drawn_rows, rows_of
from ..plotting.plots import plot_plan
from ..scoring.scores import Scores
from ..tuner.config import SensiConfig
from ..utils.checks import is_number
from ..utils.errors import SensiError, how_to_install
from ..utils.formatting import human, size_of
from ..utils.hub_names import is_repo, reading
from ..utils.states import TRIMMED
from ..utils.task_types import describe_type
from .card_files import load_card, save_card
from .facts import limit_words, unit_facts
from .pretrained import TOKENIZER_CONFIG, load_pretrained
from .results import model_index, results_table, training_rows
from .saved import (
    CARD,
    PICTURE,
    SavedAdapter,
    base_config,
    head_settings_of,
    plan_without_weights,
    short_fingerprint,
)
from .saved_merged import SavedMerged, merged_facts, merged_figures
from .snippets import Head, adapter_snippet, merged_snippet
from .task_record import checked_record, metrics_of
from .uploads import last_part


TEMPLATE = Path(__file__).with_name("card_template.md")
BUDGET_LABELS = {"params": "prunable parameters kept", "flops": "prunable FLOPs kept", "trainable": "trained values"}


def write_card(
    saved: SavedAdapter | SavedMerged,
    *,
    results: str | Path | Mapping[str, Any] | list | None = None,
    license: str | None = None,
    base: str | None = None,
    plan: Plan | None = None,
    scores: Scores | None = None,
    repo: str | None = None,
    folder: Path | None = None,
) -> list[Path]:
    """Writes README.md and, for an adapter and if matplotlib is installed, a picture of the plan. Returns their paths.

    Args:
        saved: The adapter or the merged model that the card is about.
        results: Measured numbers: a mapping (with a key `validation`, only the numbers in it are shown), a list of
            records, or the path of a JSON file with one of them. Default: `metrics.json` of the folder, if there is
            one. The training, too, is described from there.
        license: The license of the adapter or the model. Default: the one in the metadata of the card that is there.
        base: Name or folder of the base model, if not the one that the adapter names. A folder is read, but not named
            if the adapter names a repository.
        plan: The adapter's plan with its costs. By default it is computed from the base model's config, if possible.
        scores: The scores of the units, for a picture of the ranking. Adapters do not contain them.
        repo: The name on the Hub, for the title and the example. Default: the name of the folder.
        folder: Where the files are written. Default: the adapter's folder.

    Raises:
        SensiError: `results` contains no numbers, a file of results cannot be read, or README.md cannot be written.
        FileNotFoundError: There is no file `results`.
    """
    folder = folder or saved.folder
    if (folder / CARD).exists():  # an error must come before the picture is replaced
        license = license or load_card(folder / CARD).data.get("license")
    metrics = metrics_of(saved.folder)
    if results is None and isinstance(metrics.get("validation"), Mapping):
        results = metrics
    if isinstance(saved, SavedMerged):
        known = named_base(base, str(metrics["model"]) if metrics.get("model") else None)
        card = merged_card(saved, repo or saved.name, metrics, results_table(results), license, known)
        save_card(card, folder / CARD, {saved.name})
        return [folder / CARD]
    plan = plan or plan_without_weights(saved, base)
    written = [folder / CARD]
    try:
        if plan is not None:
            plan.plot(folder / PICTURE, scores=scores)
        else:
            plot_plan(drawn_rows(saved.config.plan), folder / PICTURE)
        written.append(folder / PICTURE)
    except SensiError as error:
        if find_spec("matplotlib") is not None:
            warnings.warn(f"The card gets no picture: {error}", stacklevel=2)
    source = base or saved.base
    settings, count, other_head = head_settings_of(saved), None, False
    with suppress(SensiError, OSError, ValueError):  # the base model's config cannot be loaded
        count = base_config(saved, base).num_labels
        other_head = load_pretrained(AutoConfig, str(source)).num_labels != count
    names = settings.get("labels") or []
    card = new_card(
        saved.config,
        plan,
        base=named_base(base, saved.base),
        repo=repo or saved.name,
        head=Head(saved.task, count or len(names) or None, names, settings.get("problem_type"),
                  checked_record(metrics.get("task"))),
        has_tokenizer=(saved.folder / TOKENIZER_CONFIG).is_file(),
        other_head=other_head,
        file_bytes=saved.file_bytes,
        picture=PICTURE if len(written) > 1 else None,
        results=results_table(results),
        metrics=metrics,
        license=license,
        base_license=_license_of(source) if source else None,
    )  # fmt: skip
    save_card(card, folder / CARD, {saved.name, saved.folder.resolve().name})
    return written


def _license_of(base: str) -> str | None:
    """The license in a base model's card. `None` without a card, or without a connection."""
    with suppress(Exception), reading(base):
        return ModelCard.load(Path(base) / CARD if Path(base).is_dir() else base).data.get("license")
    return None


def new_card(
    config: SensiConfig,
    plan: Plan | None,
    *,
    base: str | None,
    repo: str,
    head: Head,
    has_tokenizer: bool = False,
    other_head: bool = False,
    file_bytes: int | None = None,
    picture: str | None = None,
    results: str = "",
    metrics: Mapping[str, Any] | None = None,
    license: str | None = None,
    base_license: str | None = None,
) -> ModelCard:
    """Fills in the template for an adapter. Without a plan, the card contains numbers of units instead of shares."""
    task_type = describe_type(head.task)
    on_hub, shown = _base_words(base)
    trims = plan.trims if plan is not None else any(row.count(TRIMMED) for row in rows_of(config.plan))
    tags = [*(["pruning"] if trims else []), *([f"base_model:adapter:{on_hub}"] if on_hub else [])]
    model_class = task_type.auto_class or str((config.auto_mapping or {}).get("base_model_class") or "AutoModel")
    code = adapter_snippet(
        head, model_class, shown or "path/to/the/base", repo, repo if has_tokenizer else shown or "path/to/the/base",
        "a plain model with smaller matrices" if trims else "a plain model", other_head,
    )  # fmt: skip
    fingerprint = short_fingerprint(config)
    link = f"[{on_hub}](https://huggingface.co/{on_hub})" if on_hub else f"`{shown or 'an unnamed base model'}`"
    return _fill(
        repo, metrics or {}, task_type.pipeline, license, tags, on_hub,
        sentence=f"An adapter for {link}, made with `peft_sensi`, a method for "
        f"[PEFT](https://github.com/huggingface/peft): {_sentence(config, plan)}",
        picture=picture,
        code=code,
        budget=_budget(config, plan),
        results=results,
        provenance=[
            ("base model", f"`{shown or 'unknown'}`"),
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
        closing="The fingerprint describes the base's weights. Loading the adapter on another base is an error.",
    )  # fmt: skip


def merged_card(
    saved: SavedMerged, repo: str, metrics: Mapping[str, Any], results: str, license: str | None, base: str | None
) -> ModelCard:
    """Fills in the template for a merged model."""
    figures = merged_figures(saved)
    on_hub, shown = _base_words(base)
    task_type = describe_type(saved.task)
    head = Head(saved.task, None, saved.labels, saved.values.get("problem_type"), checked_record(metrics.get("task")))
    facts = merged_facts(figures)
    origin = f"from `{shown}` " if shown else ""
    # The config of a plain checkpoint has the present widths only. Then the record of its training may tell.
    plan = metrics.get("plan")
    share = plan.get("params_share") if isinstance(plan, Mapping) else None
    is_smaller = any(group["kept"] < group["size"] for group in figures["groups"])
    is_smaller |= is_number(share) and float(share or 0) < 1
    done = "an adapter was merged into its weights"
    if is_smaller:
        done = "the attention heads and neurons that matter least were removed, so its matrices are smaller"
    tags = [*(["pruning"] if is_smaller else []), *([f"base_model:finetune:{on_hub}"] if on_hub else [])]
    return _fill(
        repo, metrics, task_type.pipeline, license, tags, on_hub, library="transformers",
        sentence=f"A {saved.architecture}, made {origin}with `peft_sensi`: {done}. It has {facts['parameters']} "
        f"parameters.",
        picture=None,
        code=merged_snippet(head, task_type.auto_class or saved.architecture, repo, saved.is_plain),
        budget=[],
        results=results,
        provenance=[
            *([("base model", f"`{shown}`")] if shown else []),
            ("license", license or "not stated"),
            ("size", facts["file"]),
            ("loads with", facts["loads with"]),
        ],
        closing="",
    )  # fmt: skip


def _fill(
    repo: str,
    metrics: Mapping[str, Any],
    pipeline: str | None,
    license: str | None,
    tags: list[str],
    base: str | None,
    *,
    library: str = "peft",
    **parts: Any,
) -> ModelCard:
    title = repo.rpartition("/")[2] or repo
    evaluated = model_index(metrics, pipeline)
    data = ModelCardData(
        library_name=library, base_model=base, license=license, pipeline_tag=pipeline,
        tags=sorted({"peft_sensi", "fine-tuning", *tags}), model_name=title if evaluated else None,
        eval_results=evaluated,
    )  # fmt: skip
    return ModelCard.from_template(
        data, template_path=str(TEMPLATE), title=title, install=how_to_install(), training=training_rows(metrics),
        **parts,
    )  # fmt: skip


def named_base(given: str | None, own: str | None) -> str | None:
    """The base that a card names: the given one, or else the model's own; but not a folder that stands for its own."""
    is_copy = given is not None and own is not None and is_repo(own) and not is_repo(given)
    return own if is_copy else given or own


def _base_words(base: str | None) -> tuple[str | None, str | None]:
    """The base's name on the Hub, if it has one, and the name to show."""
    on_hub = base if base and is_repo(base) else None
    # Only the last part of a path is shown: the rest helps nobody and may be private.
    return on_hub, on_hub or (f"path/to/{last_part(base)}" if base else None)


def _budget(config: SensiConfig, plan: Plan | None) -> list[tuple[str, str, str]]:
    """What was asked and reached, without lines that say nothing."""
    facts, rows = None if plan is None else plan.facts(human), []
    for name, label in BUDGET_LABELS.items():
        limit = getattr(config.limits, name)
        reached = "unknown without the base" if facts is None else facts.get(label)
        if limit is not None or (facts is not None and reached is not None):
            reached = reached or "all: this adapter trims nothing"
            rows.append((label, "-" if limit is None else limit_words(limit), reached))
    for name in config.latency or {}:
        limit, predicted = getattr(config.limits, name), latency_facts(config.latency)[LABELS[name]]
        rows.append((LABELS[name], "-" if limit is None else limit_words(limit), predicted))
    return rows


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
