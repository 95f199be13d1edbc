"""Measures a latency table of a PyTorch model, on the device where the model is."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version as version_of
from typing import Any

import numpy as np
import torch
from torch import nn

from ..anatomy.build import build_anatomy, nothing_to_trim
from ..anatomy.inputs import image_tokens
from ..anatomy.latency import LatencyTable, shape_of
from ..anatomy.latency_points import Counts, kinds_of, points_of, table_from
from ..anatomy.units import Anatomy
from ..scoring.calibration import to_device
from ..utils.checks import shown
from ..utils.errors import SensiError, first_line
from ..utils.timing import Run, clock_for, processor_name, time_variants
from .plan import Plan
from .trimmed import trimmed


Inputs = Mapping[str, torch.Tensor]

_LARGEST_COPY = 2**30  # bytes of a model's tensors


def measure_torch(
    model: nn.Module,
    *,
    batch_size: int,
    sequence_length: int,
    threads: int | None = None,
    decode: bool = False,
    inputs: Inputs | None = None,
    rounds: int = 7,
    blocks: Any = None,
) -> LatencyTable:
    """The latency table of a model in PyTorch; see `merging.latency.measure_latency`. The model stays as it is."""
    anatomy = measurable(model, blocks)
    kinds = kinds_of(anatomy)
    device = next(model.parameters()).device
    with number_of_threads(threads) as threads:
        start = partial(start_run, batch_size=batch_size, length=sequence_length, decode=decode, inputs=inputs)

        @contextmanager
        def started(counts: Counts) -> Iterator[Run]:
            small = fresh_copy(model)
            with trimmed(small, plan_keeping(anatomy, counts), anatomy.trimmable):
                yield start(small)

        points = {name: partial(started, counts) for name, counts in points_of(kinds).items()}
        whole, timings = time_variants(partial(started, {}), points, clock_for(threads, device.type), rounds)
    described = {
        "phase": "decode" if decode else "prefill",
        "model": model_name(model),
        "device": device_name(device),
        "runtime": "torch",
        "versions": {name: version_of(name) for name in ("torch", "transformers")},
        "threads": threads,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "sequence_length": sequence_length,
    }
    return table_from(kinds, whole, timings, described)


def measurable(model: nn.Module, blocks: Any = None) -> Anatomy:
    """The units of a model that can be measured. Raises `AnatomyError` if it has no heads or neurons to trim."""
    anatomy = build_anatomy(model, (), blocks)
    if not anatomy.trimmable:
        raise nothing_to_trim(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise SensiError("The model has no weights (it is on the meta device), so it cannot be measured: load it.")
    return anatomy


def plan_keeping(anatomy: Anatomy, counts: Mapping[str, int]) -> Plan:
    """A plan in which the sublayers of these kinds (by `shape_of`) keep so many of their first units."""
    states = []
    for group in anatomy.groups:
        kept = max(group.least, counts.get(shape_of(group), group.size)) if group.trimmable else group.size
        states.append((np.arange(group.size) < kept).astype(np.uint8).tobytes())
    return Plan(anatomy, tuple(states), frozenset(), 1)


def fresh_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode. On a CPU, its tensors lie elsewhere in the memory, where the model may run faster or
    slower. Large models share their tensors with the copy: they are spread over so much memory that it matters less.
    """
    tensors = [*model.parameters(), *model.buffers()]
    is_small = sum(tensor.nbytes for tensor in tensors) <= _LARGEST_COPY
    is_copied = is_small and all(tensor.device.type == "cpu" for tensor in tensors)
    return copy.deepcopy(model, {} if is_copied else {id(tensor): tensor for tensor in tensors}).eval()


