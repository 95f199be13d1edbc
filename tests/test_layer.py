"""The adapter on one Linear: what it trains, what it computes, and what it keeps of the base."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import BOTH, assert_same_tensors, logits, snapshot, tiny_batches, tiny_model, train, trained, wrap
from torch import nn
from torch.nn import functional as F

from peft_sensi import Plan, SensiConfig, SensiError
from peft_sensi.layers.layer import SensiLayer
from peft_sensi.layers.linear import SensiLinear


def layers(model) -> dict[str, SensiLinear]:
    return {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, SensiLayer)}


def plain(layer: SensiLinear, x: torch.Tensor, name: str = "default") -> torch.Tensor:
    """What the layer must compute: a plain Linear on the kept units, in the order of the layer's inputs."""
    slice_, base = layer.sensi_slices[name], layer.get_base_layer()
    weight = base.weight.index_select(slice_.dim, slice_.kept).clone()
    bias = None if base.bias is None else base.bias.clone()
    if bias is not None and slice_.dim == 0:
        bias = bias.index_select(0, slice_.kept)
    index = torch.arange(slice_.tuned) if isinstance(slice_.tuned, int) else slice_.tuned
    if name in layer.sensi_weight:
        weight = weight.index_copy(slice_.dim, index, layer.sensi_weight[name])
    if name in layer.sensi_bias:
        trained_bias = layer.sensi_bias[name]
        bias = trained_bias if slice_.dim == 1 else bias.index_copy(0, index, trained_bias)
    return F.linear(x, weight, bias)


def test_only_trained_values_are_trainable(budget):
    model = wrap(tiny_model(), **budget)
    plan = model.base_model.plan()
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    head = sum(p.numel() for n, p in trainable.items() if "classifier" in n)
    assert all(".sensi_" in n or ".modules_to_save." in n for n in trainable)
    assert head == 32 * 3 + 3
    assert sum(p.numel() for p in trainable.values()) - head == plan.trainable_params
    assert all(p.dtype == torch.float32 for p in trainable.values())


def test_trimmed_units_are_absent_from_forward():
    model = wrap(tiny_model(), budget=0.5)
    plan = model.base_model.plan()
    seen = {}
    for name, layer in layers(model).items():
        layer.register_forward_hook(lambda m, a, y, name=name: seen.update({name: (a[0].shape[-1], y.shape[-1])}))
    logits(model)
    for group in plan.anatomy.groups:
        kept = int((plan.of(group) > 0).sum())
        assert kept < group.size or plan.of(group).all()
        for side in group.sides:
            if side.module in seen:
                assert seen[side.module][1 - side.dim] == kept * side.width


def test_every_layer_computes_the_plain_linear_map(budget):
    model = trained(**budget)
    pairs = []
    for layer in layers(model).values():
        layer.register_forward_hook(lambda m, a, y: pairs.append((y, plain(m, a[0]))))
    logits(model)
    assert len(pairs) == len(layers(model)) > 0
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_gradients_are_those_of_the_plain_linear_map(budget):
    """Backward through the whole model, once as it is and once with each layer replaced by its plain form."""
    model = trained(**budget)
    batch = tiny_batches(1, seed=3)[0]
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    model(**batch).loss.backward()
    found = {n: p.grad.clone() for n, p in parameters.items()}
    model.zero_grad()
    for layer in layers(model).values():
        layer.forward = lambda x, layer=layer: plain(layer, x)
    model(**batch).loss.backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_everything_that_is_trained_gets_a_gradient(budget):
    model = wrap(tiny_model(), **budget)
    model.train()
    model(**tiny_batches(1)[0]).loss.backward()
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    # A key's bias moves all attention scores of a row alike, so the softmax does not see it.
    silent = [n for n, p in trainable if p.grad is None or not p.grad.any()]
    assert all(".key.sensi_bias" in n for n in silent)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_training_learns(budget):
    model = wrap(tiny_model(), **budget)
    batches = tiny_batches(2)
    first = sum(model.eval()(**b).loss.item() for b in batches)
    train(model, batches * 10, steps=20)
    assert sum(model(**b).loss.item() for b in batches) < 0.7 * first


def test_a_change_of_a_trained_value_shows_at_once():
    model = trained(budget=0.5)
    before = logits(model)
    with torch.no_grad():
        for layer in layers(model).values():
            layer.sensi_weight["default"].mul_(1.5)
    assert (logits(model) - before).abs().max() > 1e-2
    with torch.no_grad():
        for layer in layers(model).values():
            layer.sensi_weight["default"].data = layer.sensi_weight["default"].data / 1.5
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)


