"""Bases in 8 and 4 bits: tuned beside their own kernels, never trimmed."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from family_checks import make_lively, run, token_batch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig

from peft_sensi import AnatomyError, SensiConfig, SensiError, SensiLoadError, build_anatomy
from peft_sensi.anatomy.linears import dequantized, is_quantized, unpack
from peft_sensi.layers.linear import SensiLinear


class Coded(nn.Linear):
    """A Linear in 8-bit codes behind the interface of HQQ (`W_q`, `dequantize`), which PEFT's helpers read."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        weight = linear.weight.detach()
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        codes = (weight / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.bias = linear.bias
        self.W_q = self.weight

    def dequantize(self) -> torch.Tensor:
        return self.weight.float() * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.dequantize().to(x.dtype), self.bias)


def codes(linear: nn.Linear) -> nn.Module:
    return Coded(linear)


def eight_bits(linear: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    made = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False, threshold=6.0)
    made.weight = bnb.nn.Int8Params(linear.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    made.bias = linear.bias
    return made.to("cpu")


def torchao_eight_bits(linear: nn.Linear) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(box := nn.Sequential(linear), quantization.Int8WeightOnlyConfig())
    return box[0]


def plain_model() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64}
    model = AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=50, num_labels=3, **sizes))
    make_lively(model)
    return model.eval()


def quantized_model(kind) -> nn.Module:
    model = plain_model()
    for name, module in list(model.bert.encoder.named_modules()):
        if type(module) is nn.Linear:
            parent, _, child = name.rpartition(".")
            setattr(model.bert.encoder.get_submodule(parent), child, kind(module))
    return model


@pytest.fixture(params=[codes, eight_bits, torchao_eight_bits], ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


UPDATES = {
    "units": {"budget": {"trainable": 0.15}, "update": "dense"},
    "biases": {"budget": {"trainable": 0.15}, "update": "dense", "also_train": ["biases"]},
    "everything": {"budget": {"trainable": 1.0}, "update": "dense"},
    "low-rank": {"update": "low_rank", "rank": 3},
    "sparse": {"update": "sparse", "sparse": 20},
    "units and low-rank": {"update": "dense+low_rank", "rank": 2, "budget": {"trainable": 0.15}},
}


def wrap(model: nn.Module, **config) -> PeftModel:
    return get_peft_model(model, SensiConfig(**{"score": "magnitude", "task_type": "SEQ_CLS", **config}))


def train(model: nn.Module) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for seed in range(2):
        model(**token_batch(seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.filterwarnings("ignore:No budget was given")
def test_tuning_on_a_quantized_base(kind, update, tmp_path):
    base, batch = quantized_model(kind), token_batch(seed=9)
    before = run(base, batch)
    model = wrap(base, **UPDATES[update])
    assert not model.base_model.plan().trims
    scale = float(before.abs().max())
    torch.testing.assert_close(run(model, batch), before, atol=0.05 * scale, rtol=0)
    train(model)
    after = run(model, batch)
    assert (after - before).abs().max() > 0.05 * scale
    model.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(quantized_model(kind), tmp_path), batch), after)
    with model.disable_adapter():
        assert torch.equal(run(model, batch), before)
    with pytest.raises(SensiError, match="without quantization"):
        model.merge_and_unload()
    assert torch.equal(run(model.unload(), batch), before)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.filterwarnings("ignore:No budget was given")
def test_the_same_file_fits_the_base_without_quantization(update, tmp_path):
    """Its values are those that were trained; what differs is the rounding of the frozen rest."""
    base = quantized_model(codes)
    exact = plain_model()
    for name, module in base.named_modules():
        if is_quantized(module):
            exact.get_submodule(name).weight.data.copy_(dequantized(module))
    model = wrap(base, **UPDATES[update])
    train(model)
    model.save_pretrained(tmp_path)
    batch = token_batch(seed=9)
    other = PeftModel.from_pretrained(exact, tmp_path)
    torch.testing.assert_close(run(other, batch), run(model, batch), atol=1e-4, rtol=1e-4)
    small = other.merge_and_unload()
    torch.testing.assert_close(run(small, batch), run(model, batch), atol=1e-4, rtol=1e-4)


def test_gradients_are_those_of_the_dequantized_model():
    base = quantized_model(codes)
    exact = plain_model()
    for name, module in base.named_modules():
        if is_quantized(module):
            exact.get_submodule(name).weight.data.copy_(dequantized(module))
    models = [wrap(m, **UPDATES["units and low-rank"], also_train=["norms"], seed=3) for m in (base, exact)]
    with torch.no_grad():
        for a, b in zip(*(dict(m.named_parameters()).items() for m in models), strict=True):
            if a[1].requires_grad and b[1].shape == a[1].shape:
                a[1].copy_(b[1])
    for model in models:
        model(**token_batch()).loss.backward()
    first, second = (dict(m.named_parameters()) for m in models)
    compared = 0
    for name, parameter in first.items():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, second[name].grad, atol=1e-5, rtol=1e-3)
            compared += 1
    assert compared > 20


