"""The refit of the survivors: it is the least-squares solution, it helps on unseen data, and it does no harm."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import tiny
import torch
from family_checks import Case, check_sums, run, token_batch
from peft import get_peft_model
from test_families import CASES, RELATIVES
from test_families_decoders import BY_NAME
from test_families_decoders import CASES as DECODERS
from tiny import assert_same_tensors, logits, snapshot, tiny_batches, wrap
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GraniteConfig, GraniteForCausalLM

import peft_sensi.planning.layerwise as layerwise
import peft_sensi.planning.refit as refit_module
from peft_sensi import BlockLayout, CalibrationError, Plan, SensiConfig, SensiError, build_anatomy, make_plan
from peft_sensi.planning.least_squares import RIDGE
from peft_sensi.planning.refit import refit
from peft_sensi.planning.trimmed import trimmed
from peft_sensi.scoring.outliers import find_outliers
from peft_sensi.utils.states import TRIMMED


def tiny_model(family="bert", **changes):
    return tiny.tiny_model(family, problem_type="regression", **changes)


def half_plan(model, share=0.5, seed=0, **options) -> Plan:
    anatomy = build_anatomy(model)
    rng = np.random.default_rng(seed)
    return make_plan(anatomy, {g.name: rng.random(g.size) for g in anatomy.groups}, share, **options)


def only_neurons(model, layers=(0,)) -> Plan:
    """Trims half the neurons of some layers, and no head."""
    anatomy = build_anatomy(model)
    states = []
    for group in anatomy.groups:
        state = np.full(group.size, 2, dtype=np.uint8)
        if group.kind == "neuron" and any(f".{i}." in group.name for i in layers):
            state[1::2] = TRIMMED
        states.append(state.tobytes())
    return Plan(anatomy, tuple(states), frozenset(m for g in anatomy.groups for m in g.modules), 12)


@torch.no_grad()
def data(model, count=12, *, size=8, seed=0):
    """Batches labeled by the model itself: the loss is the distance from it, and zero before the trim."""
    batches = tiny_batches(count, size=size, seed=seed)
    for batch in batches:
        batch["labels"] = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return batches


UNSEEN = tiny_batches(6, size=8, seed=123, labels=False)


def fit(model, plan, batches, **options):
    with torch.no_grad():
        return refit(model.eval(), plan, batches, progress=False, **options)


def merged_model(model, plan, fitted=None):
    """The trimmed model, with the refitted values if there are any, as a plain one."""
    small = wrap(model, plan=plan).merge_and_unload()
    for name, (weight, bias) in (fitted or {}).items():
        linear = small.get_submodule(name)
        linear.weight.data.copy_(weight)
        linear.bias.data.copy_(bias)
    return small


@torch.no_grad()
def hidden_error(model, small, batches) -> float:
    """Mean square of the difference of the last hidden states, padding left out."""
    total = 0.0
    for batch in batches:
        keep = batch["attention_mask"].bool()
        states = [m(**batch, output_hidden_states=True).hidden_states[-1][keep] for m in (model, small)]
        total += (states[0] - states[1]).square().mean().item()
    return total / len(batches)


def test_it_helps_on_data_it_has_not_seen(family):
    model = tiny_model(family)
    plan = half_plan(model)
    fitted = fit(model, plan, data(model))
    assert set(fitted) <= {g.output for g in plan.anatomy.groups} and len(fitted) >= 2
    without = hidden_error(model, merged_model(tiny_model(family), plan), UNSEEN)
    with_ = hidden_error(model, merged_model(tiny_model(family), plan, fitted), UNSEEN)
    assert with_ < 0.8 * without


def test_the_wrapped_model_starts_from_the_refitted_values():
    batches = data(tiny_model())
    errors = {}
    for refitted in (False, True):
        model = wrap(tiny_model(), budget=0.5, calibration=batches, calibration_steps=12, refit=refitted)
        errors[refitted] = hidden_error(tiny_model(), model.base_model.model.eval(), UNSEEN)
    assert errors[True] < 0.8 * errors[False]


@pytest.mark.parametrize("also_train", [[], ["norms"], ["biases"], ["output_biases"]])
def test_a_refit_needs_the_output_biases(also_train):
    """The fit is centered: its weights without its biases would be worse than no fit at all."""
    options = {"budget": 0.5, "calibration": data(tiny_model()), "calibration_steps": 12, "also_train": also_train}
    without = logits(wrap(tiny_model(), refit=False, **options))
    default = logits(wrap(tiny_model(), **options))
    if {"biases", "output_biases"} & set(also_train):
        assert not torch.equal(default, without)
        assert torch.equal(default, logits(wrap(tiny_model(), refit=True, **options)))
        assert torch.equal(default, logits(wrap(tiny_model(), **{**options, "also_train": None})))
    else:
        assert torch.equal(default, without)
        with pytest.raises(SensiError, match="output_biases"):
            wrap(tiny_model(), refit=True, **options)


def test_the_refit_survives_saving(tmp_path):
    from peft import PeftModel

    model = wrap(tiny_model(), budget=0.5, calibration=data(tiny_model()))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), logits(model))


@torch.no_grad()
def test_the_closed_form_is_the_weighted_least_squares_solution():
    """Against `torch.linalg.lstsq` on all tokens at once: one FFN of one layer, everything in float64."""
    model = tiny_model(num_hidden_layers=1)
    plan = only_neurons(model)
    (batch,) = data(model, 1, size=24)
    fitted = fit(model, plan, [batch])["bert.encoder.layer.0.output.dense"]

    layer = model.bert.encoder.layer[0]
    seen = {}
    hooks = [
        layer.output.dense.register_forward_hook(lambda m, a, y: seen.update(z=a[0], y=y)),
        layer.output.LayerNorm.register_forward_pre_hook(lambda m, a: seen.update(total=a[0])),
    ]
    model(**batch)
    for hook in hooks:
        hook.remove()
    real = batch["attention_mask"].bool()
    z, y, total = (seen[k][real].double() for k in ("z", "y", "total"))
    kept = np.flatnonzero(plan.of(plan.anatomy.groups[1]) != TRIMMED)
    z = z[:, kept]
    old_weight, old_bias = layer.output.dense.weight[:, kept].double(), layer.output.dense.bias.double()
    # The residual is the untrimmed model's own, because no head is missing: what the fit must give is `y`.
    error = y - (z @ old_weight.t() + old_bias)
    share = 1 / total.var(dim=-1, keepdim=True)
    share = share / share.sum()
    mean_z, mean_error = (z * share).sum(0), (error * share).sum(0)
    spread = ((z - mean_z).square() * share).sum() / len(kept)
    rows = torch.cat(
        [(z - mean_z) * share.sqrt(), (RIDGE * spread).sqrt() * torch.eye(len(kept), dtype=torch.float64)]
    )
    right = torch.cat(
        [(error - mean_error) * share.sqrt(), torch.zeros(len(kept), error.shape[1], dtype=torch.float64)]
    )
    change = torch.linalg.lstsq(rows, right).solution.t()
    torch.testing.assert_close(fitted[0].double(), old_weight + change, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(fitted[1].double(), old_bias + mean_error - change @ mean_z, atol=1e-4, rtol=1e-3)


def test_later_layers_mend_what_earlier_ones_lost():
    """Error feedback: the second layer's target is the untrimmed sum minus the trimmed model's residual."""
    model = tiny_model()
    batches = data(tiny_model())
    plan = only_neurons(model, layers=(0, 1))
    both = fit(model, plan, batches)
    alone = fit(model, only_neurons(model, layers=(1,)), batches)
    name = "bert.encoder.layer.1.output.dense"
    assert not torch.allclose(both[name][0], alone[name][0], atol=1e-3)
    mixed = {**both, name: alone[name]}
    with_feedback = hidden_error(model, merged_model(tiny_model(), plan, both), UNSEEN)
    assert with_feedback < hidden_error(model, merged_model(tiny_model(), plan, mixed), UNSEEN)


def test_nothing_changes_when_nothing_is_trimmed():
    model = tiny_model()
    assert fit(model, half_plan(model, 1.0), data(model)) == {}
    whole = wrap(tiny_model(), budget=1.0, calibration=data(model), priming_steps=0)
    torch.testing.assert_close(logits(whole, UNSEEN[0]), logits(model, UNSEEN[0]), atol=1e-6, rtol=0)


def test_groups_that_have_lost_nothing_are_refitted_only_against_earlier_losses():
    model = tiny_model()
    fitted = fit(model, only_neurons(model, layers=(1,)), data(model))
    assert "bert.encoder.layer.1.output.dense" in fitted
    for name, (weight, bias) in fitted.items():
        if name != "bert.encoder.layer.1.output.dense":
            linear = model.get_submodule(name)
            torch.testing.assert_close(weight, linear.weight.detach(), atol=1e-4, rtol=0)
            torch.testing.assert_close(bias, linear.bias.detach(), atol=1e-4, rtol=0)


def test_frozen_or_untargeted_projections_are_left_alone():
    model = tiny_model()
    plan = half_plan(model, {"params": 0.5, "trainable": 0.05})
    for name in fit(model, plan, data(model)):
        (group,) = [g for g in plan.anatomy.groups if g.output == name]
        assert not (plan.of(group) == 1).any()
    untargeted = half_plan(model, targets=frozenset({"bert.encoder.layer.0.intermediate.dense"}))
    assert fit(model, untargeted, data(model)) == {}


def test_a_refit_that_makes_the_loss_worse_is_put_back():
    model = tiny_model()
    plan, batches = half_plan(model), data(model)

    def perverse(model, batch):
        """Small where the model is far from the untrimmed one."""
        return 1 / model(**batch).loss

    assert fit(model, plan, batches)
    assert fit(model, plan, batches, loss_fn=perverse) == {}


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        (1.0, 0.9, True),
        (1.0, 1.005, True),
        (1.0, 1.03, False),
        (-10.0, -10.5, True),
        (-10.0, -9.95, True),
        (-10.0, -9.7, False),
        (-1.0, 1.0, False),
        (0.0, 0.0, True),
        (0.0, 0.001, False),
    ],
)
def test_the_guard_compares_losses_of_any_sign(before, after, kept, monkeypatch):
    losses = [after, before]
    monkeypatch.setattr(refit_module, "_trimmed_loss", lambda *args: losses.pop(0))
    model = tiny_model()
    assert bool(fit(model, half_plan(model), data(model, 4))) == kept and not losses


def less_ten(model, batch):
    return model(**batch).loss - 10


def negative_likeness(model, batch):
    return -torch.cosine_similarity(model(**batch).logits, batch["labels"], dim=0).mean()


@pytest.mark.parametrize("loss_fn", [less_ten, negative_likeness])
def test_a_negative_loss_that_gets_better_keeps_the_refit(loss_fn):
    model = tiny_model()
    plan, batches = half_plan(model), data(model)
    assert fit(model, plan, batches).keys() == fit(model, plan, batches, loss_fn=loss_fn).keys() != set()


def encoder_decoder(name):
    """A random model, a plan, batches that hold the model's own logits, and a loss that is the distance from these."""
    case = next(case for case in CASES if case.name == name)
    model = case.model()
    anatomy = case.anatomy(model)
    rng = np.random.default_rng(0)
    scores = {g.name: rng.random(g.size) for g in anatomy.groups}
    batches = [case.batch(8, seed=i) for i in range(8)]
    for batch in batches:
        with torch.no_grad():
            batch["wanted"] = model(**batch).logits
    return case, model, make_plan(anatomy, scores, 0.5, multiple_of=1), batches