def test_the_cache_is_no_part_of_the_state():
    model = trained(budget={"trainable": 0.1}, update="dense")
    names = set(model.state_dict())
    logits(model)
    assert set(model.state_dict()) == names
    assert all("fused" not in n for n in names)
    assert not dict(model.named_buffers()).keys() - dict(tiny_model().named_buffers(prefix="base_model.model")).keys()


@pytest.mark.parametrize("move", ["double", "to", "load", "deepcopy"])
def test_the_cache_follows_the_model(move):
    model = trained(budget={"trainable": 0.1}, update="dense")
    other = trained(budget={"trainable": 0.1}, update="dense")
    before = logits(model)
    if move == "double":
        found = logits(model.double()).float()
    elif move == "to":
        found = logits(model.to(torch.float64).to(torch.float32))
    elif move == "load":
        with torch.no_grad():
            for p in other.parameters():
                p.add_(0.01)
        logits(other)
        other.load_state_dict(model.state_dict())
        found = logits(other)
    else:
        found = logits(copy.deepcopy(model))
    torch.testing.assert_close(found, before, atol=1e-5, rtol=1e-5)


def test_a_change_of_the_base_shows_too():
    model = trained(budget={"trainable": 0.1}, update="dense")
    before = logits(model)
    layer = next(iter(layers(model).values()))
    with torch.no_grad():
        layer.get_base_layer().weight.mul_(2.0)
    changed = logits(model)
    assert not torch.equal(changed, before)
    layer.get_base_layer().weight.data = layer.get_base_layer().weight.data / 2
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_base_whose_storage_was_replaced_twice_shows_too(compressed):
    """The second storage may be at the address of the first one, which was freed."""
    model = trained(budget={"trainable": 0.1}, update="dense")
    if compressed:
        model.base_model.compress("int8")
    layer = next(iter(layers(model).values()))
    weight = layer.get_base_layer().weight
    weight.data = weight.data.clone()  # now no other tensor shares the storage
    before = logits(model)
    for _ in range(2):
        weight.data = weight.data * 2
    changed = logits(model)
    layer._sensi_fused.clear()
    assert torch.equal(changed, logits(model))
    assert not torch.equal(changed, before)


def test_a_base_that_was_written_through_data_shows_after_a_change_of_mode():
    model = trained(budget={"trainable": 0.1}, update="dense").eval()
    before = logits(model)
    for layer in layers(model).values():
        layer.get_base_layer().weight.data.mul_(2.0)
    model.train().eval()
    assert not torch.allclose(logits(model), before)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_change_of_the_bases_bias_shows_too(compressed):
    """In a state dict that is filled in place (DCP), nothing else of a Linear may have changed."""
    model = trained(budget={"trainable": 0.1}, update="dense", also_train=())
    if compressed:
        model.base_model.compress("int8")
    before = logits(model)
    with torch.no_grad():
        for layer in layers(model).values():
            layer.get_base_layer().bias.add_(1.0)
    changed = logits(model)
    for layer in layers(model).values():
        layer._sensi_fused.clear()
    assert torch.equal(changed, logits(model))
    assert not torch.equal(changed, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_base_of_half_precision(budget, dtype):
    model = wrap(tiny_model(dtype=dtype), **budget)
    masters = [p for p in model.parameters() if p.requires_grad]
    sensi = [p for n, p in model.named_parameters() if ".sensi_" in n]
    assert sensi and all(p.dtype == torch.float32 for p in sensi)
    output = model(**tiny_batches(1)[0])
    output.loss.backward()
    assert output.logits.dtype == dtype
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in masters)
    exact = wrap(tiny_model(), plan=model.base_model.plan())
    torch.testing.assert_close(logits(model).float(), logits(exact), atol=0.1, rtol=0.1)


def test_small_steps_are_not_lost_on_a_base_of_half_precision():
    model = wrap(tiny_model(dtype=torch.bfloat16), budget=0.5)
    layer = next(iter(layers(model).values()))
    value = layer.sensi_weight["default"]
    before = value.detach().clone()
    with torch.no_grad():
        value.add_(1e-6)
    assert not torch.equal(value, before)


@pytest.mark.parametrize("inner", [torch.bfloat16, torch.float16])
def test_autocast(budget, inner):
    model = trained(**budget)
    batch = tiny_batches(1)[0]
    exact = logits(model, batch)
    with torch.autocast("cpu", dtype=inner):
        output = model(**batch)
        output.loss.backward()
    assert output.logits.dtype == inner
    torch.testing.assert_close(output.logits.float(), exact, atol=0.15, rtol=0.15)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad and p.grad is not None)
    torch.testing.assert_close(logits(model, batch), exact, atol=0, rtol=0)