def test_calibration_on_a_quantized_base():
    batches = [token_batch(seed=seed) for seed in range(3)]
    model = wrap(
        quantized_model(codes), budget={"trainable": 0.1}, score="fisher", update="dense", calibration=batches
    )
    assert model.base_model.plan().trainable_share <= 0.1


@pytest.mark.parametrize("budget", [0.5, {"flops": 0.5}, {"params": 0.5, "trainable": 0.1}])
def test_trimming_a_quantized_base_is_refused(kind, budget):
    base, batch = quantized_model(kind), token_batch()
    before = run(base, batch)
    with pytest.raises(AnatomyError, match="quantized.*without quantization"):
        wrap(base, budget=budget)
    assert torch.equal(run(base, batch), before)


def test_an_adapter_that_trims_does_not_load_on_a_quantized_base(tmp_path):
    wrap(plain_model(), budget=0.5).save_pretrained(tmp_path)
    with pytest.raises(SensiLoadError, match="quantized"):
        PeftModel.from_pretrained(quantized_model(codes), tmp_path)


@pytest.mark.parametrize("config", [{"update": "mask", "sparsity": 0.3}, {"keep_base": False}])
@pytest.mark.filterwarnings("ignore:No budget was given")
def test_what_needs_the_base_in_full_is_refused(config):
    with pytest.raises(SensiError, match="quantized"):
        wrap(quantized_model(codes), **config)


def test_counts_are_those_of_the_model_without_quantization(kind):
    counts = [build_anatomy(model).total_params for model in (plain_model(), quantized_model(kind))]
    assert counts[0] == counts[1]


def test_a_quantized_base_needs_a_budget():
    base = quantized_model(codes)
    with pytest.raises(SensiError, match=r"trained whole in float32.*'trainable'"):
        wrap(base)
    assert not hasattr(base, "peft_config")


def partly_quantized() -> nn.Module:
    """The first layer has codes; heads and neurons of the second can be trimmed."""
    model = quantized_model(codes)
    exact = plain_model()
    model.bert.encoder.layer[1] = exact.bert.encoder.layer[1]
    return model


@pytest.mark.parametrize("make", [lambda: quantized_model(codes), partly_quantized], ids=["all", "a part"])
def test_an_adapter_on_a_quantized_base_is_trimmed_on_another(make, tmp_path):
    batches = [token_batch(seed=seed) for seed in range(2)]
    model = wrap(make(), budget={"trainable": 0.15}, update="dense")
    train(model)
    before = run(model, batches[0])
    with pytest.raises(AnatomyError, match="Load the adapter on the base model without quantization, and trim"):
        model.trim(0.5, calibration=batches)
    assert torch.equal(run(model, batches[0]), before)
    model.save_pretrained(tmp_path)
    exact = PeftModel.from_pretrained(plain_model(), tmp_path, is_trainable=True)
    assert exact.trim(0.5, calibration=batches).params_share <= 0.5


def test_cuts_during_training_are_refused_before_the_training(tmp_path):
    fields = {"budget": 0.8, "schedule": {"phase": "cut", "start": 0.1, "end": 0.5, "cuts": 2}}
    with pytest.raises(SensiError, match="quantized.*cuts of `schedule`"):
        wrap(partly_quantized(), **fields)
    # Codes cannot be masked, so a file from before the end of the cuts is refused by the same words.
    wrap(plain_model(), **fields).save_pretrained(tmp_path)
    with pytest.raises(SensiLoadError, match="quantized.*cuts of `schedule`"):
        PeftModel.from_pretrained(partly_quantized(), tmp_path)


