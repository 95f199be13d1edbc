"""An adapter, in a folder or in a model, goes in; a commit on the Hub, with the model card, comes out."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import HFValidationError
from peft import PeftModel

from ..tuner.model import SensiModel
from ..utils.errors import SensiError
from .card import PICTURE, new_card, save_card, write_card
from .saved import SavedAdapter, open_adapter


# Files that are uploaded. Pickles are not: optimizer states and training arguments stay on this machine. The patterns
# do not match in subfolders, which may be a Trainer's checkpoints.
UPLOADED = ("*.json", "*.safetensors", "*.txt", "*.model", "README.md", PICTURE)


def push_folder(
    saved: SavedAdapter,
    repo: str,
    *,
    private: bool | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: list[str] | None = None,
    **card: Any,
) -> Any:
    """Uploads an adapter's files and a new model card in one commit. The folder does not change.

    Args:
        saved: The adapter.
        repo: The repository, `user/name`. It is created if it does not exist.
        private: Whether a new repository is private. `None` is the account's default.
        commit_message, commit_description, token, revision, create_pr: As in `HfApi.create_commit`.
        tags: Further tags for the card.
        card: Further arguments for `write_card`.

    Returns:
        A `huggingface_hub.CommitInfo`.

    Raises:
        SensiError: `repo` cannot be the name of a repository.
    """
    api = HfApi(token=token)
    try:
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
    except HFValidationError as error:
        raise SensiError(f"{repo!r} is not a name for a repository: {str(error).splitlines()[0]}") from None
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo, branch=revision, exist_ok=True)
    files = {path.name: path for pattern in UPLOADED for path in saved.folder.glob(pattern)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        readme = folder / "README.md"
        if readme.name in files:  # the new card keeps what was written around our section
            shutil.copyfile(files[readme.name], readme)
        files |= {path.name: path for path in write_card(saved, folder=folder, repo=repo, **card)}
        if tags:
            _add_tags(readme, tags)
        return api.create_commit(
            repo,
            [CommitOperationAdd(name, path) for name, path in sorted(files.items())],
            commit_message=commit_message or "Upload adapter",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def _add_tags(readme: Path, tags: list[str]) -> None:
    card: Any = ModelCard.load(readme)
    card.data.tags = sorted({*(card.data.tags or []), *tags})
    card.save(readme)


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
        path, tags = Path(output_dir) / "README.md", list[str]()
        with contextlib.suppress(SensiError, IndexError):  # a card that fails must not make the save fail
            name = self.active_adapters[0]
            config, plan = self.peft_config[name], self.base_model.plan(name)
            base = config.base_model_name_or_path or self.base_model.model.__dict__.get("name_or_path")
            labels = getattr(getattr(self.base_model.model, "config", None), "num_labels", None)
            card: Any = new_card(config, plan, base=base, repo=path.parent.name, num_labels=labels)
            save_card(card, path)
            tags = card.data.tags or []
        update_original(self, output_dir)
        _add_tags(path, tags)  # PEFT has replaced them

    def push_to_hub(self: Any, repo_id: str, **kwargs: Any) -> Any:
        """Uploads the adapter with its model card. The arguments are those of Transformers' `push_to_hub`.

        Adapters of this package also take `results` and `license` for the card (see `write_card`).
        """
        if not isinstance(self.base_model, SensiModel):
            return push_original(self, repo_id, **kwargs)
        kwargs.pop("max_shard_size", None)  # an adapter has one weights file
        with tempfile.TemporaryDirectory() as temporary:
            name = self.active_adapters[0]
            self.save_pretrained(temporary, selected_adapters=[name])
            (Path(temporary) / "README.md").unlink()  # `push_folder` writes one that contains more
            saved = open_adapter(Path(temporary) if name == "default" else Path(temporary) / name)
            plan, scores = self.base_model.plan(name), self.base_model._sensi_scores.get(name)
            return push_folder(saved, repo_id, plan=plan, scores=scores, **kwargs)

    push_to_hub.sensi_wraps = push_original  # type: ignore[attr-defined]
    PeftModel.create_or_update_model_card = create_or_update_model_card  # type: ignore[method-assign]
    PeftModel.push_to_hub = push_to_hub  # type: ignore[method-assign]
