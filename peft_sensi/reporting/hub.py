"""An adapter, in a folder or in a model, goes in; a commit on the Hub, with the model card, comes out."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from peft import PeftModel

from ..merging.foreign import MODEL_CONFIG
from ..tuner.head_settings import head_settings
from ..tuner.model import SensiModel
from ..utils.errors import SensiError, first_line
from ..utils.files import read_json_object, write_atomically
from ..utils.hub_names import is_out_of_reach, is_repo, offline
from .card import new_card, write_card
from .card_files import drop_local_bases, keep_words, load_card, save_card, save_with_tags
from .pretrained import TOKENIZER_FILES
from .repositories import check_name, look_up, read_file, stale_files
from .saved import CARD, CONFIG, METRICS, PICTURE, WEIGHTS, SavedAdapter, open_adapter, task_of
from .saved_merged import SavedMerged
from .snippets import Head
from .uploads import Upload, check_links, collect, local_paths, public_config, renew_hash, without_paths


# Everything that an upload may contain. `metrics.json` is what the command `train` writes.
ADAPTER_FILES = (CONFIG, WEIGHTS, *TOKENIZER_FILES, METRICS, CARD, PICTURE)
_PUSH_OPTIONS = {
    *("private", "commit_message", "commit_description", "token", "revision", "create_pr", "tags"),
    *("results", "license", "base"),
}
# Is called before anything is sent, with the files and a sentence that says who can see the repository, if known.
Announce = Callable[[Upload, str | None], None]


def push_folder(
    saved: SavedAdapter | SavedMerged,
    repo: str,
    *,
    private: bool | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    announce: Announce | None = None,
    tags: list[str] | None = None,
    **card: Any,
) -> Any:
    """Uploads the files of an adapter or a merged model and a new model card, in one commit.

    Only files with known names are uploaded, without local paths in them (see `uploads`). The folder does not change.
    What was written into the repository's card, around our section, stays, unless the folder's card has such a text.
    Files of another model, which was there before, are deleted in the same commit (see `stale_files`).

    Args:
        saved: The adapter or the merged model.
        repo: The repository, `user/name`. It is created if it does not exist.
        private: Whether a new repository is private. `None` is the account's default.
        commit_message, commit_description, token, revision, create_pr: As in `HfApi.create_commit`.
        dry_run: Only calls `announce`, without a connection.
        announce: Is called before anything is sent.
        tags: Further tags for the card.
        card: Further arguments for `write_card`.

    Returns:
        A `huggingface_hub.CommitInfo`; `None` after a dry run.

    Raises:
        SensiError: `repo` cannot be the name of a repository, or is public although `private` is `True`, or what it
            holds would be mixed up with the upload.
    """
    check_name(repo)
    check_links(saved.folder, (MODEL_CONFIG, saved.weights) if isinstance(saved, SavedMerged) else (CONFIG, WEIGHTS))
    if not dry_run and is_out_of_reach(repo):
        raise SensiError("The Hub cannot be reached, so nothing was uploaded. Check the connection.")
    with tempfile.TemporaryDirectory() as temporary:
        files, given = Path(temporary, "files"), Path(temporary, "repository")
        files.mkdir()
        if dry_run:
            with offline():
                upload = prepare_upload(saved, repo, files, tags or [], **card)
            if announce is not None:
                announce(upload, None)
            return None
        api = HfApi(token=token)
        with login_advice(repo):
            if "/" not in repo:
                repo = f"{api.whoami()['name']}/{repo}"
            repository = look_up(api, repo, private, revision)
            former = read_file(api, repository, CARD, given)
        upload = prepare_upload(saved, repo, files, tags or [], former=former, **card)
        with login_advice(repo):
            stale = stale_files(api, repository, saved, upload.files, former, given)
        if announce is not None:
            deleted = f" Of the model there, {', '.join(stale)} will be deleted." if stale else ""
            announce(upload, repository.visibility + deleted)
        with login_advice(repo):
            api.create_repo(repo, private=private, exist_ok=True)
        with _naming_what_is_left(repo, repository.is_new), login_advice(repo):
            if revision is not None and not revision.startswith("refs/pr"):
                api.create_branch(repo, branch=revision, exist_ok=True)
            return api.create_commit(
                repo,
                [
                    *(CommitOperationAdd(name, path) for name, path in sorted(upload.files.items())),
                    *map(CommitOperationDelete, stale),
                ],
                commit_message=commit_message
                or ("Upload model" if isinstance(saved, SavedMerged) else "Upload adapter"),
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )


@contextlib.contextmanager
def _naming_what_is_left(repo: str, is_new: bool) -> Iterator[None]:
    """Makes an error say that the upload has created a repository, which stays empty."""
    try:
        yield
    except Exception as error:  # the classes of network errors depend on the Hub library's HTTP client
        if not is_new:
            raise
        raise SensiError(
            f"{repo} was created, but nothing is in it: {first_line(error).rstrip('.')}. Push again, or delete the "
            f"repository."
        ) from error


@contextlib.contextmanager
def login_advice(repo: str) -> Iterator[None]:
    """Makes the Hub's refusals say what to do."""
    try:
        yield
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        status = getattr(getattr(error, "response", None), "status_code", 401)
        if status not in (401, 403):
            raise
        # Without a token, the library's own text is a longer form of this one.
        answer = "" if isinstance(error, LocalTokenNotFoundError) else f" ({first_line(error)})"
        raise SensiError(
            f"The Hub does not let you write to {repo}: log in with `hf auth login` (or set HF_TOKEN), with a token "
            f"that may write there.{answer}"
        ) from error


