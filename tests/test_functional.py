"""The linear map of which a part is trained: values, gradients, and what is saved for the backward pass."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from peft_sensi import SensiError
from peft_sensi.layers import functional
from peft_sensi.layers.functional import Parts, compose, take


OUT, IN, RANK = 7, 5, 2
SLICES = [
    (dim, kind, bias, "")
    for dim, kind, bias in itertools.product((0, 1), ("prefix", "index", "all", "one"), ("trained", "frozen", "none"))
]
OTHERS = [
    (1, kind, "trained", more) for kind, more in itertools.product(("none", "prefix"), ("low", "sparse", "low sparse"))
]
TRAINED = ("tuned_weight", "tuned_bias", "down", "up", "values")


def fused_linear(x, weight, bias, **parts):
    return functional.fused_linear(x, weight, bias, Parts(**parts))


def fused_linear_reference(x, weight, bias, **parts):
    return F.linear(x, *compose(weight, bias, Parts(**parts)))


def case(dim: int, kind: str, bias: str, more: str = "", dtype=torch.float64, tokens=(2, 6)) -> dict[str, Any]:
    """Arguments of the reference: `weight` and `bias` hold the frozen values, the trained parts are leaves."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    size = (OUT, IN)[dim]
    tuned = {"prefix": 3, "index": torch.tensor([0, 2, size - 1]), "all": size, "one": 1, "none": 0}[kind]
    count = tuned if isinstance(tuned, int) else len(tuned)
    arguments = {"x": rand(*tokens, IN), "weight": rand(OUT, IN), "bias": None, "dim": dim, "tuned": tuned}
    if count:
        arguments["tuned_weight"] = rand(*((count, IN) if dim == 0 else (OUT, count)))
    if bias != "none":
        arguments["bias"] = rand(OUT)
    if bias == "trained":
        arguments["tuned_bias"] = rand(count if dim == 0 else OUT)
    if "low" in more:
        arguments["down"], arguments["up"] = rand(RANK, IN), rand(OUT, RANK)
    if "sparse" in more:
        arguments["values"], arguments["places"] = rand(4), torch.tensor([0, 3, 17, OUT * IN - 1])
    for name in ("x", *TRAINED):
        if name in arguments:
            arguments[name].requires_grad_()
    return arguments


