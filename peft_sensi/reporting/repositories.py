"""A repository on the Hub goes in; what it holds comes out, so that an upload neither loses it nor mixes with it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from ..anatomy.widths import is_merged
from ..merging.foreign import MODEL_CONFIG, MODEL_WEIGHTS, OTHER_WEIGHTS, OWN_WEIGHTS
from ..utils.errors import SensiError
from ..utils.files import read_json_object
from .card import SECTION, load_card
from .saved import CARD, CONFIG


# What PEFT adds to each card, and what our section says about the adapter that was there before.
_VERSIONS = re.compile(r"^### Framework versions\s*(?:^- .*\s*)*", re.MULTILINE)
_GENERATED = ("base_model", "model-index", "model_name", "pipeline_tag")


@dataclass(frozen=True)
class Repository:
    """A repository as it is before an upload.

    Attributes:
        name: `user/name`.
        commit: The commit whose files these are; `None` if the repository does not exist.
        files: The names of its files.
        visibility: A sentence that says who can see it.
    """

    name: str
    commit: str | None
    files: frozenset[str]
    visibility: str

    @property
    def is_new(self) -> bool:
        return self.commit is None


def look_up(api: HfApi, name: str, private: bool | None, revision: str | None) -> Repository:
    """The repository. A branch that does not exist yet will start as a copy of the main one, so that one is read.

    Raises `SensiError` if it is public, but was asked to be private.
    """
    try:
        info = api.model_info(name)
    except RepositoryNotFoundError:
        who = "everybody can see it, unless your account makes new repositories private"
        if private is not None:
            who = "only you can see it (private)" if private else "everybody can see it (public)"
        return Repository(name, None, frozenset(), f"{name} is new: {who}.")
    if private and not info.private:
        raise SensiError(
            f"{name} exists and is public, and an upload does not make it private: change that in the settings of the "
            f"repository, or give another name. Nothing was uploaded."
        )
    if revision is not None:
        try:
            info = api.model_info(name, revision=revision)
        except RevisionNotFoundError:
            pass
    who = "it is private" if info.private else "everybody can see it (public)"
    files = frozenset(file.rfilename for file in info.siblings or [])
    return Repository(name, info.sha, files, f"{name} exists: {who}.")


def read_file(api: HfApi, repository: Repository, name: str, target: Path) -> Path | None:
    """A copy of one of the repository's files, in the folder `target`; `None` if there is no such file."""
    if name not in repository.files:
        return None
    return Path(api.hf_hub_download(repository.name, name, revision=repository.commit, local_dir=target))


def stale_weights(api: HfApi, repository: Repository, weights: str, target: Path) -> list[str]:
    """Weights of the merged model that an upload of another one, with a file `weights`, must delete.

    Each save writes its weights under a new name. Loaders could take the old ones for the new model's.

    Raises:
        SensiError: The repository holds files that are not of a merged model, and loaders would read those.
    """
    others = repository.files & {CONFIG, *OTHER_WEIGHTS}
    if MODEL_WEIGHTS in repository.files and weights != MODEL_WEIGHTS:
        config = read_file(api, repository, MODEL_CONFIG, target)
        if config is None or not is_merged(read_json_object(config)):
            others |= {MODEL_WEIGHTS}
    if others:
        raise SensiError(
            f"{repository.name} holds {sorted(others)[0]!r}, and loaders would read that instead of the merged model: "
            f"give another name, or delete the file there first. Nothing was uploaded."
        )
    own = {name for name in repository.files if name == MODEL_WEIGHTS or OWN_WEIGHTS.fullmatch(name)}
    return sorted(own - {weights})


def keep_words(card: Path, former: Path, repo: str) -> None:
    """Writes into `card` what somebody has written into the repository's card, `former`.

    The text around our section is taken from there unless `card` has such a text itself. So is the metadata that
    `card` does not have, but not what our section's adapter has left there.
    """
    try:
        theirs = load_card(former)
    except SensiError as error:
        raise SensiError(
            f"{CARD} in {repo} cannot be read as a model card, and an upload would replace it: correct it there, or "
            f"delete it. Nothing was uploaded."
        ) from error
    data = theirs.data.to_dict()
    if SECTION.search(theirs.text):
        data = {key: value for key, value in data.items() if key not in _GENERATED}
        data["tags"] = [tag for tag in data.get("tags") or [] if not tag.startswith("base_model:")]
    if card.is_file():
        ours = load_card(card)
        own = {key: value for key, value in ours.data.to_dict().items() if value is not None}
        data |= own | {"tags": [*(data.get("tags") or []), *(own.get("tags") or [])]}
        if _has_words(ours.text):
            theirs.text = ours.text
    theirs.data = ModelCardData(**data)
    theirs.save(card)


def _has_words(text: str) -> bool:
    """Whether a card says more than what is generated: a title, our section and the versions."""
    rest = _VERSIONS.sub("", SECTION.sub("", text))
    return bool(re.sub(r"^# .*$", "", rest, count=1, flags=re.MULTILINE).strip())
