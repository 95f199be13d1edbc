"""The calls of PEFT and Transformers that add, activate or delete an adapter leave the model as it was if they fail.

`SensiModel` undoes its own work (see `utils.undo`). But PEFT and Transformers change the model before and after they
call it: they set flags, wrap further modules, and read the weights. An error there would leave a model that has half
an adapter. So these calls are wrapped, once. Calls for other methods, on models without our layers, are not affected.

Transformers' `resize_token_embeddings` is wrapped for another reason: it would fail on embeddings with an adapter. And
PEFT's `save_pretrained`: with `safe_serialization=False`, it would write an adapter that cannot be loaded.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, AutoPeftModel, PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.peft import PeftAdapterMixin

from ..anatomy.modules import base_of, embedding_of
from ..anatomy.widths import is_merged
from ..layers.layer import layers_of
from ..layers.versions import writes
from ..layers.weights import untouched
from ..layers.whole_modules import freeze_saved_modules
from ..utils.errors import SensiError, SensiLoadError
from ..utils.files import make_readable, open_safetensors, read_json_object
from ..utils.undo import snapshot, surely, undone_on_error
from .checkpoint import PLAN_KEY, check_config_file, plan_key
from .config import SensiConfig
from .loading import named_as_in, sizes_must_fit
from .saving import warn_of_unsaved
from .stale import unmark_stale
from .targets import name_saved_modules
from .trainer_loads import hook_trainer
from .wrapping import root_of


def hook_peft_calls() -> None:
    """Wraps all of these methods. A second call changes nothing."""
    classes = [PeftModel, *MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values()]
    others = (PeftAdapterMixin, AutoPeftModel.__base__)  # the base class of all AutoPeft classes
    for owner in (*classes, *others):
        for name in ("__init__", "add_adapter", "load_adapter", "from_pretrained"):
            original = vars(owner).get(name)
            if original is None or (owner in others and name == "__init__"):
                continue
            if isinstance(original, classmethod):
                if not hasattr(original.__func__, "sensi_undoes"):
                    setattr(owner, name, classmethod(_undoing(original.__func__)))
            elif not hasattr(original, "sensi_undoes"):
                setattr(owner, name, _undoing(original))
        for name in ("set_adapter", "delete_adapter", "enable_adapters", "disable_adapters"):
            if (original := vars(owner).get(name)) is not None and not hasattr(original, "sensi_undoes"):
                setattr(owner, name, _all_or_nothing(original))
    if not hasattr(PeftModel.save_pretrained, "sensi_refuses"):
        PeftModel.save_pretrained = _saving(PeftModel.save_pretrained)  # type: ignore[method-assign]
    if not hasattr(PreTrainedModel.resize_token_embeddings, "sensi_refuses"):
        PreTrainedModel.resize_token_embeddings = _checked_resize(  # type: ignore[method-assign]
            PreTrainedModel.resize_token_embeddings
        )


def _saving(function: Callable[..., Any]) -> Callable[..., Any]:
    """`save_pretrained` that refuses to write what no loader of this package reads.

    It warns of a merged model in the folder, and of trained weights that the adapter does not hold.

    PEFT sets `inference_mode` of the config while it saves. If the save fails, for example because the disk is full,
    it is set back: the adapter stays trainable. Afterwards other users may read the weights file, as all other files.
    """

    @functools.wraps(function)
    def call(self: Any, save_directory: str, safe_serialization: bool = True, *args: Any, **kwargs: Any) -> Any:
        hook_trainer()
        if not safe_serialization and layers_of(self):
            raise SensiError(
                "`safe_serialization=False` writes a pickle. Adapters of peft_sensi are loaded from safetensors files "
                "only, because a pickle can run code: leave it out."
            )
        configs = [(c, c.inference_mode) for c in self.peft_config.values() if isinstance(c, SensiConfig)]
        selected = kwargs.get("selected_adapters", args[0] if args else None) or self.peft_config
        if configs and "default" in selected:  # others get a subfolder
            _warn_of_merged(Path(save_directory))
        try:
            function(self, save_directory, safe_serialization, *args, **kwargs)
            if configs and kwargs.get("is_main_process", True):
                paths = [Path(save_directory, name, SAFETENSORS_WEIGHTS_NAME) for name in ("", *self.peft_config)]
                written = [path for path in paths if path.is_file()]
                for path in written:
                    make_readable(path)
                warn_of_unsaved(self, written)
        finally:
            for config, inference_mode in configs:
                config.inference_mode = inference_mode

    call.sensi_refuses = function  # type: ignore[attr-defined]
    return call


def _warn_of_merged(folder: Path) -> None:
    """Warns that an adapter is saved beside a merged model. An error would lose what has just been trained."""
    try:
        values = read_json_object(folder / "config.json")
    except (FileNotFoundError, SensiLoadError):
        return
    if is_merged(values):
        warnings.warn(
            f"{folder} holds a merged model. With an adapter beside it, the Auto classes of Transformers and the "
            f"command `peft-sensi` load the adapter instead. `load_merged` still loads the merged model. Save the "
            f"adapter into another folder, and delete its files here.",
            stacklevel=3,
        )


def _all_or_nothing(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which changes layers one by one, and leaves a model of ours as it was if it fails."""

    @functools.wraps(function)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with undone_on_error(self) if layers_of(self) else nullcontext():
            return function(self, *args, **kwargs)

    call.sensi_undoes = function  # type: ignore[attr-defined]
    return call


