"""Runs the user's model on calibration batches: checks the batches, computes losses, and restores the model."""

from __future__ import annotations

import itertools
import math
import random
import warnings
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from ..anatomy.units import Group
from ..utils.checks import shown
from ..utils.errors import CalibrationError, SensiError, not_finite
from ..utils.undo import snapshot, surely
from .examples import examples_in


LossFn = Callable[[nn.Module, Mapping[str, Any]], torch.Tensor]


@dataclass(frozen=True)
class ScoringOptions:
    """How units are scored. `compute_scores` describes the fields; `SensiConfig` has fields of the same names."""

    score: str = "fisher"
    calibration_steps: int = 8
    priming_steps: int = 48
    priming_lr: float = 1e-4
    priming_optimizer: str = "adamw"
    loss_fn: LossFn | None = None
    seed: int = 0
    progress: bool = True


def materialize(
    calibration: Iterable[Mapping[str, Any]],
    steps: int,
    suffice: Callable[[list[Mapping[str, Any]]], bool] = lambda read: False,
) -> list[Mapping[str, Any]]:
    """The first `steps` batches, or fewer if those that were read `suffice`.

    Raises `CalibrationError` if there is no batch, or if something is not a batch.
    """
    if isinstance(calibration, (str, bytes, Mapping)) or not isinstance(calibration, Iterable):
        raise CalibrationError(
            f"`calibration` must be an iterable of batches (a DataLoader, a list of dicts, a generator), got "
            f"{type(calibration).__name__}."
        )
    read_before = _read.get(calibration, 0) if isinstance(calibration, Generator) else 0
    again = (
        f"`calibration` is a generator, of which an earlier wrap, trim or `compute_scores` in this process has read "
        f"{read_before} batches, and a generator can be read only once. Give a list or a `DataLoader`, or make a new "
        f"generator each time (`Trainer(model_init=...)` and hyperparameter searches wrap a model several times)."
    )
    batches: list[Any] = []
    for batch in itertools.islice(calibration, steps):
        batches.append(_as_tensors(batch))
        if suffice(batches):
            break
    if not batches:
        raise CalibrationError(again if read_before else "`calibration` is empty: it must yield at least one batch.")
    if isinstance(calibration, Generator):
        _read[calibration] = read_before + len(batches)
        if read_before:
            warnings.warn(f"{again} This time, other batches are used.", stacklevel=2)
    for index, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            raise CalibrationError(
                f"Calibration batch {index} is a {type(batch).__name__}: each batch must be a mapping that "
                f"`model(**batch)` accepts, with labels."
            )
        for name in ("input_ids", "decoder_input_ids", "pixel_values", "input_values", "input_features"):
            value = batch.get(name)
            if isinstance(value, (list, tuple)) and any(isinstance(row, (list, tuple)) for row in value):
                raise CalibrationError(
                    f"The examples of calibration batch {index} differ in length or hold something else than numbers: "
                    f"its {name!r} cannot become a tensor. Pad them, such as with `DataCollatorWithPadding`."
                )
            if isinstance(value, (list, tuple)) or (isinstance(value, torch.Tensor) and value.dim() < 2):
                raise CalibrationError(
                    f"Calibration batch {index} looks like a single example: its {name!r} is not a tensor of several "
                    f"examples. Give batches, such as `DataLoader(dataset, batch_size=32, collate_fn=data_collator)`."
                )
    return batches


# How many batches were read from generators that are still alive.
_read: weakref.WeakKeyDictionary[Generator, int] = weakref.WeakKeyDictionary()


def _as_tensors(batch: Any) -> Any:
    """The batch with arrays, and lists of equally long lists of numbers, as tensors. Other values stay as they are."""
    if not isinstance(batch, Mapping):
        return batch
    changed = {}
    for name, value in batch.items():
        if isinstance(value, np.ndarray) or (isinstance(value, (list, tuple)) and value and not _has_tensor(value)):
            try:
                array = np.asarray(value, order="C")  # torch knows no negative strides
            except ValueError:  # lists of different lengths
                continue
            if array.dtype.kind in "biuf":
                # The types that models compute with; numpy's defaults differ between platforms.
                kind = {"i": torch.long, "u": torch.long, "b": torch.bool, "f": torch.get_default_dtype()}
                changed[name] = torch.as_tensor(array).to(kind[array.dtype.kind])
    return {**batch, **changed} if changed else batch


