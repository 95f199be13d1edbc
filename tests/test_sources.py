"""Inputs and weights that are computed again in the backward pass: same values and gradients, nothing large saved."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from tiny import BOTH, TRIM, TUNE, logits, tiny_batches, tiny_model, train, trained, wrap
from torch.nn import functional as F

from peft_sensi import recipes
from peft_sensi.layers import functional, linear
from peft_sensi.layers.functional import Parts, compose, fuse, fused_linear
from peft_sensi.layers.sources import Source, source_of


LOW_RANK = {"update": "low_rank", "rank": 3}
KINDS = {"trim": TRIM, "tune": TUNE, "both": BOTH, "low rank": LOW_RANK, "sparse": {"update": "sparse", "sparse": 20}}
IN, OUT = 6, 5

PRODUCERS = {
    "gelu": F.gelu,
    "gelu, tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "gated": lambda z: F.silu(z) * (z + 1.0),
    "scaled": lambda z: z * z.sum(-1, keepdim=True),
    "layer norm": lambda z: F.layer_norm(z, z.shape[-1:], torch.linspace(0.5, 2, IN).to(z), torch.ones(IN).to(z)),
}


def heads(z: torch.Tensor) -> torch.Tensor:
    return z.unflatten(-1, (2, IN // 2)).transpose(1, 2)


def eager_attention(z: torch.Tensor, keys: int = 5) -> torch.Tensor:
    """Attention over the first positions, written as the models do."""
    q, k = heads(z), heads(z[:, :keys])
    output = (q @ k.transpose(-2, -1)).softmax(-1) @ k
    return output.transpose(-3, -2).contiguous().flatten(-2)


def kernel_attention(z: torch.Tensor) -> torch.Tensor:
    """The same with PyTorch's function. With dropout, it holds the weights of attention on a CPU."""
    output = F.scaled_dot_product_attention(heads(z), heads(z[:, :5]), heads(z[:, :5]), dropout_p=0.1)
    return output.transpose(1, 2).reshape(z.shape)


PRODUCTS = {
    "eager attention": eager_attention,
    "attention with dropout": kernel_attention,
    "a product": lambda z: z @ z[:, :IN].mT @ z[:, :IN],
}
NONE = {
    "attention over many keys": lambda z: eager_attention(z, IN + 1),
    "an activation of attention's output": lambda z: torch.tanh(eager_attention(z)),
    "relu": torch.relu,  # saves its result
    "times a number": lambda z: z * 2.0,
    "without weights": lambda z: F.layer_norm(z, z.shape[-1:]),
    "a sum": lambda z: z + 1.0,
    "a view": lambda z: F.gelu(z).view(-1, IN),
    "no gradient": lambda z: F.gelu(z.detach()),
}


