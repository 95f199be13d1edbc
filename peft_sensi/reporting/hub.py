"""Adapters and the Hub: pushing one with its card, from its folder or from a model."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import HFValidationError
from peft import PeftModel

from ..tuner.model import SensiModel
from ..utils.errors import SensiError
from .card import PICTURE, new_card, save_card, write_card
from .saved import SavedAdapter, open_adapter


# What is uploaded beside the adapter and the card. Never pickles: optimizer states and training arguments stay here.
UPLOADED = ("*.json", "*.safetensors", "*.txt", "*.model", "README.md", PICTURE)


def push_folder(
    saved: SavedAdapter,
    repo: str,
    *,
    private: bool | None = None,
    message: str = "Upload adapter",
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    description: str | None = None,
    tags: list[str] | None = None,
    **card: Any,
) -> Any:
    """One commit with the adapter's files and a fresh card; the folder stays as it is. Returns the commit."""
    api = HfApi(token=token)
    try:
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
    except HFValidationError as error:
        raise SensiError(f"{repo!r} is not a name for a repository: {str(error).splitlines()[0]}") from None
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for pattern in UPLOADED:
            for path in sorted(saved.folder.glob(pattern)):
                shutil.copyfile(path, folder / path.name)
        write_card(saved, folder=folder, repo=repo, **card)
        if tags:
            readme = ModelCard.load(folder / "README.md")
            readme.data.tags = sorted({*(readme.data.tags or []), *tags})
            readme.save(folder / "README.md")
        operations = [CommitOperationAdd(path.name, path) for path in sorted(folder.iterdir())]
        return api.create_commit(
            repo,
            operations,
            commit_message=message,
            commit_description=description,
            revision=revision,
            create_pr=create_pr,
        )


def hook_cards() -> None:
    """Gives adapters of ours their card in `save_pretrained` and `push_to_hub`; other methods' are as before.

    PEFT asks the tuner for nothing when it writes README.md, and `push_to_hub` replaces what it wrote by a blank card
    (Transformers 5.23). So these two methods of `PeftModel` are wrapped. Idempotent.
    """
    if not hasattr(PeftModel.push_to_hub, "sensi_wraps"):
        PeftModel.create_or_update_model_card = _with_our_section(PeftModel.create_or_update_model_card)  # type: ignore[method-assign]
        PeftModel.push_to_hub = _with_our_card(PeftModel.push_to_hub)  # type: ignore[method-assign]


def _with_our_section(original: Callable[..., None]) -> Callable[..., None]:
    def create_or_update_model_card(self: Any, output_dir: str) -> None:
        path, ours = Path(output_dir) / "README.md", isinstance(self.base_model, SensiModel)
        our_tags: list[str] = []
        if ours:
            with contextlib.suppress(SensiError, IndexError):  # a card is not worth a failed save
                name = self.active_adapters[0]
                config, plan = self.peft_config[name], self.base_model.plan(name)
                base = config.base_model_name_or_path or self.base_model.model.__dict__.get("name_or_path")
                labels = getattr(getattr(self.base_model.model, "config", None), "num_labels", None)
                card: Any = new_card(config, plan, base=base, repo=path.parent.name, num_labels=labels)
                save_card(card, path)
                our_tags = card.data.tags or []
        original(self, output_dir)
        if ours:
            card = ModelCard.load(path)
            card.data.tags = sorted({*(card.data.tags or []), *our_tags})  # PEFT has replaced them
            card.save(path)

    return create_or_update_model_card


def _with_our_card(original: Callable[..., Any]) -> Callable[..., Any]:
    def push_to_hub(
        self: Any,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tags: list[str] | None = None,
        results: Any = None,
        license: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Uploads the adapter with its card. `results` and `license` go into the card; the rest as in Transformers."""
        if not isinstance(self.base_model, SensiModel):
            return original(
                self, repo_id, commit_message=commit_message, commit_description=commit_description, private=private,
                token=token, revision=revision, create_pr=create_pr, tags=tags, **kwargs,
            )  # fmt: skip
        with tempfile.TemporaryDirectory() as temporary:
            name = self.active_adapters[0]
            self.save_pretrained(temporary, selected_adapters=[name])
            (Path(temporary) / "README.md").unlink()  # the fuller one comes with the upload
            folder = Path(temporary) if name == "default" else Path(temporary) / name
            return push_folder(
                open_adapter(folder),
                repo_id,
                private=private,
                message=commit_message or "Upload model",
                token=token,
                revision=revision,
                create_pr=create_pr,
                description=commit_description,
                tags=tags,
                plan=self.base_model.plan(name),
                scores=self.base_model._sensi_scores.get(name),
                results=results,
                license=license,
            )

    push_to_hub.sensi_wraps = original  # type: ignore[attr-defined]
    return push_to_hub