def prepare_upload(
    saved: SavedAdapter | SavedMerged,
    repo: str,
    target: Path,
    tags: Iterable[str] = (),
    base: str | None = None,
    former: Path | None = None,
    **card: Any,
) -> Upload:
    """The files as they are uploaded. Those that differ from the folder's are written to `target`.

    `former` is the card that the repository has, if any.
    """
    # Before anything is copied, so that an error names this file.
    readme = load_card(saved.folder / CARD) if (saved.folder / CARD).is_file() else None
    if isinstance(saved, SavedMerged):
        private = [base] if base and not is_repo(base) else []
        upload = collect(saved.folder, merged_files(saved), private, target)
        renew_hash(upload.files[MODEL_CONFIG], saved.folder / saved.weights)
    else:
        private = [str(name) for name in (saved.base, base) if name and not is_repo(str(name))]
        upload = collect(saved.folder, ADAPTER_FILES, private, target)
        upload.files[CONFIG] = public_config(saved.folder, base, target)
        if saved.base and read_json_object(upload.files[CONFIG]).get("base_model_name_or_path") is None:
            warnings.warn(
                f"The base model, {Path(saved.base).name}, is a folder of this machine, so the upload does not name "
                f"it: give its name on the Hub as `base`.",
                stacklevel=2,
            )
    # The new card keeps what was written around our section, here (`collect` has copied it) or in the repository.
    paths = local_paths(saved.folder, *private)
    if CARD in upload.files:
        assert readme is not None
        drop_local_bases(readme)  # before a path becomes `path/to/NAME`, which could be somebody else's
        (target / CARD).write_text(without_paths(str(readme), paths), encoding="utf-8")
    if former is not None:
        keep_words(target / CARD, former, repo, {saved.name, saved.folder.resolve().name, repo.rpartition("/")[2]})
    written = write_card(saved, folder=target, repo=repo, base=base, **card)
    upload.files.update({path.name: path for path in written})
    path = upload.files[CARD]
    save_with_tags(load_card(path), path, tags)
    path.write_text(without_paths(path.read_text(encoding="utf-8"), paths), encoding="utf-8")
    return upload


def merged_files(saved: SavedMerged) -> list[str]:
    """The names of all files that belong to a merged model."""
    modules = {str(name).partition(".")[0] for name in (saved.values.get("auto_map") or {}).values()}
    code = [f"{name}.py" for name in sorted(modules) if re.fullmatch(r"modeling_sensi_\w+", name)]
    return [MODEL_CONFIG, saved.weights, *code, "generation_config.json", *TOKENIZER_FILES, METRICS, CARD, PICTURE]