def distance(model, batch):
    batch = dict(batch)
    wanted = batch.pop("wanted")
    return (model(**batch).logits - wanted).square().mean()


def merged_encoder_decoder(case, plan, fitted):
    merged = case.wrap(case.model(), plan=plan.to_dict()).merge_and_unload()
    for name, (weight, bias) in fitted.items():
        merged.get_submodule(name).weight.data.copy_(weight)
        if bias is not None:
            merged.get_submodule(name).bias.data.copy_(bias)
    return merged


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_decoder_is_refitted_with_the_states_of_the_trimmed_encoder(name, monkeypatch):
    case, model, plan, batches = encoder_decoder(name)
    batches = batches[:4]
    seen = []

    def spy(model, layer, arguments, *rest, **options):
        if "decoder" in layer:
            args, kwargs = arguments
            found = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.dim() == 3]
            seen.append((layer, *found))
        return layerwise.run_layer(model, layer, arguments, *rest, **options)

    monkeypatch.setattr(refit_module, "run_layer", spy)
    fitted = fit(model, plan, batches, loss_fn=distance)
    assert any("encoder" in module for module in fitted) and any("decoder" in module for module in fitted)
    merged = merged_encoder_decoder(case, plan, fitted)
    states = {}
    with torch.no_grad():
        for kind, encoder in (("whole", model.get_encoder()), ("trimmed", merged.get_encoder())):
            inputs = [{key: b[key] for key in ("input_ids", "attention_mask")} for b in batches]
            states[kind] = [encoder(**batch).last_hidden_state for batch in inputs]
    for layer in dict.fromkeys(entry[0] for entry in seen):
        runs = [found for name, *found in seen if name == layer]
        assert all(len(found) == 1 for found in runs)
        # First the untrimmed model runs on every batch, then the trimmed one: once for each sublayer, and the first
        # batch again with the fitted values.
        assert len(runs) >= 9 and len(runs) % 4 == 1
        for i, (found,) in enumerate(runs):
            expected = states["whole" if i < 4 else "trimmed"][i % 4]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_decoder_s_refit_gets_better_by_that(name, monkeypatch):
    case, model, plan, batches = encoder_decoder(name)
    errors = []
    for follows in (True, False):
        if not follows:
            monkeypatch.setattr(refit_module, "_follow_trimmed_model", lambda *args: None)
        fitted = fit(model, plan, batches, loss_fn=distance)
        assert any("decoder" in module for module in fitted)
        merged = merged_encoder_decoder(case, plan, fitted)
        with torch.no_grad():
            errors.append(sum(float(distance(merged, batch)) for batch in batches))
    assert errors[0] < errors[1]


