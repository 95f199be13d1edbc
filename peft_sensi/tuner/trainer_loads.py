"""`Trainer` gets the best values of an adapter back under every name of the adapter, or an error says what to do.

PEFT saves an adapter called `"other"` into a subfolder of that name, and only one called `"default"` into the folder
itself. At the end of a training with `load_best_model_at_end`, `Trainer` looks into the folder alone. If it finds
nothing, it logs a warning, and the last values stay. If there is an adapter called `"default"` as well, its values
would be loaded into the active one. Resuming knows the subfolders.

Adapters that were added by Transformers' own `add_adapter` are saved by `Trainer`, which cannot load them again.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import PreTrainedModel

from ..anatomy.modules import unwrapped
from ..layers.layer import layers_of
from ..utils.errors import SensiError


def hook_trainer() -> None:
    """Wraps the loaders of `Trainer`, if the user has imported it: the import is slow. A second call changes nothing.

    It is called whenever PEFT saves or loads an adapter, because users may import `Trainer` after this package.
    """
    cls = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    if cls is not None and not hasattr(cls._load_best_model, "sensi_finds"):
        cls._load_best_model = _finding(_or_advice(cls._load_best_model))
        cls._load_from_checkpoint = _or_advice(cls._load_from_checkpoint)


def _finding(function: Callable[..., Any]) -> Callable[..., Any]:
    """`Trainer._load_best_model`, which loads each active adapter from where PEFT has saved it."""

    @functools.wraps(function)
    def call(self: Any) -> Any:
        model = unwrapped(self.model)
        if (
            not isinstance(model, PeftModel)
            or not layers_of(model)
            or self.is_fsdp_enabled
            or self.is_deepspeed_enabled
        ):
            return function(self)
        best = Path(self.state.best_model_checkpoint)
        folders = {name: best if name == "default" else best / name for name in model.active_adapters}
        for name, folder in folders.items():
            if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
                raise SensiError(
                    f"The best checkpoint has no values of the adapter {name!r}: there is no "
                    f"{folder / SAFETENSORS_WEIGHTS_NAME}. The model still has its last values. If several machines "
                    f"train without a common disk, set `save_on_each_node=True`. If the file is elsewhere, load it: "
                    f"`model.load_adapter(folder, {name!r})`."
                )
        for name, folder in folders.items():
            model.load_adapter(str(folder), name)
        return None

    call.sensi_finds = function  # type: ignore[attr-defined]
    return call


def _or_advice(function: Callable[..., Any]) -> Callable[..., Any]:
    """A loader of `Trainer`, with an error that says what to do if the adapter is one of Transformers."""

    @functools.wraps(function)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return function(self, *args, **kwargs)
        except (OSError, ValueError) as error:
            model = unwrapped(self.model)
            if isinstance(error, SensiError) or not isinstance(model, PreTrainedModel) or not layers_of(model):
                raise
            raise SensiError(
                "`Trainer` saves an adapter that was added by Transformers' `model.add_adapter`, but cannot load it "
                "again. To resume, or to get the best model back, train what `peft.get_peft_model` returns. The "
                "checkpoint itself is complete: `PeftModel.from_pretrained(base, checkpoint)` loads it."
            ) from error

    return call
