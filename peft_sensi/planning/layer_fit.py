"""Fits all Linears of a trimmed layer by gradient descent, until the layer computes what the untrimmed layer does.

The closed form of `refit` can only change output projections. If few units are left, the Linears that compute queries,
keys, values and neurons have to change as well. For the weights W of a layer f, this minimizes

    sum_t |f_W(x_t) - y_t|^2 / var(y_t)

For each token t, `x_t` is the hidden state that the trimmed model has before the layer, and `y_t` the one that the
untrimmed model has after it. No labels are used, and only one layer is computed at a time, as BRECQ does for quantized
models (Li et al. 2021, arXiv 2102.05426).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.func import functional_call
from torch.optim import Adam
from torch.optim.lr_scheduler import OneCycleLR

from ..anatomy.linears import bias_of, oriented
from ..anatomy.modules import linear_of
from ..scoring.calibration import first_of, token_mask
from ..utils import distributed
from ..utils.errors import CalibrationError
from .layerwise import Stream
from .least_squares import Values, token_weights


RATE = 0.02  # the highest learning rate of a Linear, as a share of the root mean square of its weight
WARM_UP = 0.1  # share of the steps in which the rate rises; after that it falls


def fit_layer(model: nn.Module, layer: str, names: list[str], streams: list[Stream], rounds: int) -> dict[str, Values]:
    """New values for the Linears `names` of a layer of the trimmed `model`, which is left as it is.

    The streams must have the hidden states before the trimmed layer and those after the untrimmed layer. `rounds` says
    how often each batch is used. The result is empty if the error on the held-out batches is not smaller than before,
    or if a gradient is not finite. All processes get the same result. Raises `CalibrationError` if the hidden states
    were recorded under `torch.inference_mode()`.
    """
    if any(entry.is_inference() for stream in streams for entry in stream.trimmed_calls.entries.values()):
        raise CalibrationError(
            "`loss_fn` runs the model under `torch.inference_mode()`, so no layer can be fitted to it: use "
            "`torch.no_grad()` there, or set `refit=False`."
        )
    module = model.get_submodule(layer)
    paths = {id(parameter): path for path, parameter in module.named_parameters(remove_duplicate=False)}
    linears = {name: linear for name in names if (linear := linear_of(model, name)).weight.numel()}
    # The values are float32 also in a 16-bit model, whose steps would be rounded away.
    start: dict[str, torch.Tensor] = {}
    settings = []
    for linear in linears.values():
        own = {paths[id(p)]: p.detach().float() for p in (linear.weight, bias_of(linear)) if p is not None}
        rate = RATE * float(linear.weight.float().square().mean().sqrt())
        start |= own
        settings.append((list(own), rate))
    counts = distributed.gather("counting batches of a fit", sum(stream.fits for stream in streams))
    steps = rounds * max(counts)
    if not start or not steps:
        return {}
    values = {path: value.clone().requires_grad_() for path, value in start.items()}
    optimizer = Adam([{"params": [values[path] for path in own], "lr": rate} for own, rate in settings])
    schedule = OneCycleLR(optimizer, [rate for _, rate in settings], total_steps=steps, pct_start=WARM_UP)
    for stream in _in_random_order([stream for stream in streams if stream.fits], rounds, max(counts)):
        # A process that has fewer batches than others takes part with zeros.
        gradients, total_weight = [torch.zeros_like(value) for value in values.values()], 0.0
        if stream is not None:
            with torch.enable_grad():
                error, total_weight = _error(module, layer, values, stream)
                # Zeros for a sublayer that did not run, such as a cross-attention without an encoder.
                gradients = list(torch.autograd.grad(error, list(values.values()), materialize_grads=True))
        total = gradients[0].new_tensor(total_weight)
        distributed.all_sum([*gradients, total], "fitting a layer")
        if not all(gradient.isfinite().all() for gradient in gradients):
            return {}
        if not total:  # a batch without a single token that is not padding
            continue
        for value, gradient in zip(values.values(), gradients, strict=True):
            value.grad = gradient / total
        optimizer.step()
        schedule.step()
    held_out = [stream for stream in streams if stream.holds_out]
    errors = [sum(float(_error(module, layer, v, stream)[0]) for stream in held_out) for v in (start, values)]
    before, after = map(sum, zip(*distributed.gather("checking a fit", errors), strict=True))
    if not after < before:
        return {}
    found: dict[str, Values] = {}
    for name, linear in linears.items():
        bias = bias_of(linear)
        weight = oriented(linear, values[paths[id(linear.weight)]]).detach()
        found[name] = weight, None if bias is None else values[paths[id(bias)]].detach()
    return found


def _error(
    module: nn.Module, layer: str, values: Mapping[str, torch.Tensor], stream: Stream
) -> tuple[torch.Tensor, float]:
    """The weighted squared error of a layer with these `values` on one batch, and the sum of the tokens' weights."""
    dtypes = {path: module.get_parameter(path).dtype for path in values}
    args, kwargs = stream.trimmed_calls.arguments[layer]
    cast = {path: value.to(dtypes[path]) for path, value in values.items()}
    output = first_of(functional_call(module, cast, (stream.trimmed, *args), kwargs)).float()
    target = stream.untrimmed.float()
    if (mask := token_mask(stream.batch, target.shape[:-1])) is not None:
        output, target = output[mask], target[mask]
    weights = token_weights(target)
    return ((output - target).square().sum(-1) * weights).sum(), float(weights.sum())


def _in_random_order(streams: list[Stream], rounds: int, count: int) -> list[Stream | None]:
    """Each stream once per round, and `None` up to `count` entries a round. The order is the same at each call."""
    generator = torch.Generator("cpu").manual_seed(0)
    order: list[Stream | None] = []
    for _ in range(rounds):
        order += [streams[i] for i in torch.randperm(len(streams), generator=generator).tolist()]
        order += [None] * (count - len(streams))
    return order