def test_the_model_is_left_as_it_was():
    model = tiny_model()
    before = snapshot(model)
    fit(model, half_plan(model), data(model))
    assert_same_tensors(snapshot(model), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["hyperclovax", "gemma2", "clip", "wav2vec2", "whisper", "dinov2", "beit-relative"])
def test_outputs_of_other_families_get_closer(name, monkeypatch):
    monkeypatch.setattr(refit_module, "MARGIN", 1.0)  # the labels are random
    case = BY_NAME.get(name) or next(case for case in CASES if case.name == name)
    batches, unseen, errors = [case.batch(16, seed=seed) for seed in range(8)], case.batch(16, seed=50), []
    for refits in (False, True):
        model = case.wrap(case.model(), budget=0.5, calibration=batches, calibration_steps=8, refit=refits)
        errors.append(float((run(model, unseen) - run(case.model(), unseen)).square().mean()))
    assert errors[1] < 0.85 * errors[0]


def assert_cut_alike(bases, batches, task_type=None):
    """Models that compute the same have the same plan and outlier units, and compute the same after a trim."""
    outputs, plans = [], []
    for base in bases:
        whole = run(base, batches[0])
        config = SensiConfig(
            budget=0.4, calibration=batches, priming_steps=0, calibration_steps=8, multiple_of=1, task_type=task_type
        )
        model = get_peft_model(base, config)
        outputs.append((whole, run(model, batches[0])))
        protected = model.base_model.scores_of("default").protected
        plans.append((model.plan(), {name: found.tolist() for name, found in protected.items()}))
    assert plans[0] == plans[1]
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-4, rtol=1e-3)
    assert (outputs[0][0] - outputs[0][1]).abs().max() > 0.1