def example_inputs(
    model: nn.Module, batch_size: int, length: int, given: Inputs | None = None
) -> dict[str, torch.Tensor]:
    """The batch that is `given`, or one of this shape: random token ids with a mask, or a random image.

    It is on the model's device. Raises `SensiError` if none is given and the model takes other inputs.
    """
    device = next(model.parameters()).device
    if given is not None:
        if not isinstance(given, Mapping) or not all(isinstance(value, torch.Tensor) for value in given.values()):
            raise SensiError(f"`inputs` must be a mapping from names to tensors, got {shown(given)}.")
        return to_device(given, device)
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        raise SensiError(
            f"{type(model).__name__} has no config of Transformers, which tells what it takes: give a batch as "
            f"`inputs` of `measure_latency`."
        )
    accepted = inspect.signature(model.forward).parameters
    try:
        if "input_ids" in accepted:
            batch = _random_texts(config, batch_size, length)
        elif "pixel_values" in accepted:
            size = config.image_size if isinstance(config.image_size, (tuple, list)) else (config.image_size,) * 2
            shape = (batch_size, config.num_channels, *size)
            batch = {"pixel_values": torch.randn(shape, generator=_generator(), device="cpu")}
        else:
            raise SensiError(f"{type(model).__name__} takes neither token ids nor images: give a batch as `inputs`.")
        return {name: value.to(device) for name, value in batch.items() if name in accepted}
    except RuntimeError as error:  # of PyTorch, if the memory is too small
        raise SensiError(f"A batch of {batch_size} x {length} cannot be made: {first_line(error)}") from error


def _random_texts(config: Any, batch_size: int, length: int) -> dict[str, torch.Tensor]:
    """Token ids without special tokens, and their mask; for an encoder-decoder those of the decoder, too."""
    text = config.get_text_config()
    ids = torch.randint(0, text.vocab_size, (batch_size, length), generator=_generator(), device="cpu")
    ends = getattr(text, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends]
    special = {token for token in (getattr(text, "pad_token_id", None), *ends) if token is not None}
    usual = next(token for token in range(len(special) + 1) if token not in special)
    for token in special:
        ids = ids.masked_fill(ids == token, usual)
    has_both = getattr(config, "is_encoder_decoder", False)
    if has_both and ends[0] is not None:
        ids[:, -1] = ends[0]  # the classifiers of BART and T5 read the last token, and look for this one
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return batch | ({"decoder_input_ids": ids} if has_both else {})


def _generator() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(0)


def tokens_of(model: nn.Module, length: int, given: Inputs | None = None) -> int:
    """The tokens of a sequence of `example_inputs`: those of an image, if that is what the model takes."""
    return length if given is not None else image_tokens(model) or length


def start_run(
    model: nn.Module, *, batch_size: int, length: int, decode: bool, inputs: Inputs | None = None
) -> Callable[[], object]:
    """A function that runs the model once: on a batch, or (`decode`) on the next token after `length` cached ones.

    Raises `SensiError` if the model cannot run it.
    """
    if decode and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        # A step does not run the encoder, whose sublayers have the same shapes as those of the decoder.
        raise SensiError(
            f"A decoding step is measured for decoders only: {type(model).__name__} has an encoder, too. Measure it "
            f"without `decode`."
        )
    batch: dict[str, Any] = example_inputs(model, batch_size, length, inputs)
    options: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1  # as `generate` does
    device = next(model.parameters()).device
    synchronize = torch.cuda.synchronize if device.type == "cuda" else None
    cache: Any = None
    try:
        with torch.inference_mode():
            if decode:
                cache = getattr(model(**batch, **options, use_cache=True), "past_key_values", None)
                if cache is None:
                    raise ValueError("it returns no cache, so it has no decoding steps")
                if hasattr(cache, "activate_past_recording"):  # else a full sliding window cannot be cropped
                    cache.activate_past_recording()
                batch = {
                    "input_ids": batch["input_ids"][:, -1:],
                    "attention_mask": torch.ones(batch_size, length + 1, dtype=torch.long, device=device),
                }

        @torch.inference_mode()
        def run() -> None:
            if cache is None:
                model(**batch, **options)
            else:
                model(**batch, **options, past_key_values=cache, use_cache=True)
                cache.crop(-1)  # the next run starts from the same cache
            if synchronize is not None:
                synchronize()

        run()
    except Exception as error:  # of any class: the model's own code
        what = f"a step after {length} cached tokens" if decode else f"a batch of {batch_size} x {length}"
        reason = f"{type(error).__name__}: {first_line(error)}"
        advice = "" if inputs is not None or decode else ". Give a batch that the model accepts as `inputs=`."
        raise SensiError(f"{type(model).__name__} cannot run {what}: {reason}{advice}") from error
    return run


@contextmanager
def number_of_threads(threads: int | None) -> Iterator[int]:
    """Inside the block PyTorch uses this number of threads; `None`: as many as before."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads or before)
        yield threads or before
    finally:
        torch.set_num_threads(before)


def model_name(model: nn.Module) -> str:
    """The model's type as its config names it, else its class."""
    return getattr(getattr(model, "config", None), "model_type", "") or type(model).__name__


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