def _has_tensor(value: Any) -> bool:
    """Whether there is a tensor in a list, also in lists inside of it, as in the cache of a decoder."""
    return isinstance(value, torch.Tensor) or (isinstance(value, (list, tuple)) and any(map(_has_tensor, value)))


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def check_loss_fn(loss_fn: Any) -> None:
    if not callable(loss_fn):
        raise CalibrationError(f"`loss_fn` must be a function of the model and a batch, got {shown(loss_fn)}.")


def calibration_loss(
    model: nn.Module, batch: Mapping[str, Any], loss_fn: LossFn | None = None, where: str = "a calibration batch"
) -> torch.Tensor:
    """The loss of one batch as a float32 scalar. Raises `CalibrationError` if there is no loss or it is not finite."""
    batch = to_device(batch, device_of(model))
    loss: torch.Tensor | None
    if loss_fn is not None:
        check_loss_fn(loss_fn)
        loss = loss_fn(model, batch)
        if not isinstance(loss, torch.Tensor):
            raise CalibrationError(
                f"`loss_fn` must return a tensor for {where}, got {type(loss).__name__}: return the loss itself, "
                f"without `.item()`."
            )
    else:
        output = run_model(model, batch, where)
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if isinstance(output, tuple) and output and isinstance(output[0], torch.Tensor) and not output[0].dim():
            loss = output[0]  # with `config.return_dict=False`, the loss comes first if there are labels
    if not isinstance(loss, torch.Tensor):
        raise CalibrationError(
            f"The model returned no loss for {where}, whose keys are {sorted(batch)}: calibration batches need labels "
            f"(or pass `loss_fn=`, a function of the model and the batch)."
        )
    loss = loss.float().mean()
    if not torch.isfinite(loss):
        if not is_labeled(batch):
            raise CalibrationError(
                f"All labels of {where} are -100, or only first tokens have others, which language models do not "
                f"predict. So it has no loss: leave it out, or give longer sequences."
            )
        raise not_finite(f"The loss of {where} is {loss.item()}")
    return loss


def is_labeled(batch: Mapping[str, Any]) -> bool:
    """Whether a batch may have a loss: its labels are not all negative. Language models predict no first token."""
    labels, ids = batch.get("labels"), batch.get("input_ids")
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
        return True
    one_a_token = labels.dim() > 1 and labels.shape == getattr(ids, "shape", labels.shape)
    return bool(((labels[:, 1:] if one_a_token else labels) >= 0).any())


def check_differentiable(loss: torch.Tensor, where: str) -> None:
    """Raises `CalibrationError` if a loss has no gradient, by which units could be ranked."""
    if not loss.requires_grad:
        raise CalibrationError(
            f"The loss of {where} has no gradient. `loss_fn` must compute it from the model's output, without "
            f"`detach()` and `torch.no_grad()`; or score without gradients: score='magnitude'."
        )


def run_model(model: nn.Module, batch: Mapping[str, Any], where: str) -> Any:
    """What the model returns for a batch. Raises `CalibrationError` if it does not accept the batch."""
    texts = sorted(k for k, v in batch.items() if isinstance(v, str) or (isinstance(v, list) and _is_text(v)))
    if texts:
        raise CalibrationError(
            f"The key {texts[0]!r} of {where} holds text. `calibration` must yield batches that `model(**batch)` "
            f"accepts: tokenize the texts first, and leave out columns that are not inputs of the model."
        )
    try:
        return model(**batch)
    except (SensiError, torch.OutOfMemoryError):
        raise
    # An id beyond the vocabulary or a label beyond the classes is an `IndexError`, a wrong dtype a `RuntimeError`.
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
        raise CalibrationError(
            f"`model(**batch)` failed for {where} of `calibration`, whose keys are {sorted(batch)}: give batches that "
            f"the model accepts. Its error was: {error}"
        ) from error


def run_forward(model: nn.Module, batch: Mapping[str, Any], loss_fn: LossFn | None, where: str) -> None:
    """Runs the model on a batch as its loss does, for hooks that read what is inside. No labels are needed."""
    if loss_fn is not None:
        check_loss_fn(loss_fn)
        loss_fn(model, dict(batch))  # it may take the labels out
    else:
        run_model(model, batch, where)


def _is_text(values: list[Any]) -> bool:
    return any(isinstance(value, str) for value in values)


