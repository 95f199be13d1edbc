"""Writes a model card into a README.md and keeps the words that somebody wrote around this package's section."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from yaml import YAMLError

from ..utils.errors import SensiError, first_line
from ..utils.files import write_atomically
from ..utils.hub_names import is_repo
from .results import MEASURED_BY_US


# The part of a card that is ours. A start whose end somebody has removed does not reach to the end of another section.
_START, _END = "<!-- peft_sensi: generated", "<!-- peft_sensi: end -->"
SECTION = re.compile(f"{_START}(?:(?!{_START}).)*?{_END}", re.DOTALL)
_TITLE = re.compile(r"^# (.+)$", re.MULTILINE)
# What PEFT adds to each card.
_VERSIONS = re.compile(r"^### Framework versions\n(?:\s*\n)?(?:- \w+ \d\S*\n?)*", re.MULTILINE)
# `Trainer` writes this into a card with headings that nobody has filled in, and asks to remove it afterwards.
_NOT_FILLED_IN = "generated automatically according to the information the Trainer had access to"


def load_card(path: Path) -> Any:
    """The model card in a file. Raises `SensiError` if it is not one, so that nothing replaces what somebody wrote."""
    try:
        card = ModelCard.load(path)
    except (ValueError, TypeError, OSError, YAMLError) as error:
        raise SensiError(
            f"{path} cannot be read as a model card ({first_line(error)}), and was not changed: correct the metadata "
            f"between its two lines ---, save it as UTF-8, or move it away."
        ) from error
    tags: Any = card.data.get("tags")
    card.data.tags = _listed(tags)  # type: ignore[attr-defined]
    return card


def has_section(path: Path) -> bool:
    """Whether the file, if there is one, has our section. Others can also be no cards at all."""
    return path.is_file() and SECTION.search(path.read_text(encoding="utf-8", errors="replace")) is not None


def save_card(card: ModelCard, path: Path, former_titles: Collection[str] = ()) -> None:
    """Saves the card. If there is one already, its metadata and the text around our section stay.

    So does its title, unless it is one of `former_titles`, which an earlier save has given it. Raises `SensiError` if
    the file cannot be read as a card; it does not change then.
    """
    if path.is_file():
        old = load_card(path)
        ours = SECTION.search(card.text)[0]  # type: ignore[index]
        title, old_title = _TITLE.search(card.text), _TITLE.search(old.text)
        if title and old_title and old_title[1].strip() in former_titles:
            old.text = old.text.replace(old_title[0], title[0], 1)
        if (former := SECTION.search(old.text)) and str(old.data.get("base_model")) in former[0]:
            old.data.base_model = None  # of the adapter that had this section
        replaced, count = SECTION.subn(lambda _: ours, old.text, count=1)
        if count:
            card.text = replaced
        elif old.text.strip():
            card.text = f"{old.text.rstrip()}\n\n{ours}\n"  # a new section belongs at the end
        card.data = _joined(old.data, card.data, _own_tags(old) if count else old.data.tags)
    save_with_tags(card, path)


def save_with_tags(card: ModelCard, path: Path, tags: Iterable[str] = ()) -> None:
    """Saves the card, with these tags as well as its own. A base that is a folder of this machine is not named."""
    card.data.tags = sorted({*_listed(card.data.get("tags")), *tags})  # type: ignore[attr-defined]
    drop_local_bases(card)
    write_atomically(path, card.save)  # somebody may have written a part of it


def drop_local_bases(card: ModelCard) -> None:
    """Takes bases out of the metadata that are folders of this machine.

    PEFT writes the base's name even if it is a path, which nobody else has, and the Hub refuses such metadata.
    """
    data: Any = card.data
    data.tags = [tag for tag in _listed(data.get("tags")) if not tag.startswith("base_model:") or _is_base(tag)]
    bases = [name for name in _listed(data.get("base_model")) if is_repo(name)]
    data.base_model = bases if len(bases) > 1 else next(iter(bases), None)


def keep_words(card: Path, former: Path, repo: str, titles: Collection[str]) -> None:
    """Writes into `card` what somebody has written into the repository's card, `former`.

    The text around our section is taken from there, unless `card` has such a text itself. So is the metadata that
    `card` does not have, but not what our section's adapter has left there. `titles` are those that are generated.

    Raises:
        SensiError: One of the two cannot be read as a card.
    """
    try:
        theirs = load_card(former)
    except SensiError as error:
        raise SensiError(
            f"{former.name} in {repo} cannot be read as a model card, and an upload would replace it: correct it "
            f"there, or delete it. Nothing was uploaded."
        ) from error
    if SECTION.search(theirs.text):
        _drop_generated(theirs)
    if card.is_file():
        ours = load_card(card)
        theirs.data = _joined(theirs.data, ours.data, theirs.data.tags)
        title, their_title = _TITLE.search(ours.text), _TITLE.search(theirs.text)
        if _has_words(ours.text) or not theirs.text.strip():
            theirs.text = ours.text
        elif title and their_title and title[1].strip() not in titles:
            theirs.text = theirs.text.replace(their_title[0], title[0], 1)
    theirs.save(card)


def _drop_generated(card: Any) -> None:
    """Takes out of the metadata what an upload of another adapter has written there: its base, results and tags."""
    card.data.base_model = None
    card.data.eval_results = _results_of_others(card.data) or None
    card.data.tags = _own_tags(card)


def _own_tags(card: Any) -> list[str]:
    """The tags without those that say what kind of adapter has our section in this card."""
    return [tag for tag in card.data.tags if tag != "pruning" and not tag.startswith("base_model:")]


def _joined(old: Any, new: Any, tags: list[str]) -> ModelCardData:
    """The metadata of two cards: where both say something, the new one counts. `tags` stay beside the new ones.

    So do the results that somebody has added. Those that a former card of this package has written go.
    """
    known = {key: value for key, value in new.to_dict().items() if value is not None}
    data = old.to_dict() | known | {"tags": [*tags, *_listed(new.get("tags"))]}
    for key in ("model-index", "eval_results", "model_name"):
        data.pop(key, None)
    found = list(new.get("eval_results") or [])
    own = {_measured(result) for result in found}
    others = [result for result in _results_of_others(old) if _measured(result) not in own]
    name = new.get("model_name") or old.get("model_name")
    return ModelCardData(**data, eval_results=[*others, *found] or None, model_name=name)


def _results_of_others(data: Any) -> list[EvalResult]:
    """The results that this package has not measured."""
    return [result for result in data.get("eval_results") or [] if result.dataset_args != MEASURED_BY_US]


def _measured(result: EvalResult) -> tuple[str | None, ...]:
    return result.task_type, result.dataset_name, result.metric_type


def _has_words(text: str) -> bool:
    """Whether a card says more than what is generated: a title, our section and the versions."""
    rest = _VERSIONS.sub("", SECTION.sub("", text))
    return _NOT_FILLED_IN not in rest and bool(_TITLE.sub("", rest, count=1).strip())


def _is_base(tag: str) -> bool:
    return is_repo(tag.rpartition(":")[2])


def _listed(value: Any) -> list[str]:
    """A value of the metadata that may be a list or one item; YAML reads `- 2024` and `- no` as other types."""
    items = value if isinstance(value, list) else [value]
    return [str(item) for item in items if item is not None]