def test_inference_mode(budget):
    model = trained(**budget)
    expected = logits(model)
    with torch.inference_mode():
        assert torch.equal(model(**tiny_batches(1, seed=99, labels=False)[0]).logits, expected)
    train(model)  # a cache made under inference mode must not poison training
    assert not torch.equal(logits(model), expected)


def test_loading_under_inference_mode(budget, tmp_path):
    model = trained(**budget)
    model.save_pretrained(tmp_path)
    with torch.inference_mode():  # as servers do
        again = PeftModel.from_pretrained(tiny_model(), tmp_path)
        assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(again), logits(model))


def test_no_units_are_chosen_where_there_are_no_gradients(budget):
    model = trained(budget=1.0)
    with torch.inference_mode():
        inside = tiny_model()
        with pytest.raises(SensiError, match="inference_mode"):
            wrap(tiny_model(), **budget)
        with pytest.raises(SensiError, match="inference_mode"):
            model.trim(0.5)
    with pytest.raises(SensiError, match="inference_mode"):
        wrap(inside, **budget)
    train(model)


def test_a_trained_value_changed_between_forward_and_backward_is_an_error():
    model = wrap(tiny_model(), budget={"trainable": 0.2}, update="dense")
    loss = model(**tiny_batches(1)[0]).loss
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if ".sensi_weight" in n).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_accumulate_over_several_forward_passes():
    model = wrap(tiny_model(), budget={"params": 0.6, "trainable": 0.1})
    first, second = tiny_batches(2)
    (model(**first).loss + model(**second).loss).backward()
    together = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model(**first).loss.backward()
    model(**second).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, together[name], atol=1e-6, rtol=1e-4)


def test_tuned_units_come_first_on_both_sides_of_a_block():
    """So the trained slice is contiguous, and the outputs of one layer need no permutation before the next."""
    model = wrap(tiny_model(), **BOTH)
    plan = model.base_model.plan()
    for group in plan.anatomy.groups:
        states = plan.of(group)
        order = [*(states == 2).nonzero()[0], *(states == 1).nonzero()[0]]
        for side in group.sides:
            slice_ = layers(model)[side.module].sensi_slices["default"]
            assert slice_.kept.tolist() == side.positions(np.array(order)).tolist()
            assert slice_.tuned == int((states == 2).sum()) * side.width


def test_frozen_slices_are_not_copied_into_parameters():
    model = wrap(tiny_model(), budget={"trainable": 0.05}, update="dense")
    base = sum(p.numel() for p in tiny_model().parameters())
    head = 32 * 3 + 3
    assert sum(p.numel() for p in model.parameters()) == base + head + model.base_model.plan().trainable_params


def test_a_lone_linear_keeps_the_order_of_its_outputs():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4))
    model = get_peft_model(
        copy.deepcopy(base), SensiConfig(budget={"trainable": 0.4}, score="random", target_modules=["0"])
    )
    x = torch.randn(5, 6)
    assert torch.equal(model(x), base(x))
    layer = model.base_model.model[0]
    assert 0 < len(layer.sensi_weight["default"]) < 10
    with torch.no_grad():
        layer.sensi_weight["default"].add_(1.0)
    rows = layer.sensi_slices["default"].tuned_positions
    changed = (layer(x) - base[0](x)).abs().amax(0) > 1e-6
    assert torch.equal(changed.nonzero().flatten(), rows.sort().values)
    torch.testing.assert_close(model.merge_and_unload()(x), model(x), atol=1e-6, rtol=0)


def test_targets_say_what_is_tuned_and_trimming_goes_further():
    """A trimmed unit's other Linears are wrapped regardless of the targets."""
    targets = ["query", "value"]
    model = wrap(tiny_model(), budget=0.5, target_modules=targets, also_train=[])
    trained_in = {n.split(".sensi_")[0].rsplit(".", 1)[1] for n, _ in model.named_parameters() if ".sensi_" in n}
    assert trained_in == set(targets)
    assert {n.rsplit(".", 1)[1] for n in layers(model)} == {"query", "key", "value", "dense"}
    plan = model.base_model.plan()
    assert plan.params_share <= 0.5 and plan.trainable_params == sum(
        p.numel() for n, p in model.named_parameters() if ".sensi_" in n
    )
    train(model)
    before = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), before, atol=1e-5, rtol=1e-5)


def test_a_unit_no_target_of_which_is_tuned_is_frozen_not_trimmed():
    model = wrap(tiny_model(), budget={"trainable": 0.5}, target_modules=["intermediate.dense"])
    plan: Plan = model.base_model.plan()
    assert not plan.trims
    assert {n.rsplit(".", 2)[-2] for n in layers(model)} == {"intermediate"}


