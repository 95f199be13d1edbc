"""Fits all Linears of a trimmed layer by gradient descent, until the layer computes what the untrimmed layer does.

The closed form of `refit` can only change output projections. If few units are left, the Linears that compute queries,
keys, values and neurons have to change as well. For the weights W of a layer f, this minimizes

    sum_t |f_W(x_t) - y_t|^2 / var(y_t)

For each token t, `x_t` is the hidden state that the trimmed model has before the layer, and `y_t` the one that the
untrimmed model has after it. No labels are used, and only one layer is computed at a time, as BRECQ does for quantized
models (Li et al. 2021, arXiv 2102.05426).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call

from ..anatomy.linears import bias_of, matrix
from ..anatomy.modules import linear_of
from ..scoring.calibration import first_of
from ..scoring.padding import seen_by
from ..utils.errors import CalibrationError
from .descent import Weights, cast_like, distance, fit_linears, in_random_order
from .layerwise import Stream
from .least_squares import Values


RATE = 0.02  # see `descent.fit_linears`


def fit_layer(
    model: nn.Module, layer: str, names: list[str], streams: list[Stream], rounds: int, tokens_first: bool = False
) -> dict[str, Values]:
    """New values for the Linears `names` of a layer of the trimmed `model`, which is left as it is.

    The streams must have the hidden states before the trimmed layer and those after the untrimmed layer. `rounds` says
    how often each batch is used; for `tokens_first`, see `padding.seen_by`. See `descent.fit_linears` for the result.
    Raises `CalibrationError` if the hidden states were recorded under `torch.inference_mode()`.
    """
    if any(entry.is_inference() for stream in streams for entry in stream.trimmed_calls.entries.values()):
        raise CalibrationError(
            "`loss_fn` runs the model under `torch.inference_mode()`, so no layer can be fitted to it: use "
            "`torch.no_grad()` there, or set `refit=False`."
        )
    module = model.get_submodule(layer)

    def error_of(values: Weights, stream: Stream) -> tuple[torch.Tensor, float]:
        args, kwargs = stream.trimmed_calls.arguments[layer]
        output = first_of(functional_call(module, cast_like(module, values), (stream.trimmed, *args), kwargs))
        return distance(output, stream.untrimmed, seen_by(layer, model, stream.batch, tokens_first))

    linears = {name: linear_of(model, name) for name in names}
    start = {name: (matrix(linear), bias_of(linear)) for name, linear in linears.items()}
    fits, held_out = [s for s in streams if s.fits], [s for s in streams if s.holds_out]
    return fit_linears(module, linears, start, in_random_order(fits, rounds), held_out, error_of, RATE)
