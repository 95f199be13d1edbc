"""A repository on the Hub goes in; what it holds comes out, so that an upload neither loses it nor mixes with it."""

from __future__ import annotations

import re
from collections.abc import Collection, Set
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..anatomy.widths import is_merged
from ..merging.foreign import MODEL_CONFIG, MODEL_WEIGHTS, OTHER_WEIGHTS, OWN_WEIGHTS
from ..utils.errors import SensiError
from ..utils.files import read_json_object
from .card_files import SECTION, load_card
from .pretrained import TOKENIZER_CONFIG, TOKENIZER_FILES
from .saved import CONFIG, METRICS, PICTURE, SavedAdapter
from .saved_merged import SavedMerged


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


def check_name(name: str) -> None:
    """Raises `SensiError` if this cannot be the name of a repository."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise SensiError(
            f"{name!r} is not a name for a repository: write user/name, with letters, digits, and - _ . between them."
        ) from None


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


def stale_files(
    api: HfApi,
    repository: Repository,
    saved: SavedAdapter | SavedMerged,
    uploaded: Collection[str],
    card: Path | None,
    target: Path,
) -> list[str]:
    """The files of the model that the repository holds now, which an upload of another one must delete.

    Each save of a merged model writes its weights under a new name, and loaders could take the old ones for the new
    model's. `metrics.json` and a tokenizer would be taken for those of the new model. `card` is the repository's.

    Raises:
        SensiError: The repository holds files of another kind of model, and loaders would mix them up with these.
    """
    files = repository.files
    others: Set[str] = frozenset()
    config = read_file(api, repository, MODEL_CONFIG, target)
    holds_merged = config is not None and is_merged(read_json_object(config))
    if isinstance(saved, SavedMerged):
        others = files & {CONFIG, *OTHER_WEIGHTS, *([] if holds_merged else [MODEL_WEIGHTS])}
    elif holds_merged:
        others = {MODEL_CONFIG}
    if others:
        raise SensiError(
            f"{repository.name} holds {sorted(others)[0]!r} of another kind of model, and loaders would mix the two "
            f"up: give another name, or delete the file there first. Nothing was uploaded."
        )
    stale: set[str] = set()
    if isinstance(saved, SavedMerged):
        stale = {name for name in files if name == MODEL_WEIGHTS or OWN_WEIGHTS.fullmatch(name)}
    if card is not None and SECTION.search(load_card(card).text):  # of an upload like this one
        stale |= {METRICS, PICTURE, *(TOKENIZER_FILES if TOKENIZER_CONFIG in uploaded else [])} & files
        if isinstance(saved, SavedMerged):
            code = re.compile(r"modeling_sensi_\w+\.py")
            stale |= {name for name in files if name == "generation_config.json" or code.fullmatch(name)}
    return sorted(stale - set(uploaded))