def fused(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments for the fast form, whose `weight` and `bias` already hold all but the low-rank term."""
    with torch.no_grad():
        plain = {k: v for k, v in arguments.items() if k not in ("x", "down", "up")}
        zero = torch.zeros(1, IN, dtype=arguments["weight"].dtype)
        bias = None if arguments["bias"] is None else fused_linear_reference(zero, **plain)[0]
        eye = torch.eye(IN, dtype=arguments["weight"].dtype)
        weight = fused_linear_reference(eye, **plain) - (0 if bias is None else bias)
    return {**arguments, "weight": weight.t().contiguous(), "bias": bias}


def leaves(arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: arguments[name] for name in ("x", *TRAINED) if name in arguments}


def run(function, arguments):
    y = function(**arguments)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves(arguments).items()}}


@pytest.mark.parametrize(("dim", "kind", "bias", "more"), SLICES + OTHERS)
def test_gradients_are_right(dim, kind, bias, more):
    arguments = case(dim, kind, bias, more)
    names = list(leaves(arguments))

    def function(*values):
        # Numerical derivatives move the trained values: the fused weight follows, as the layer sees to.
        return fused_linear(**fused({**arguments, **dict(zip(names, values, strict=True))}))

    assert torch.autograd.gradcheck(function, [arguments[name] for name in names])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "kind", "bias", "more"), SLICES + OTHERS)
def test_the_fast_form_equals_the_reference(dim, kind, bias, more, dtype):
    found = run(fused_linear, fused(case(dim, kind, bias, more, dtype)))
    expected = run(fused_linear_reference, case(dim, kind, bias, more, dtype))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        torch.testing.assert_close(
            found[name], value, atol=tolerance, rtol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("dim", [0, 1])
def test_a_slice_is_a_slice_of_the_plain_linear_map(dim):
    arguments = case(dim, "index", "trained")
    weight, bias = arguments["weight"].clone(), arguments["bias"].clone()
    index = arguments["tuned"]
    (weight if dim == 0 else weight.t())[index] = (
        arguments["tuned_weight"] if dim == 0 else arguments["tuned_weight"].t()
    )
    bias[index if dim == 0 else slice(None)] = arguments["tuned_bias"]
    plain = F.linear(arguments["x"], weight, bias)
    torch.testing.assert_close(fused_linear_reference(**arguments), plain)
    torch.testing.assert_close(fused_linear(**fused(arguments)), plain)


@pytest.mark.parametrize("tokens", [(), (3,), (2, 3, 4), (0,)], ids=str)
@pytest.mark.parametrize(("dim", "more"), [(0, ""), (1, ""), (1, "low sparse")])
def test_any_number_of_leading_dimensions(dim, more, tokens):
    found = run(fused_linear, fused(case(dim, "prefix", "trained", more, tokens=tokens)))
    expected = run(fused_linear_reference, case(dim, "prefix", "trained", more, tokens=tokens))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def saved_sizes(arguments: dict[str, Any]) -> tuple[list[int], torch.Tensor]:
    """Numbers of values in the *storages* of all saved tensors: a view of a large tensor keeps all of it alive."""
    sizes = []

    def pack(tensor):
        sizes.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = fused_linear(**arguments)
    return sorted(sizes), y


@pytest.mark.parametrize("kind", ["prefix", "index"])
@pytest.mark.parametrize("dim", [0, 1])
def test_only_the_needed_activations_are_saved(dim, kind):
    arguments = fused(case(dim, kind, "trained", tokens=(100,)))
    sizes, _ = saved_sizes(arguments)
    activations = 100 * IN if dim == 0 else 100 * 3  # whole rows need the whole input, columns only their own
    assert sizes == sorted([OUT * IN, activations, arguments["tuned_weight"].numel()])


@pytest.mark.parametrize("dim", [0, 1])
def test_the_input_is_not_saved_when_only_the_bias_is_trained(dim):
    arguments = fused(case(dim, "all", "trained", tokens=(100,)))
    del arguments["tuned_weight"]
    sizes, y = saved_sizes(arguments)
    assert sizes == [OUT * IN]
    y.sum().backward()
    torch.testing.assert_close(arguments["tuned_bias"].grad, torch.full((OUT,), 100.0, dtype=torch.float64))
    sizes, y = saved_sizes({**arguments, "x": arguments["x"].detach()})
    assert sizes == []
    y.sum().backward()


@pytest.mark.parametrize("dim", [0, 1])
def test_the_weight_is_not_saved_when_the_input_needs_no_gradient(dim):
    arguments = fused(case(dim, "prefix", "trained", tokens=(100,)))
    sizes, y = saved_sizes({**arguments, "x": arguments["x"].detach()})
    assert OUT * IN not in sizes and len(sizes) == 2
    y.sum().backward()
    assert arguments["x"].grad is None and arguments["tuned_weight"].grad is not None


def test_the_whole_input_is_saved_as_it_is_and_not_as_a_copy():
    arguments = fused(case(0, "prefix", "trained", tokens=(100,)))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        fused_linear(**arguments)
    assert arguments["x"].data_ptr() in saved


def test_a_low_rank_term_saves_nothing_of_the_weights_size_but_the_weight():
    arguments = fused(case(1, "none", "frozen", "low", tokens=(3,)))
    sizes, _ = saved_sizes(arguments)
    assert sizes == sorted([OUT * IN, 3 * IN, RANK * IN, OUT * RANK])


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("more", ["", "low sparse"])
def test_nothing_is_saved_when_nothing_is_needed(grad, more):
    arguments = fused(case(1, "prefix", "trained", more))
    if grad:
        arguments.update({name: leaf.detach() for name, leaf in leaves(arguments).items()})
    with torch.set_grad_enabled(grad):
        sizes, y = saved_sizes(arguments)
    assert sizes == [] and not y.requires_grad


@pytest.mark.parametrize("dim", [0, 1])
def test_a_trained_weight_that_changed_before_the_backward_pass_is_an_error(dim):
    arguments = fused(case(dim, "prefix", "trained"))
    y = fused_linear(**arguments)
    with torch.no_grad():
        arguments["tuned_weight"].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", ["down", "up", "values"])
def test_other_trained_tensors_that_changed_before_the_backward_pass_are_an_error(name):
    arguments = fused(case(1, "none", "frozen", "low sparse"))
    y = fused_linear(**arguments)
    with torch.no_grad():
        arguments[name].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("dim", [0, 1])
def test_the_fused_weight_may_be_rewritten_with_the_values_it_has(dim):
    arguments = fused(case(dim, "prefix", "trained"))
    y = fused_linear(**arguments)
    take(arguments["weight"].data, dim, 3).copy_(arguments["tuned_weight"].detach())
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    expected = run(fused_linear_reference, case(dim, "prefix", "trained"))
    torch.testing.assert_close(arguments["tuned_weight"].grad, expected["tuned_weight"])


def test_two_forward_passes_and_one_backward_pass():
    arguments, once = fused(case(1, "prefix", "trained")), case(1, "prefix", "trained")
    (fused_linear(**arguments).sum() + fused_linear(**arguments).sum()).backward()
    fused_linear_reference(**once).sum().backward()
    for name, leaf in leaves(arguments).items():
        torch.testing.assert_close(leaf.grad, 2 * once[name].grad)


@pytest.mark.parametrize("dim", [0, 1])
def test_masters_of_another_type_get_gradients_of_their_own_type(dim):
    arguments = fused(case(dim, "prefix", "trained", dtype=torch.bfloat16, tokens=(301,)))
    masters = {name: arguments[name].detach().float().requires_grad_() for name in ("tuned_weight", "tuned_bias")}
    fused_linear(**{**arguments, **masters}).sum().backward()
    assert all(m.grad.dtype == torch.float32 for m in masters.values())
    # Summed in float32: bfloat16 counts in twos above 256.
    assert masters["tuned_bias"].grad.eq(301).all()


def test_second_derivatives_are_refused_and_not_wrong():
    arguments = fused(case(0, "prefix", "trained"))
    y = fused_linear(**arguments).pow(2).sum()
    # PyTorch's `once_differentiable` lets this pass, and the second derivatives are wrong.
    with pytest.raises(SensiError, match="Second derivatives"):
        torch.autograd.grad(y, arguments["tuned_weight"], create_graph=True)


@pytest.mark.parametrize("shape", [(5, 4), (2, 5, 4)], ids=str)
def test_the_output_can_be_changed_in_place(shape):
    """DeBERTa and Longformer do this with queries."""
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(6, 4)
    tuned = weight[:3].clone().requires_grad_()
    result = functional.fused_linear(x, weight, None, Parts(tuned_weight=tuned, tuned=3))
    result += 1
    result.view(-1).mul_(2)
    result.square().sum().backward()
    whole = torch.cat([tuned, weight[3:]])
    expected = torch.autograd.grad(((x @ whole.t() + 1) * 2).square().sum(), [x, tuned])
    torch.testing.assert_close([x.grad, tuned.grad], list(expected))
