"""What the values in a plain `state_dict` mean, and the check of it when a state dict is loaded.

`torch.save(model.state_dict())`, `accelerate.save_state`, checkpoints of Lightning and copies with averaged weights
know nothing of PEFT's two files. The values of an adapter have a meaning only together with its plan, which says to
which units they belong. So each layer adds an entry `plan_mark._extra_state` to the state dict, a hash of what its
values mean, and refuses an entry that differs. The entry is a tensor, because safetensors holds nothing else.

Loaders that fill existing tensors (DCP) have overwritten the model's values before they ask it. But they compare all
shapes first. So the width of an entry depends on the hash: it has up to 255 zeros after it. Such a loader refuses
another plan with "Size mismatch ... for ...plan_mark._extra_state", and writes nothing.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from torch import nn

from ..utils.errors import SensiLoadError
from .integers import is_close
from .slices import Slice


EXTRA = "_extra_state"  # the name that PyTorch gives to such an entry
LAYER_MARK = f"plan_mark.{EXTRA}"  # in the layer (see `Mark`)
_LENGTH = 32  # bytes of a SHA-256
_MERGED = ""  # in the place of an adapter's name, which is never empty
_INTEGERS = "\0"  # after an adapter's name: the row has the hash of its integers (see `integers`)


def plan_mark(plan: Mapping[str, Any]) -> bytes:
    """SHA-256 of the units that a plan (see `Plan.to_dict`) keeps and tunes. Counts beside them have no influence."""
    return hashlib.sha256(json.dumps(plan["groups"], sort_keys=True).encode()).digest()


def slice_mark(slice_: Slice, plan: bytes) -> bytes:
    """SHA-256 of a plan's mark and of all in a slice that says what the tensors of a layer mean."""
    options = (
        slice_.base_shape, slice_.has_bias, slice_.dim, slice_.units, slice_.train_bias, slice_.rank, slice_.sparse,
        slice_.sparsity, slice_.learns_mask, slice_.gated, slice_.compressed,
        *([slice_.scale] if slice_.scale != 1 else []),  # the marks of adapters without a scale stay as they were
    )  # fmt: skip
    mark = hashlib.sha256(plan + json.dumps(options).encode())
    for positions in (slice_.kept, slice_.tuned_positions):
        mark.update(positions.cpu().contiguous().numpy().tobytes())
    return mark.digest()


def layer_marks(slices: Mapping[str, Slice], plans: Mapping[str, bytes], merged: Sequence[str]) -> dict[str, bytes]:
    """The mark of each adapter on a layer. If adapters are `merged` into its base, one more mark says which."""
    marks = {name: slice_mark(slices[name], plan) for name, plan in plans.items()}
    return marks | ({_MERGED: hashlib.sha256(json.dumps(merged).encode()).digest()} if merged else {})


def marks_to_tensor(marks: Mapping[str, bytes], digests: Mapping[str, bytes] | None = None) -> torch.Tensor:
    """Marks by adapter as uint8 `[rows, 64 to 319]`: each row is a hash of the name, the mark, and zeros.

    How many zeros there are depends on the marks, so that other marks usually have another shape. `digests` are hashes
    of the integers of adapters that have some. Each has one more row.
    """
    every = {**marks, **{name + _INTEGERS: digest for name, digest in (digests or {}).items()}}
    rows = [hashlib.sha256(name.encode()).digest() + mark for name, mark in sorted(every.items())]
    zeros = bytes(hashlib.sha256(b"".join(sorted(marks.values()))).digest()[0])  # the same whatever the names are
    # A new tensor each time: copies that average all entries in place (EMA) then leave the marks alone.
    flat = torch.tensor(list(b"".join(row + zeros for row in rows)), dtype=torch.uint8, device="cpu")
    return flat.view(len(rows), 2 * _LENGTH + len(zeros))


def check_marks(stored: Any, marks: Mapping[str, bytes], where: str, there: Collection[str] = ()) -> dict[str, bytes]:
    """Raises `SensiLoadError` if a mark in `stored` (see `marks_to_tensor`) differs from that of the same adapter.

    `there` are the adapters that the state dict has values of: a mark must be there for each. Returns the digests.
    """
    if not isinstance(stored, torch.Tensor) or stored.dim() != 2 or stored.shape[1] < 2 * _LENGTH:
        raise SensiLoadError(f"{where!r} in the state dict does not hold the mark of a plan.")
    # A copy may hold averages, as floats or truncated. They differ from the bytes by 1 at most.
    rounded = stored.detach().cpu().double().round().clamp(0, 255).to(torch.uint8)
    rows = [bytes(row) for row in rounded.tolist()]

    def find(name: str) -> bytes | None:
        key = hashlib.sha256(name.encode()).digest()
        return next((row[_LENGTH : 2 * _LENGTH] for row in rows if is_close(row[:_LENGTH], key)), None)

    merged, found = marks.get(_MERGED), find(_MERGED)
    if (found is None) != (merged is None) or (found and merged and not is_close(found, merged)):
        raise SensiLoadError(
            f"An adapter was merged into the base when the state dict was made, or is merged into it in this model, "
            f"but not both ({where!r}). The adapter would be applied twice, or lost. Call `unmerge_adapter()` before "
            f"a state dict is made, and before one is loaded."
        )
    for name, mark in marks.items():
        found = find(name)
        if found is None and name in there:
            raise SensiLoadError(
                f"{where!r} in the state dict has no mark of the plan of {name!r}, although there are values of this "
                f"adapter. The entry was changed: average or convert only floats, and copy integers as they are."
            )
        if found is not None and not is_close(found, mark):
            raise SensiLoadError(
                f"The state dict was made under another plan than the adapter {name!r} of this model has: {where!r} "
                f"says that its values belong to other units, or were trained with other settings. Wrap the model "
                f"with the config of the saved model: its `peft_config[{name!r}]`, or the "
                f"`SensiConfig.from_pretrained(folder)` of its saved adapter with `inference_mode` set to False. "
                f"`PeftModel.from_pretrained` follows the plan of a saved adapter by itself."
            )
    return {name: digest for name in marks if (digest := find(name + _INTEGERS)) is not None}


def warn_of_no_mark(key: str) -> None:
    """Warns that a state dict has values of an adapter, but does not say which plan they belong to."""
    warnings.warn(
        f"The state dict holds {key!r}, but not the mark of the plan that its values belong to. They are loaded, and "
        f"nothing can check that this model has the same plan. Save the whole `state_dict()`, or use "
        f"`save_pretrained`.",
        stacklevel=2,
    )


def marks_are_written() -> bool:
    """Whether state dicts get marks. Accelerate's FSDP takes every entry of a state dict for a parameter."""
    return not parse_flag_from_env("ACCELERATE_USE_FSDP")


class Mark(nn.Module):
    """A layer's child that gives the layer's mark its name in state dicts. The layer writes and checks the entry.

    An entry of the layer itself would look like a part of the base's module to PEFT (`get_base_model_state_dict`).
    """

    def _load_from_state_dict(self, *arguments: Any) -> None:
        """Leaves the entry to the layer."""