def tokens_in(batch: Any) -> float:
    """The number of tokens, padding included; infinite for inputs that are not token ids."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return ids.numel() if isinstance(ids, torch.Tensor) else math.inf


def weight_of(batch: Mapping[str, Any], own_loss: bool) -> int:
    """The weight of a batch in a mean over the batches of all processes.

    It is the number of labeled positions if the loss is a mean over these, otherwise the number of examples.
    `own_loss` says that the user's own function computes the loss. It is then assumed to be a mean over examples.
    """
    labels = batch.get("labels")
    if not own_loss and isinstance(labels, torch.Tensor) and labels.dim() > 1 and not labels.is_floating_point():
        return int((labels >= 0).sum())
    return examples_in(batch)


def examples_of(batch: Mapping[str, Any], rows: list[int]) -> dict[str, Any]:
    """These examples of a batch. Values that do not have one row for each example stay as they are."""
    size = examples_in(batch)
    return {k: v[rows] if isinstance(v, torch.Tensor) and v.dim() and len(v) == size else v for k, v in batch.items()}


def can_be_divided(batch: Mapping[str, Any]) -> bool:
    """Whether all tensors of a batch have one row for each example, and it has no lists."""
    size = examples_in(batch)
    values = [v for v in batch.values() if v is not None and not isinstance(v, (bool, int, float, str))]
    return all(isinstance(v, torch.Tensor) and v.dim() and len(v) == size for v in values)


@contextmanager
def observing(
    model: nn.Module,
    groups: Iterable[Group],
    observe: Callable[[Group, torch.Tensor, torch.Tensor, torch.Tensor], None],
) -> Iterator[None]:
    """Inside the block, `observe(group, z, y, total)` is called when the sublayer of one of these groups has run.

    A group holds the units of one attention or FFN. `z` and `y` are the input and the output of its output projection.
    `total` is the residual sum that the next LayerNorm gets. Each is `[..., features]`.
    """
    seen: dict[Group, tuple[torch.Tensor, torch.Tensor]] = {}

    def at_output(group: Group, module: nn.Module, args: tuple, y: torch.Tensor) -> None:
        seen[group] = (args[0], y)

    def at_sum(group: Group, total: torch.Tensor) -> None:
        parts = seen.pop(group, None)
        if parts is not None and parts[1].shape[:-1].numel() == total.shape[:-1].numel():
            # OPT flattens batch and tokens into one dimension for its FFN.
            z, y = (part.reshape(*total.shape[:-1], part.shape[-1]) for part in parts)
            observe(group, z, y, total)

    with ExitStack() as hooks:
        for group in groups:
            output = model.get_submodule(group.output)
            hooks.enter_context(output.register_forward_hook(partial(at_output, group)))
            if group.norm:
                norm = model.get_submodule(group.norm)
                hook = norm.register_forward_pre_hook(lambda m, args, group=group: at_sum(group, args[0]))
            else:  # without such a norm, the layer returns the sum itself
                layer = model.get_submodule(group.layer)
                hook = layer.register_forward_hook(lambda m, args, y, group=group: at_sum(group, first_of(y)))
            hooks.enter_context(hook)
        yield


def first_of(output: Any) -> torch.Tensor:
    """The hidden states that a layer returns, alone or as the first value of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def saved_buffers(model: nn.Module) -> Callable[[], None]:
    """Copies the model's buffers, such as the statistics of batch norms. Returns a function that puts them back."""
    saved = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]

    @torch.no_grad()
    def restore() -> None:
        for buffer, value in saved:
            if not torch.equal(buffer, value):
                buffer.copy_(value)

    return restore


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restores what forward and backward passes may change, even if an error occurs inside the block.

    This covers the structure of the model (see `utils.undo`; a forward pass with labels sets `config.problem_type`),
    training mode, `requires_grad`, `.grad`, buffers, and the random states of Python, NumPy and torch on CPU and CUDA.
    It does not cover weights: code that changes them must restore them (see `priming.primed`). Raises `SensiError` if
    the model cannot have gradients.
    """
    if torch.is_inference_mode_enabled() or any(parameter.is_inference() for parameter in model.parameters()):
        raise SensiError(
            "Under `torch.inference_mode()`, and for weights that were loaded under it, no gradients exist, so no "
            "units can be chosen and nothing can be trained. Load the base and add the adapter outside of it."
        )
    structure = snapshot(model)
    restore_buffers = saved_buffers(model)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []

    @torch.no_grad()
    def restore() -> None:
        structure()
        restore_buffers()
        random.setstate(python_state)
        np.random.set_state(numpy_state)

    with torch.random.fork_rng(devices=devices):
        try:
            model.zero_grad()  # a backward pass would add to the user's gradients in place
            yield
        finally:
            surely(restore)