def test_a_fresh_adapter_that_trims_nothing_changes_nothing():
    base = tiny_model()
    fresh = wrap(tiny_model(), budget={"trainable": 0.2}, update="dense")
    torch.testing.assert_close(logits(fresh), logits(base), atol=1e-6, rtol=1e-5)
    perturbed = wrap(tiny_model(), budget={"trainable": 0.2}, update="dense", init_weights=False)
    assert (logits(perturbed) - logits(base)).abs().max() > 1e-2


class TestWithoutTheBase:
    """`keep_base=False` keeps only what the adapter needs."""

    def test_it_computes_the_same_with_less(self, budget):
        whole = wrap(tiny_model(), **budget)
        less = wrap(tiny_model(), keep_base=False, **budget)
        for model in (whole, less):
            train(model)
        torch.testing.assert_close(logits(less), logits(whole), atol=1e-6, rtol=1e-5)
        sizes = [sum(p.numel() for p in m.parameters()) for m in (less, whole)]
        plan = whole.base_model.plan()
        dropped = plan.anatomy.prunable_params - plan.kept_params
        if plan.trims:
            assert sizes[0] <= sizes[1] - dropped
        assert sizes[0] <= sizes[1]

    def test_where_everything_kept_is_tuned_nothing_of_the_base_stays(self):
        model = wrap(tiny_model(), keep_base=False, budget=0.5)
        assert all(layer.get_base_layer().weight.numel() == 0 for layer in layers(model).values())

    def test_save_reload_and_merge(self, budget, tmp_path):
        from peft import PeftModel

        model = trained(keep_base=False, **budget)
        before = logits(model)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(tiny_model(), tmp_path)
        assert torch.equal(logits(again), before)
        for merged in (model.merge_and_unload(), again.merge_and_unload()):
            torch.testing.assert_close(logits(merged), before, atol=1e-5, rtol=1e-5)
            assert not any(isinstance(m, SensiLayer) for m in merged.modules())

    def test_merge_and_unmerge(self, budget):
        model = trained(keep_base=False, **budget)
        before = logits(model)
        model.merge_adapter()
        torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)
        model.unmerge_adapter()
        assert torch.equal(logits(model), before)

    @pytest.mark.parametrize("action", ["disable", "unload", "delete", "second"])
    def test_what_needs_the_base_is_a_clear_error(self, action, budget):
        model = trained(keep_base=False, **budget)
        before, tensors = logits(model), snapshot(model)
        with pytest.raises(SensiError, match="keep_base=False"):
            if action == "disable":
                with model.disable_adapter():
                    logits(model)
            elif action == "unload":
                model.unload()
            elif action == "delete":
                model.delete_adapter("default")
            else:
                model.add_adapter("second", SensiConfig(score="magnitude", budget=0.5, task_type="SEQ_CLS"))
        assert_same_tensors(snapshot(model), tensors)
        assert torch.equal(logits(model), before)
        assert list(model.peft_config) == ["default"]


def test_a_base_that_was_quantized_after_the_wrap_is_an_error_that_says_so():
    quantize = torch.ao.quantization.quantize_dynamic
    model = wrap(tiny_model("bert"), budget=0.5)
    quantized = quantize(model, {nn.Linear}, dtype=torch.qint8)
    for use in (lambda: logits(quantized), quantized.merge_adapter, quantized.merge_and_unload):
        with pytest.raises(SensiError, match=r"replaced by a torch\.ao.*`merge_and_unload\(\)`"):
            use()
    small = quantize(model.merge_and_unload(), {nn.Linear}, dtype=torch.qint8)
    assert torch.isfinite(logits(small)).all()


def test_second_derivatives_and_transforms_with_copies_of_the_parameters():
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attn_implementation": "eager"}
    model, batch = wrap(tiny_model(dtype=torch.float64, **still), **BOTH), tiny_batches(1)[0]
    copies = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in model.named_parameters()}
    at = {name: p for name, p in copies.items() if p.requires_grad}

    def loss(parameters):
        return torch.func.functional_call(model, {**copies, **parameters}, (), batch).loss

    def gradients(step):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(copies[name] + step * p.requires_grad)
        return torch.autograd.grad(model(**batch).loss, [p for p in model.parameters() if p.requires_grad])

    for one, other in zip(torch.func.grad(loss)(at).values(), gradients(0.0), strict=True):
        assert torch.allclose(one, other)
    first = torch.autograd.grad(loss(at), list(at.values()), create_graph=True)
    second = torch.autograd.grad(sum(g.sum() for g in first), list(at.values()))
    for product, up, down in zip(second, gradients(1e-5), gradients(-1e-5), strict=True):
        assert torch.allclose(product, (up - down) / 2e-5, rtol=1e-3, atol=1e-5)
    with pytest.raises(SensiError, match="Second derivatives"):
        model(**batch).loss.backward(create_graph=True)