def scaled_granite(factor):
    """A Granite with this factor, and output projections that are divided by it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 60, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    base = GraniteForCausalLM(GraniteConfig(**sizes, **heads, residual_multiplier=factor)).eval()
    for name, parameter in base.named_parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(6)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data.div_(factor)
    return base


def test_a_factor_of_the_residual_sum_changes_nothing():
    batches = [{"input_ids": ids, "labels": ids} for ids in torch.randint(1, 60, (6, 4, 9))]
    assert_cut_alike([scaled_granite(1.0), scaled_granite(0.125)], batches, "CAUSAL_LM")


def scaled_dinov2(factors):
    """A DINOv2 with these LayerScale factors, and output projections that are divided by those which are not 0."""
    case = next(case for case in CASES if case.name == "dinov2")
    model, inverse = case.model(), torch.where(factors == 0, 1.0, 1 / factors)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lambda1"):
                parameter.copy_(factors)
            elif name.endswith(("o_proj.weight", "fc2.weight")):
                parameter.mul_(inverse[:, None])
            elif name.endswith(("o_proj.bias", "fc2.bias")):
                parameter.mul_(inverse)
    return case, model


def test_a_factor_of_each_feature_changes_nothing():
    (case, base), (_, scaled) = map(scaled_dinov2, (torch.ones(30), torch.linspace(0.01, 2.0, 30)))
    assert_cut_alike([base, scaled], [case.batch(seed=seed) for seed in range(8)])


def test_features_that_a_layer_leaves_out_keep_their_values(monkeypatch):
    monkeypatch.setattr(refit_module, "MARGIN", 1.0)  # the labels are random
    factors = torch.ones(30)
    factors[:2] = torch.tensor([0.0, 1e-6])
    case, model = scaled_dinov2(factors)
    plan = half_plan(model)
    refitted = refit(model, plan, [case.batch(8, seed=seed) for seed in range(8)], progress=False)
    assert refitted
    for name, (weight, bias) in refitted.items():
        linear = model.get_submodule(name)
        kept = torch.isin(linear.weight[0], weight[0])
        assert int(kept.sum()) == weight.shape[1]
        assert torch.equal(weight[:2], linear.weight[:2, kept]) and torch.equal(bias[:2], linear.bias[:2])
        assert not torch.isclose(weight[2:], linear.weight[2:, kept]).all()


def test_padding_is_left_out(family):
    model = tiny_model(family)
    plan = half_plan(model)
    batches = data(model)
    others = [{**b, "input_ids": torch.where(b["attention_mask"].bool(), b["input_ids"], 5)} for b in batches]
    if family == "roberta":  # its position ids depend on which tokens are padding tokens
        for batch in (*batches, *others):
            batch["position_ids"] = torch.arange(2, 14).expand(8, -1)
    first, second = fit(model, plan, batches), fit(model, plan, others)
    assert first.keys() == second.keys() and first
    for name in first:
        for one, other in zip(first[name], second[name], strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rounds", [0, 2])
@pytest.mark.parametrize("length", [9, 8])
def test_padding_is_left_out_if_tokens_come_first(length, rounds, monkeypatch):
    """Also with as many examples as tokens, where shapes do not tell them apart."""
    monkeypatch.setattr(refit_module, "MARGIN", 1.0)  # four batches are few
    (case,) = [case for case in RELATIVES if case.name == "xlnet"]
    model = case.model()
    plan = half_plan(model, multiple_of=1)
    batches = [case.batch(8, length, seed=seed) for seed in range(4)]
    for batch in batches:  # padding comes first, because the model's head reads the last token
        batch |= {name: batch[name].flip(1) for name in ("input_ids", "attention_mask")}
        batch["wanted"] = run(model, batch)
    others = [{**b, "input_ids": torch.where(b["attention_mask"].bool(), b["input_ids"], 5)} for b in batches]
    first, second = (fit(model, plan, b, loss_fn=distance, rounds=rounds, joint=b) for b in (batches, others))
    assert first.keys() == second.keys() and first
    for name in first:
        for one, other in zip(first[name], second[name], strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_base_of_half_precision_is_refitted_in_single():
    model = tiny_model(dtype=torch.bfloat16)
    plan = half_plan(model)
    for weight, bias in fit(model, plan, data(model)).values():
        assert weight.dtype == bias.dtype == torch.float32
        assert torch.isfinite(weight).all() and torch.isfinite(bias).all()


def test_one_batch_is_enough_to_run():
    model = tiny_model()
    assert fit(model, half_plan(model), data(model, 1, size=32))


def test_when_it_is_done():
    """By default: where calibration is given and everything that is kept is tuned."""
    batches = data(tiny_model(), 4)

    def changed(**options):
        model = wrap(tiny_model(), **options)
        layer = model.base_model.model.bert.encoder.layer[0].output.dense
        start = layer.get_base_layer().weight.index_select(1, layer.sensi_slices["default"].tuned_positions)
        return not torch.equal(start, layer.sensi_weight["default"])

    assert changed(budget=0.5, calibration=batches)
    assert not changed(budget=0.5, calibration=batches, refit=False)
    assert not changed(budget={"params": 0.5, "trainable": 0.2}, calibration=batches)
    with pytest.raises(ValueError, match="needs `calibration`"):
        SensiConfig(budget=0.5, refit=True)
    with pytest.raises(ValueError, match="trainable"):
        SensiConfig(budget={"trainable": 0.1}, refit=True, calibration=batches)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_a_cut_model_is_the_trimmed_one_and_then_whole_again(family):
    model, twin = tiny.tiny_model(family), tiny.tiny_model(family)
    adapter = wrap(twin, budget=0.5)
    plan, before = adapter.base_model.plan(), snapshot(model)
    heads = [getattr(m, "n_heads", getattr(m, "num_attention_heads", None)) for m in model.modules()]
    whole = logits(model)
    with torch.no_grad(), trimmed(model, plan, plan.anatomy.trimmable):
        torch.testing.assert_close(logits(model), logits(adapter), atol=1e-5, rtol=1e-5)
        kept = sum(p.numel() for p in model.parameters())
    assert kept < sum(value.numel() for value in before.values())
    assert_same_tensors(snapshot(model), before)
    assert torch.equal(logits(model), whole)
    assert heads == [getattr(m, "n_heads", getattr(m, "num_attention_heads", None)) for m in model.modules()]
    with pytest.raises(RuntimeError, match="boom"), trimmed(model, plan, plan.anatomy.trimmable):
        raise RuntimeError("boom")
    assert_same_tensors(snapshot(model), before)


@pytest.mark.parametrize("family", ["bert", "distilbert", "electra"])
def test_how_layers_are_called_does_not_need_what_they_compute(family, monkeypatch):
    """All batches but the first pass through the layers unchanged: same calls, same first input, same fit."""
    model = tiny_model(family)
    batches = data(model, 8, size=16)
    plan, passed = only_neurons(model, (0, 1)), []
    original = layerwise._returning_their_input

    def counting(model, layers):
        passed.append(len(layers))
        return original(model, layers)

    monkeypatch.setattr(layerwise, "_returning_their_input", counting)
    before = snapshot(model)
    fast = refit(model, plan, batches, progress=False)
    assert_same_tensors(snapshot(model), before)
    assert passed == [0, *[2] * 7]
    monkeypatch.setattr(layerwise, "_returning_their_input", lambda model, layers: original(model, []))
    slow = refit(model, plan, batches, progress=False)
    assert fast.keys() == slow.keys() and fast
    for name, values in slow.items():
        assert all(torch.equal(a, b) for a, b in zip(fast[name], values, strict=True))


@pytest.mark.parametrize(
    "name", ["bert", "distilbert", "deberta-v3", "t5", "bart", "vit", "llama", "gpt2", "opt", "gpt_neox"]
)
def test_the_end_of_a_layer_is_computed_without_the_layer(name, monkeypatch):
    """Only the last projection and its norm run again. The fit is that of a refit that runs the whole layer."""
    (case,) = [case for case in (*CASES, *DECODERS) if case.name == name]
    model = case.model()
    anatomy = case.anatomy(model)
    rng = np.random.default_rng(0)
    plan = make_plan(anatomy, {g.name: rng.random(g.size) for g in anatomy.groups}, 0.5, multiple_of=1)
    batches = [case.batch(8, seed=i) for i in range(4)]
    runs: list[str] = []

    def spy(model, layer, *rest, **options):
        runs.append(layer)
        return layerwise.run_layer(model, layer, *rest, **options)

    monkeypatch.setattr(refit_module, "run_layer", spy)
    monkeypatch.setattr(refit_module, "_trimmed_loss", lambda *args: 0.0)
    fast = fit(model, plan, batches)
    count = len(runs)
    monkeypatch.setattr(refit_module, "SAME", -1.0)
    slow = fit(model, plan, batches)
    assert fast.keys() == slow.keys() and fast
    assert count == len(runs) - count - 3 * len(set(runs))
    for module, values in slow.items():
        for one, other in zip(fast[module], values, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert (one - other).norm() <= 1e-3 * other.norm()  # a fit multiplies rounding errors


class Scaled(nn.Module):
    """A block that does something else with the sum than its norm says."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(16, 32), nn.Linear(32, 16), nn.LayerNorm(16)

    def forward(self, x):
        return 0.5 * x + self.norm(x + self.down(torch.relu(self.up(x))))