def hook_cards() -> None:
    """Makes `PeftModel.save_pretrained` and `push_to_hub` write our model card for adapters of this package.

    PEFT does not ask the tuner when it writes README.md, and `push_to_hub` replaces that file by an empty card
    (Transformers 5.23). So both methods of `PeftModel` are wrapped, once. Adapters of other methods are not affected.
    """
    update_original, push_original = PeftModel.create_or_update_model_card, PeftModel.push_to_hub
    if hasattr(push_original, "sensi_wraps"):
        return

    def create_or_update_model_card(self: Any, output_dir: str) -> None:
        if not isinstance(self.base_model, SensiModel):
            return update_original(self, output_dir)
        path = Path(output_dir) / CARD
        try:
            with tempfile.TemporaryDirectory() as temporary:
                if path.exists():
                    load_card(path)
                    shutil.copyfile(path, Path(temporary) / CARD)
                write(self, path, temporary)
                write_atomically(path, partial(shutil.copyfile, Path(temporary) / CARD))
        except Exception as error:  # PEFT writes the card before the weights, so an error would lose them
            warnings.warn(f"The model card was not written: {first_line(error)}", stacklevel=3)

    def write(self: Any, path: Path, temporary: str) -> None:
        """Writes the card for `path` into another folder, which may hold the one that is there now."""
        draft, tags = Path(temporary) / CARD, list[str]()
        with contextlib.suppress(SensiError, IndexError):  # a card that fails must not make the save fail
            name = self.active_adapters[0]
            config, plan = self.peft_config[name], self.base_model.plan(name)
            base = config.base_model_name_or_path or self.base_model.model.__dict__.get("name_or_path")
            settings = head_settings(self.base_model.model) or {}
            count = getattr(getattr(self.base_model.model, "config", None), "num_labels", None)
            head = Head(task_of(config), count, settings.get("labels", []), settings.get("problem_type"))
            card: Any = new_card(config, plan, base=base, repo=path.parent.resolve().name, head=head)
            save_card(card, draft)
            tags = card.data.tags or []
        update_original(self, temporary)
        written: Any = load_card(draft)  # PEFT has replaced the tags; a local base stays named, as PEFT does it
        written.data.tags = sorted({*(written.data.tags or []), *tags})
        written.save(draft)

    def push_to_hub(self: Any, repo_id: str, **kwargs: Any) -> Any:
        """Uploads the adapter with its model card. The arguments are those of Transformers' `push_to_hub`.

        Adapters of this package also take `results` and `license` for the card (see `write_card`).
        """
        if not isinstance(self.base_model, SensiModel):
            return push_original(self, repo_id, **kwargs)
        kwargs.pop("max_shard_size", None)  # an adapter has one weights file
        if unknown := sorted(set(kwargs) - _PUSH_OPTIONS):
            raise TypeError(f"push_to_hub() of an adapter has no argument {unknown[0]!r}.")
        if not self.active_adapters:
            raise SensiError("No adapter is active, so none can be uploaded: choose one with `set_adapter(...)`.")
        name = self.active_adapters[0]
        if others := sorted(set(self.peft_config) - {name}):
            rest = ", ".join(map(repr, others))
            warnings.warn(f"Only the active adapter {name!r} is uploaded, not {rest}.", stacklevel=2)
        with tempfile.TemporaryDirectory() as temporary:
            self.save_pretrained(temporary, selected_adapters=[name])
            (Path(temporary) / CARD).unlink(missing_ok=True)  # `push_folder` writes one that contains more
            saved = open_adapter(Path(temporary) if name == "default" else Path(temporary) / name)
            plan, scores = self.base_model.plan(name), self.base_model.scores_of(name)
            return push_folder(saved, repo_id, plan=plan, scores=scores, **kwargs)

    push_to_hub.sensi_wraps = push_original  # type: ignore[attr-defined]
    PeftModel.create_or_update_model_card = create_or_update_model_card  # type: ignore[method-assign]
    PeftModel.push_to_hub = push_to_hub  # type: ignore[method-assign]