def _undoing(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        hook_trainer()
        # The first module is the model: a constructor's `self` has no modules yet.
        modules = (a for a in (*args, *kwargs.values()) if isinstance(a, nn.Module) and "_modules" in vars(a))
        model = next(modules, None)
        if model is None:
            try:
                return function(*args, **kwargs)
            except Exception as error:
                if not isinstance(error, SensiError):
                    _check_folder(*args, **kwargs)
                raise
        # PEFT writes into the config that it gets, such as more `modules_to_save`. So it gets a copy.
        args = tuple(_own(argument) for argument in args)
        kwargs = {name: _own(argument) for name, argument in kwargs.items()}
        configs = [argument for argument in (*args, *kwargs.values()) if isinstance(argument, PeftConfig)]
        is_ours = any(isinstance(config, SensiConfig) for config in configs)
        if any(not isinstance(c, SensiConfig) and not c.is_prompt_learning for c in configs) and layers_of(model):
            raise SensiError(
                "The model has an adapter of peft_sensi, beside which no other PEFT method can change its layers. "
                "Merge or remove it first: `merge_and_unload()` or `unload()`, and `delete_adapter` for adapters of "
                "Transformers."
            )
        for own in configs:  # PEFT reads this copy again, when the layers are there
            if isinstance(own, SensiConfig) and not own.from_file:
                name_saved_modules(root_of(model), own)
        restore = _snapshot_with_configs(model)
        is_load = function.__name__ == "load_adapter" and isinstance(model, PeftModel) and bool(layers_of(model))
        values = [(parameter, writes(parameter)) for parameter in (model.parameters() if is_load else ())]
        try:
            if function.__name__ == "load_adapter" and isinstance(model, PreTrainedModel):
                return _loaded_by_transformers(function, model, args, kwargs)
            with sizes_must_fit(is_load and not kwargs.get("ignore_mismatched_sizes")):
                result = function(*args, **kwargs)
            if isinstance(model, PeftModel) and model.active_adapter not in model.peft_config and layers_of(model):
                model.active_adapter = model.active_adapters[0]  # PEFT would look for one that was deleted
            return result
        except BaseException as error:
            if is_ours or isinstance(error, SensiError) or layers_of(model):
                surely(restore)
            if isinstance(error, Exception) and not isinstance(error, SensiError):
                _check_folder(*args, **kwargs)
            if isinstance(error, KeyError) and is_load:  # PEFT looks for each module that the model saves whole
                raise SensiLoadError(
                    f"{SAFETENSORS_WEIGHTS_NAME} lacks {error.args[0]!r}, which this model saves whole. The file was "
                    f"made with another `also_train` or `modules_to_save`: wrap the model with the same."
                ) from error
            if isinstance(error, KeyboardInterrupt) and any(writes(p) != count for p, count in values):
                function(*args, **kwargs)  # a part of an adapter's old values is lost, so the new ones are completed
            raise

    call.sensi_undoes = function  # type: ignore[attr-defined]
    return call


def _loaded_by_transformers(function: Callable[..., Any], model: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    """`load_adapter` of Transformers, with the checks of `PeftModel.load_adapter`."""
    if (config := _config_of_folder(*args, **kwargs)) is not None:
        kwargs = {**kwargs, "peft_config": config}
    with _plan_expected(model):
        result = function(*args, **kwargs)
    _check_filled(model)
    if layers_of(model) and not inspect.signature(function).bind(*args, **kwargs).arguments.get("is_trainable"):
        freeze_saved_modules(model)
    return result


def _snapshot_with_configs(model: nn.Module) -> Callable[[], None]:
    """Like `snapshot`, with the configs of its adapters: a load may give an adapter another plan."""
    put_back, adapters = snapshot(model), getattr(model, "peft_config", None) or {}
    fields = [(vars(config), dict(vars(config))) for config in adapters.values() if isinstance(config, SensiConfig)]

    def restore() -> None:
        put_back()
        for now, before in fields:
            now.clear()
            now.update(before)
        unmark_stale(model.parameters())

    return restore


def _config_of_folder(
    model: Any, peft_model_id: Any = None, adapter_name: Any = None, *others: Any, **kwargs: Any
) -> SensiConfig | None:
    """The config of an adapter of ours in a local folder, with the path of its weights, so that the file is checked.

    Transformers would read the config alone, and would convert tensors of any dtype. `None` if the call gives a config
    or tensors of its own, or looks into a subfolder.
    """
    places = [kwargs.get("adapter_kwargs") or {}, getattr(kwargs.get("load_config"), "download_kwargs", None) or {}]
    own = kwargs.get("peft_config") or kwargs.get("adapter_state_dict") or any(p.get("subfolder") for p in places)
    if others or own or not isinstance(peft_model_id, str | os.PathLike):
        return None
    if not _is_ours(Path(peft_model_id)):
        return None  # if it is damaged, Transformers raises an error, and then `_check_folder` tells the reason
    return named_as_in(model, SensiConfig.from_pretrained(str(peft_model_id)))


def _is_ours(folder: Path) -> bool:
    """Whether there is a config of an adapter of this package in the folder."""
    try:
        return read_json_object(folder / CONFIG_NAME).get("peft_type") == "SENSI"
    except (FileNotFoundError, SensiLoadError):
        return False


def _check_folder(*args: Any, subfolder: str | None = None, **kwargs: Any) -> None:
    """Raises `SensiLoadError` if a folder in the arguments has weights of ours and a file that is no config, or a
    config of ours without weights.

    PEFT reads the config first, and asks us only if it finds our type there. Without weights, it looks on the Hub.
    """
    for argument in (*args, *kwargs.values()):
        folder = Path(argument, subfolder or "") if isinstance(argument, str | os.PathLike) else None
        if folder is None or not (folder / CONFIG_NAME).is_file():
            continue
        try:
            with open_safetensors(folder / SAFETENSORS_WEIGHTS_NAME) as file:
                plan_key(file.keys())
        except FileNotFoundError:
            if _is_ours(folder):
                raise SensiLoadError(
                    f"{folder} holds no {SAFETENSORS_WEIGHTS_NAME}: the adapter is not complete."
                ) from None
            continue
        except SensiLoadError:
            continue
        try:
            check_config_file(folder / CONFIG_NAME)
        except SensiLoadError as error:
            raise SensiLoadError(os.path.join(folder, str(error))) from error


@contextmanager
def _plan_expected(model: Any) -> Iterator[None]:
    """Inside the block, Transformers does not report the plan in an adapter's file as an unexpected tensor.

    The config of the file has told the plan already. Other unexpected tensors are reported. The model's own lists of
    names that are ignored have no effect on adapters, so the result of its reader is changed.
    """
    name = "_load_pretrained_model"
    read = getattr(model, name, None)

    def without_plan(*args: Any, **kwargs: Any) -> Any:
        result = read(*args, **kwargs)  # type: ignore[misc]
        unexpected = result[0].unexpected_keys
        for key in [key for key in unexpected if PLAN_KEY in key.split(".")]:
            unexpected.remove(key)
        return result

    if read is not None:
        vars(model)[name] = without_plan
    try:
        yield
    finally:
        vars(model).pop(name, None)


def _check_filled(model: nn.Module) -> None:
    """Raises `SensiLoadError` if Transformers' `load_adapter` has read no tensor of the adapter that it added."""
    layers = [layer for layer in layers_of(model).values() if layer.sensi_peers]
    added = {name for layer in layers for name in layer.sensi_unchecked}
    tensors = [p for layer in layers for name in added for p in layer.own_parts(name).values()]
    if tensors and all(map(untouched, tensors)):
        raise SensiLoadError(
            "Transformers has read nothing of this adapter, because it does not know the names in its file: use "
            "`PeftModel.from_pretrained`."
        )


def _own(argument: Any) -> Any:
    return copy.deepcopy(argument) if isinstance(argument, SensiConfig) else argument


def _checked_resize(function: Callable[..., Any]) -> Callable[..., Any]:
    """`resize_token_embeddings` that changes nothing if an adapter trains a part of the embeddings."""

    @functools.wraps(function)
    def call(
        self: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        tables = [embedding_of(self, "input"), embedding_of(self, "output")]
        adapted = [table for table in tables if table is not None and base_of(table) is not table]
        if adapted and layers_of(self):
            rows = len(base_of(adapted[0]).weight)  # type: ignore[arg-type]
            size = rows if new_num_tokens is None else new_num_tokens
            if size + -size % (pad_to_multiple_of or 1) != rows:
                raise SensiError(
                    f"The adapter trains rows of the embeddings, so their number ({rows}) cannot change now. Resize "
                    f"the base model first, then wrap it; a saved adapter can be loaded on a resized base, because "
                    f"tokens are known by their number. After `merge_and_unload()`, the model can be resized too."
                )
        return function(self, new_num_tokens, pad_to_multiple_of, *args, **kwargs)

    call.sensi_refuses = function  # type: ignore[attr-defined]
    return call