def hidden(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 7, IN, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", PRODUCERS)
def test_a_source_gives_the_tensor_again_and_holds_nothing_new(name, dtype):
    z = hidden(dtype) * 1.0
    x = PRODUCERS[name](z)
    source = source_of(x)
    assert source is not None
    again = source.compute(*source.operands)
    if name == "layer norm":
        torch.testing.assert_close(again, x.detach())
    else:
        assert torch.equal(again, x)
    saved = [getattr(x.grad_fn, a) for a in dir(x.grad_fn) if a.startswith("_saved_")]
    held = {t.untyped_storage().data_ptr() for t in saved if isinstance(t, torch.Tensor)}
    assert {t.untyped_storage().data_ptr() for t in source.operands} <= held


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", PRODUCTS)
def test_the_output_of_attention_is_computed_again(name, dtype):
    x = PRODUCTS[name](hidden(dtype) * 1.0)
    source = source_of(x)
    assert source is not None and not source.by_columns
    assert torch.equal(source.compute(*source.operands), x)
    node = x.grad_fn
    while "Bmm" not in node.name():
        node = node.next_functions[0][0]
    held = {node._saved_self.untyped_storage().data_ptr(), node._saved_mat2.untyped_storage().data_ptr()}
    assert {t.untyped_storage().data_ptr() for t in source.operands} == held


@pytest.mark.parametrize("kind", ["rows", "columns", "low rank", "all"])
def test_the_output_of_attention_is_saved_only_where_some_columns_are_tuned(kind):
    x = eager_attention(hidden() * 1.0)
    weight, bias, parts = parts_of(kind)
    for tensor in trained_parts(parts).values():
        tensor.requires_grad_()
    y = fast(x, weight, bias, parts)
    saved = [tuple(t.shape) for t in y.grad_fn.saved_tensors if t is not None and t.dim() == 3]
    expected = (2, 7, parts.tuned) if kind == "columns" else tuple(x.shape)
    assert (expected in saved) == (kind == "columns")


@pytest.mark.parametrize("name", NONE)
def test_no_source(name):
    assert source_of(NONE[name](hidden() * 1.0)) is None


def test_no_source_where_hooks_have_packed_the_operands():
    """To read what gradient checkpointing has packed would run the checkpointed block again."""

    def unpack(tensor):
        raise AssertionError("unpacked")

    z = hidden() * 1.0
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        x = F.gelu(z)
    assert source_of(x) is None  # also after the block


@pytest.mark.parametrize("name", PRODUCERS | PRODUCTS)
def test_no_source_of_a_tensor_that_was_changed_in_place(name):
    """A hook may edit activations under `no_grad`. The gradients are those of the edited activations."""
    x = (PRODUCERS | PRODUCTS)[name](hidden() * 1.0)
    assert source_of(x) is not None
    with torch.no_grad():
        x.mul_(0.5)
    weight, bias, parts = parts_of("rows")
    parts.tuned_weight.requires_grad_()
    grad = torch.ones(*x.shape[:-1], len(weight), dtype=x.dtype)
    fast(x, weight, bias, parts).backward(grad)
    torch.testing.assert_close(parts.tuned_weight.grad, x.detach().flatten(0, -2).sum(0).expand_as(parts.tuned_weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layer_norm_with_coarse_statistics_has_no_source(dtype):
    weight = torch.ones(IN, dtype=dtype)
    x = F.layer_norm(hidden(dtype) * 1.0, (IN,), weight, weight)
    assert (source_of(x) is None) == (x.grad_fn._saved_result1.dtype == dtype)
    mixed = F.layer_norm(hidden(dtype) * 1.0, (IN,), weight.float(), weight.float())
    source = source_of(mixed)
    assert source is not None  # its statistics are float32
    torch.testing.assert_close(source.compute(*source.operands).to(dtype), mixed.detach())


def parts_of(kind: str) -> tuple[torch.Tensor, torch.Tensor, Parts]:
    generator = torch.Generator().manual_seed(1)

    def rand(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    options = {
        "rows": {"tuned_weight": rand(2, IN), "tuned_bias": rand(2), "tuned": 2},
        "columns": {"tuned_weight": rand(OUT, 3), "tuned_bias": rand(OUT), "tuned": 3, "dim": 1},
        "some columns": {"tuned_weight": rand(OUT, 2), "tuned": torch.tensor([1, 4]), "dim": 1},
        "low rank": {"down": rand(2, IN), "up": rand(OUT, 2)},
        "values": {"values": rand(3), "places": torch.tensor([0, 7, 29])},
        "all": {"tuned_weight": rand(OUT, 3), "tuned": 3, "dim": 1, "down": rand(2, IN), "up": rand(OUT, 2)},
    }[kind]
    return rand(OUT, IN), rand(OUT), Parts(**options)


def trained_parts(parts: Parts) -> dict[str, torch.Tensor]:
    return {n: t for n, t in parts._asdict().items() if torch.is_tensor(t) and t.is_floating_point()}


def fast(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, parts: Parts) -> torch.Tensor:
    """`fused_linear` with nothing kept: the weight is made for the call and again for its backward pass."""
    operands = weight, None, parts.tuned_weight, parts.values, parts.places

    def compute(*tensors):
        return fuse(*tensors, dim=parts.dim, tuned=parts.tuned, dtype=weight.dtype)

    bias = compose(weight, bias, parts)[1].detach()
    return fused_linear(x, compute(*operands), bias, parts, Source(compute, operands))


@pytest.mark.parametrize("kind", ["rows", "columns", "some columns", "low rank", "values", "all"])
@pytest.mark.parametrize("name", ["gelu", "gated", "scaled", "layer norm", "a sum", "eager attention"])
def test_the_same_gradients_as_the_reference(name, kind):
    producer = (PRODUCERS | PRODUCTS | NONE)[name]
    found, expected = {}, {}
    for function, gradients in ((fast, found), (lambda x, *a: F.linear(x, *compose(*a)), expected)):
        z, (weight, bias, parts) = hidden(), parts_of(kind)
        leaves = {"z": z, **{n: t.requires_grad_() for n, t in trained_parts(parts).items()}}
        y = function(producer(z * 1.0), weight, bias, parts)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        gradients |= {"y": y.detach(), **{n: t.grad for n, t in leaves.items()}}
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("kind", ["rows", "columns", "low rank", "all"])
@pytest.mark.parametrize("name", ["gelu", "gated", "layer norm", "eager attention"])
def test_gradients_are_right(name, kind):
    weight, bias, parts = parts_of(kind)
    names = list(trained_parts(parts))

    def function(z, *values):
        return fast(
            (PRODUCERS | PRODUCTS)[name](z * 1.0),
            weight,
            bias,
            parts._replace(**dict(zip(names, values, strict=True))),
        )

    leaves = [hidden()[:, :2].detach(), *(t.clone() for t in trained_parts(parts).values())]
    assert torch.autograd.gradcheck(function, [leaf.requires_grad_() for leaf in leaves])


def test_what_was_saved_may_not_change_before_the_backward_pass():
    weight, bias, parts = parts_of("rows")
    parts.tuned_weight.requires_grad_()
    for changed in ("input", "base"):
        z = hidden() * 1.0
        y = fast(F.gelu(z), weight, bias, parts)
        (z.detach() if changed == "input" else weight).add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_nothing_is_saved_that_is_not_there_already():
    z = hidden() * 1.0
    x = F.gelu(z)
    weight, bias, parts = parts_of("all")
    for tensor in trained_parts(parts).values():
        tensor.requires_grad_()
    there = {t.untyped_storage().data_ptr() for t in (z, weight, *trained_parts(parts).values())}
    y = fast(x, weight, bias, parts)
    saved = [t for t in y.grad_fn.saved_tensors if t is not None]
    assert saved and {t.untyped_storage().data_ptr() for t in saved} <= there


# -- in a model -------------------------------------------------------------------------------------------------------


def gradients(model, batch, autocast=False):
    model.zero_grad()
    model.train()
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("setting", ["plain", "autocast", "checkpointing", "bfloat16 base"])
@pytest.mark.parametrize("family", ["bert", "distilbert"])
@pytest.mark.parametrize("kind", KINDS)
def test_with_many_tokens_a_step_is_the_same(kind, family, setting, monkeypatch):
    dtype = torch.bfloat16 if setting == "bfloat16 base" else None
    few = wrap(tiny_model(family, dtype=dtype), **KINDS[kind])
    train(few)
    many, plain = copy.deepcopy(few), copy.deepcopy(few)
    if setting == "checkpointing":
        many.gradient_checkpointing_enable({"use_reentrant": False})
    batch, autocast = tiny_batches(1, seed=4)[0], setting == "autocast"
    expected = gradients(few, batch, autocast)
    monkeypatch.setattr(functional, "source_of", lambda x: None)
    reference = gradients(plain, batch, autocast)  # inputs are saved, weights are cached
    monkeypatch.setattr(functional, "source_of", source_of)
    monkeypatch.setattr(linear, "_MANY_TOKENS", {"cpu": 1})
    found = gradients(many, batch, autocast)
    tolerance = 1e-4 if setting in ("plain", "checkpointing") else 2e-2
    for loss, grads in (expected, found):
        torch.testing.assert_close(loss, reference[0], atol=tolerance, rtol=tolerance)
        assert grads.keys() == reference[1].keys()
        for name, value in reference[1].items():
            scale = float(value.abs().max()) or 1.0
            torch.testing.assert_close(
                grads[name] / scale, value / scale, atol=tolerance, rtol=0, msg=lambda m, name=name: f"{name}: {m}"
            )


def nodes_of(loss):
    nodes, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            waiting += [following for following, _ in node.next_functions]
    return nodes


@pytest.mark.parametrize("kind", KINDS)
def test_with_many_tokens_no_second_copy_of_the_weights_is_held_or_saved(kind, monkeypatch):
    monkeypatch.setattr(linear, "_MANY_TOKENS", {"cpu": 1})
    model = trained(**KINDS[kind])
    layers = [m for m in model.modules() if isinstance(m, linear.SensiLinear)]
    logits(model)  # caches for a few tokens without gradients are dropped in the next step
    model.train()
    output = model(**tiny_batches(1)[0])
    held = [t for layer in layers for entry in layer._sensi_fused.values() for t in entry if torch.is_tensor(t)]
    assert not any(t.is_floating_point() for t in held)
    there = {p.untyped_storage().data_ptr() for p in model.parameters()}
    weights = {tuple(layer.base_layer.weight.shape) for layer in layers}
    nodes = nodes_of(output.loss)
    saved = [t for n in nodes if "FusedLinear" in n.name() for t in n.saved_tensors if t is not None]
    new = [t for t in saved if t.untyped_storage().data_ptr() not in there and t.is_floating_point()]
    assert saved and not any(tuple(t.shape) in weights for t in new)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_far_holds_no_copy_of_frozen_weights_and_saves_one_activation(attention, monkeypatch):
    """Only the input of the first layer, which comes from dropout, is saved for the gradients of weights alone."""
    monkeypatch.setattr(linear, "_MANY_TOKENS", {"cpu": 1})
    model = get_peft_model(tiny_model("distilbert"), recipes.far(score="random", task_type="SEQ_CLS"))
    model.get_base_model().set_attn_implementation(attention)
    batch = tiny_batches(1)[0]
    loss = model.train()(**batch).loss
    layers = [m for m in model.modules() if isinstance(m, linear.SensiLinear)]
    held = [t for layer in layers for entry in layer._sensi_fused.values() for t in entry if torch.is_tensor(t)]
    assert not any(t.is_floating_point() for t in held)
    saved, there = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}
    for node in nodes_of(loss):
        if "FusedLinear" in node.name():
            tensors = [t for t in node.saved_tensors if t is not None and t.is_floating_point()]
            saved |= {t.untyped_storage().data_ptr(): t.shape for t in tensors}
        else:
            names = [name for name in dir(node) if name.startswith("_saved_")]
            values = [getattr(node, name) for name in names]
            there |= {v.untyped_storage().data_ptr() for v in values if isinstance(v, torch.Tensor)}
    hidden_states = (*batch["input_ids"].shape, model.config.hidden_size)
    assert [tuple(shape) for at, shape in saved.items() if at not in there] == [hidden_states]