@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["pooler"], "also_train": []}], ids=["head", "named"])
def test_a_quantized_module_cannot_be_saved_whole(fields, tmp_path):
    whole = "pooler" if fields else "classifier"
    model = quantized_model(codes)
    owner, name = (model.bert.pooler, "dense") if fields else (model, "classifier")
    setattr(owner, name, codes(getattr(owner, name)))
    with pytest.raises(SensiError, match=rf"is quantized.*llm_int8_skip_modules=\['(bert\.)?{whole}'\]"):
        wrap(model, budget={"trainable": 0.15}, update="dense", **fields)
    wrap(plain_model(), budget={"trainable": 0.15}, update="dense", **fields).save_pretrained(tmp_path)
    with pytest.raises(SensiLoadError, match="is quantized, so it cannot be trained and saved whole"):
        PeftModel.from_pretrained(model, tmp_path)


class WithoutBackward(Coded):
    """A kernel without a backward pass, as torchao's for quantized activations."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return super().forward(x)


def test_a_kernel_without_a_backward_pass_is_reported():
    model = wrap(quantized_model(WithoutBackward), budget={"trainable": 0.15}, update="dense")
    with pytest.warns(UserWarning, match="WithoutBackward layers of the base pass no gradients on"):
        model.train()(**token_batch()).loss.backward()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**token_batch())


class PackedLinear(nn.Linear):
    """A Linear whose scales were packed for the CPU, and come back in another order, as in bitsandbytes 0.50."""

    def __init__(self, scales: torch.Tensor) -> None:
        super().__init__(2, 2)
        packed = scales.view(2, -1).t().to(torch.bfloat16)
        self.weight.quant_state = SimpleNamespace(packing_format_for_cpu=True, absmax=packed)  # type: ignore[attr-defined]

    def _save_to_state_dict(self, *args: Any) -> None:
        self.weight.quant_state.packing_format_for_cpu = False  # type: ignore[attr-defined]
        super()._save_to_state_dict(*args)


def test_scales_that_were_packed_for_the_cpu_come_back_in_their_order():
    scales = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    linear = PackedLinear(scales)
    unpack(linear)
    assert torch.equal(linear.weight.quant_state.absmax, scales)
    layer = SensiLinear(PackedLinear(scales), "default")
    layer.state_dict()  # as when an adapter is saved
    assert torch.equal(layer.base_layer.weight.quant_state.absmax, scales)
    model = wrap(plain_model(), budget={"trainable": 0.15}, update="dense")
    model.base_model.model.beside = PackedLinear(scales)  # no adapter changes it
    model.state_dict()
    assert torch.equal(model.base_model.model.beside.weight.quant_state.absmax, scales)


def test_four_bits_survive_an_evaluation_on_the_cpu():
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = nn.Linear(128, 64)
    with torch.no_grad():
        plain.weight.mul_(torch.linspace(1, 8, 64)[:, None])
    four = bnb.nn.Linear4bit(128, 64, quant_type="nf4", compute_dtype=torch.float32, compress_statistics=False)
    four.load_state_dict(plain.state_dict())
    four.to("cpu").eval()
    before = dequantized(four)
    with torch.no_grad():
        four(torch.randn(3, 128))
    torch.testing.assert_close(dequantized(four), before, atol=0.01, rtol=0.01)


@pytest.mark.parametrize("settings", [{"budget": {"trainable": 0.1}}, {"update": "sparse", "sparse": 30}])
def test_weights_that_were_quantized_in_place_after_the_wrap_are_an_error_that_says_so(settings):
    """torchao's `quantize_` replaces weights. The Linears stay, so nothing else shows it."""
    quantization = pytest.importorskip("torchao.quantization")
    model = wrap(plain_model(), **settings)
    small = copy.deepcopy(model).merge_and_unload()
    run(model, token_batch(10))  # what is cached from the base does not hide it
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    for use in (lambda: run(model, token_batch(10)), model.merge_adapter, model.merge_and_unload):
        with pytest.raises(SensiError, match=r"replaced by a torchao.*`merge_and_unload\(\)`"):
            use()
    quantization.quantize_(small, quantization.Int8WeightOnlyConfig())
    assert torch.isfinite(run(small, token_batch(10))).all()