@torch.no_grad()
def test_a_layer_that_goes_on_after_its_norm_runs_again(monkeypatch):
    torch.manual_seed(0)
    model = Own(Scaled).eval()
    layout = BlockLayout(layer="layer.*", up="up", down="down", ffn_norm="norm")
    anatomy = build_anatomy(model, blocks=[layout])
    rng = np.random.default_rng(0)
    plan = make_plan(anatomy, {g.name: rng.random(g.size) for g in anatomy.groups}, 0.5, multiple_of=1)
    batches = [{"values": torch.randn(8, 16)} for _ in range(4)]
    monkeypatch.setattr(refit_module, "_trimmed_loss", lambda *args: 0.0)
    fits = [fit(model, plan, batches, loss_fn=lambda model, batch: model(batch["values"]).square().mean())]
    monkeypatch.setattr(refit_module, "SAME", -1.0)
    fits.append(fit(model, plan, batches, loss_fn=lambda model, batch: model(batch["values"]).square().mean()))
    assert fits[0].keys() == fits[1].keys() and fits[0]
    for module, values in fits[1].items():
        assert all(torch.equal(a, b) for a, b in zip(fits[0][module], values, strict=True))


class Named(nn.Module):
    """A block whose argument has a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(16, 32), nn.Linear(32, 16), nn.LayerNorm(16)

    def forward(self, x):
        return self.norm(x + self.down(torch.relu(self.up(x))))


class Own(nn.Module):
    def __init__(self, block=Named) -> None:
        super().__init__()
        self.layer = nn.ModuleList(block() for _ in range(2))
        self.out = nn.Linear(16, 1)

    def forward(self, values):
        for layer in self.layer:
            values = layer(x=values)
        return self.out(values)


def test_the_refit_runs_a_model_as_its_loss_does():
    torch.manual_seed(0)
    layout = BlockLayout(layer="layer.*", up="up", down="down", ffn_norm="norm")
    data = [{"values": torch.randn(8, 16), "wanted": torch.randn(8, 1)} for _ in range(4)]

    def loss_fn(model, batch):
        return (model(batch["values"]) - batch["wanted"]).square().mean()

    def wrapped(refit):
        torch.manual_seed(1)
        settings = {"budget": 0.5, "blocks": [layout], "multiple_of": 1, "priming_steps": 2, "seed": 0}
        return get_peft_model(Own(), SensiConfig(calibration=data, loss_fn=loss_fn, refit=refit, **settings))

    batch = torch.cat([part["values"] for part in data])
    torch.manual_seed(1)
    expected = Own()(batch)
    errors = [float((wrapped(refit)(batch) - expected).square().mean().detach()) for refit in (True, False)]
    assert errors[0] < errors[1]


def called_twice(model, batch):
    return model(**batch).loss + model(**batch).logits.square().mean()


@pytest.mark.parametrize("name", ["albert", "loss_fn"])
def test_layers_that_run_more_than_once_are_named(name):
    """They cannot be refitted, and the user would not see it."""
    if name == "albert":
        (case,) = [case for case in CASES if case.name == name]
        model, batches = case.model(), [case.batch(8, seed=seed) for seed in range(4)]
    else:
        model, batches = tiny_model(), data(tiny_model(), 4)
    with pytest.warns(UserWarning, match=r"more than once.*not fitted.*`refit=False`"):
        assert not fit(model, half_plan(model, multiple_of=1), batches, loss_fn=called_twice)


LONE_DECODERS = ["bart", "blenderbot", "mbart", "pegasus", "whisper"]


def lone_decoder(name):
    """The decoder of a model with encoder and decoder, without the encoder: its cross-attention does not run."""
    sizes = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "vocab_size": 50}
    config = partial(AutoConfig.for_model, name, **sizes, pad_token_id=1, is_decoder=True, is_encoder_decoder=False)
    return Case(name, config, AutoModelForCausalLM, partial(token_batch, task="CAUSAL_LM"), "CAUSAL_LM")


@pytest.mark.parametrize("name", LONE_DECODERS)
def test_heads_of_a_decoder_without_an_encoder_are_refitted(name, monkeypatch):
    monkeypatch.setattr(refit_module, "MARGIN", 1.0)
    case = lone_decoder(name)
    check_sums(case)
    model, batches = case.model(), [case.batch(8, seed=seed) for seed in range(4)]
    heads = [group for group in build_anatomy(model).trimmable if group.name.endswith(".heads")]
    fitted = fit(model, half_plan(model, multiple_of=1), batches)
    assert len(heads) == 2 and {group.output for group in heads} <= set(fitted)


@pytest.mark.parametrize("name", LONE_DECODERS)
def test_outlier_heads_of_a_decoder_without_an_encoder_are_found(name):
    case = lone_decoder(name)
    model, batches = case.model(), [case.batch(8)]
    group = next(group for group in build_anatomy(model).trimmable if group.name.endswith(".heads"))
    with torch.no_grad():
        model.get_submodule(group.output).weight[:, 8:16] *= 1000  # the second head
    protected = find_outliers(model, build_anatomy(model), batches)
    assert protected[group.name].tolist() == [False, True, False, False]


def test_a_sublayer_whose_sum_is_not_seen_is_named():
    """With a wrong norm in the layout, its kept units would stay as they are, and the user would not see it."""

    class Unused(Named):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.LayerNorm(16)

    layout = BlockLayout(layer="layer.*", up="up", down="down", ffn_norm="unused")
    model = Own(Unused)
    anatomy = build_anatomy(model, blocks=[layout])
    plan = make_plan(anatomy, {g.name: np.arange(g.size) for g in anatomy.groups}, 0.5, multiple_of=1)
    batches = [{"values": torch.randn(8, 16)} for _ in range(4)]
    with pytest.warns(UserWarning, match=r"sum after 'layer\.0\.neurons' was not observed.*`refit=False`"):
        assert not fit(model, plan, batches, loss_fn=lambda model, batch: model(batch["values"]).square().mean())


def test_batches_of_the_refit_only_are_checked_too():
    """A refit reads more batches than the scores."""
    model = tiny_model()
    batches = data(model)
    long = {**batches[4], "input_ids": batches[4]["input_ids"] + tiny.VOCABULARY}
    with pytest.raises(CalibrationError, match=r"calibration batch 4 \(refit\).*whose keys are.*give batches"):
        fit(model, half_plan(model), [*batches[:4], long])
    embeddings = model.get_input_embeddings()
    batches = [{"inputs_embeds": embeddings(b.pop("input_ids")).detach(), **b} for b in batches]
    batches[4]["inputs_embeds"][0, 0, 0] = float("nan")
    with pytest.raises(CalibrationError, match=r"layer\.0' is not finite .*\(refit\).*Look for NaN"):
        fit(model, half_plan(model), batches)
