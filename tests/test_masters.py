"""On a 16-bit base everything that is trained has float32 masters, so small steps move it as in float32."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import cast_mixed_precision_params
from safetensors.torch import load, load_file, save_file
from tiny import TRIM, TUNE, assert_same_tensors, logits, some_slow, tiny_batches, tiny_model, wrap

from peft_sensi import SensiConfig, SensiError
from peft_sensi.layers.whole_modules import SavedWhole


SHORT = [torch.bfloat16, torch.float16]
EVERYTHING = {"also_train": ["norms", "pooler", "output_biases", "tokens"], "budget": 0.5}
CASES = {
    "default": TRIM | {"also_train": ["norms", "pooler", "output_biases"]},
    "tokens": EVERYTHING | {"target_modules": ["query", "key", "value", "dense", "word_embeddings"]},
    "biases": TUNE | {"also_train": ["biases"]},
    "embeddings": {"budget": 1.0, "also_train": ["embeddings", "norms"]},
    "a module of the user": TUNE | {"modules_to_save": ["pooler"]},
}


def trainable(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def steps(model: torch.nn.Module, count: int = 30, lr: float = 1e-4) -> dict[str, float]:
    """The share of the values of each trained tensor that AdamW has moved."""
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=lr, weight_decay=0.0)
    model.eval()  # no dropout, so that runs in two precisions can be compared
    batches = tiny_batches(3, seed=3)
    for step in range(count):
        model(**batches[step % 3]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {n: float((p.detach() != before[n]).float().mean()) for n, p in trainable(model).items()}


@pytest.mark.parametrize("dtype", some_slow(SHORT, "torch.float16"), ids=str)
@pytest.mark.parametrize("case", CASES)
def test_small_steps_move_everything_as_in_float32(case, dtype):
    options = CASES[case]
    if "tokens" in options.get("also_train", ()):
        options = options | {"calibration": tiny_batches(2), "priming_steps": 0}
    moved = steps(wrap(tiny_model(dtype=dtype), **options))
    expected = steps(wrap(tiny_model(), **options))
    assert moved.keys() == expected.keys() and len(moved) > 3
    for name, share in expected.items():
        assert share == pytest.approx(moved[name], abs=0.15), name
    whole = [share for name, share in moved.items() if "modules_to_save" in name and "_embeddings" not in name]
    assert min(whole) > 0.5


@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_values_move_by_the_same_amounts_as_in_float32(dtype):
    """The masters start from the base's rounded weights, so the runs differ by the rounding of activations only."""
    models = [wrap(tiny_model(dtype=dtype), **TRIM), wrap(tiny_model(dtype=dtype).float(), **TRIM)]
    starts = [{n: p.detach().clone() for n, p in trainable(model).items()} for model in models]
    for model in models:
        steps(model)
    for name, parameter in trainable(models[0]).items():
        if "key.sensi_bias" in name:  # the softmax cancels this bias, so its gradient is noise
            continue
        assert parameter.dtype == torch.float32 and bool(torch.isfinite(parameter).all())
        change = (parameter - starts[0][name]).detach()
        expected = (trainable(models[1])[name] - starts[1][name]).detach()
        assert torch.cosine_similarity(change.flatten(), expected.flatten(), dim=0) > 0.8, name


@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_merged_models_compute_the_same_and_have_the_dtype_of_the_base(dtype):
    model = wrap(tiny_model(dtype=dtype), **TRIM)
    steps(model, 5, 1e-2)
    outputs = logits(model)
    assert outputs.dtype == dtype
    merged = copy.deepcopy(model).merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {dtype}
    assert torch.equal(logits(merged), outputs)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_model(dtype=dtype)))
    assert torch.equal(logits(model), outputs)
    assert all(p.dtype == dtype for p in model.unload().parameters())


@pytest.mark.parametrize("dtype", SHORT, ids=str)
@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}, {"is_trainable": True}], ids=str)
def test_files_hold_the_masters(dtype, options, tmp_path):
    model = wrap(tiny_model(dtype=dtype), **TRIM)
    steps(model, 5, 1e-3)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load(path.read_bytes())
    assert {t.dtype for n, t in tensors.items() if "sensi_plan" not in n} == {torch.float32}
    again = PeftModel.from_pretrained(tiny_model(dtype=dtype), tmp_path, **options)
    assert torch.equal(logits(again), logits(model))
    whole = [p for n, p in again.named_parameters() if "modules_to_save" in n]
    assert whole and all(p.dtype == torch.float32 for p in whole)
    plain = tiny_model(dtype=dtype)
    plain.load_adapter(str(tmp_path))
    assert torch.equal(logits(plain), logits(model))
    # Files of earlier versions hold these modules in the dtype of the base.
    short = {n: t.to(dtype) if "sensi_" not in n else t for n, t in tensors.items()}
    save_file(short, path)
    older = PeftModel.from_pretrained(tiny_model(dtype=dtype), tmp_path, **options)
    assert torch.equal(logits(older), logits(model))
    assert all(p.dtype == torch.float32 for n, p in older.named_parameters() if "modules_to_save" in n)


def test_a_second_adapter_has_masters_too():
    model = wrap(tiny_model(dtype=torch.bfloat16), **TRIM)
    first = logits(model)
    model.add_adapter("second", SensiConfig(score="random", task_type="SEQ_CLS", **TRIM))
    model.set_adapter("second")
    moved = steps(model)
    assert min(share for name, share in moved.items() if "modules_to_save" in name) > 0.5
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    assert torch.equal(logits(copy.deepcopy(model)), first)


def test_a_float32_base_is_wrapped_as_peft_does():
    model = wrap(tiny_model(), **TRIM)
    wrappers = [m for m in model.modules() if isinstance(m, SavedWhole)]
    assert wrappers and not any(m.rounded("default") for m in wrappers)


def test_the_dtype_that_a_models_code_sees_is_that_of_the_base():
    model = get_peft_model(tiny_model(dtype=torch.bfloat16), SensiConfig(score="random", task_type="SEQ_CLS", **TRIM))
    head = model.base_model.model.classifier
    assert head.weight.dtype == torch.bfloat16 and head.modules_to_save["default"].weight.dtype == torch.float32
    assert head.weight.requires_grad and head.out_features == 3


def test_masters_are_compiled_without_graph_breaks():
    model = wrap(tiny_model(dtype=torch.bfloat16), **TRIM)
    steps(model, 3, 1e-2)
    outputs = logits(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), outputs)


# -- casts after the wrap ---------------------------------------------------------------------------------------------

CASTS = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "to": lambda model: model.to(torch.bfloat16),
    "to dtype": lambda model: model.to(dtype=torch.float16),
    "to device and dtype": lambda model: model.to("cpu", torch.bfloat16),
    "to like": lambda model: model.to(torch.zeros(1, dtype=torch.bfloat16)),
    "the inner model": lambda model: model.get_base_model().half() and model,
}


@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_after_the_wrap_leaves_the_masters(cast, tmp_path):
    """The model is then as if the base had had this dtype when it was wrapped."""
    model = wrap(tiny_model(), **TRIM | {"also_train": ["norms", "pooler", "output_biases"]})
    steps(model, 3, 1e-3)
    model(**tiny_batches(1)[0]).loss.backward()  # casts move gradients too
    before = {n: p.detach().clone() for n, p in trainable(model).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        CASTS[cast](model)
        dtype = model.get_base_model().bert.embeddings.word_embeddings.weight.dtype
        outputs = logits(model)
        model.train()(**tiny_batches(1)[0])
    assert outputs.dtype == dtype in SHORT
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in trainable(model).values())
    assert all(torch.equal(p, before[n]) for n, p in trainable(model).items())
    merged = copy.deepcopy(model).merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {dtype} and torch.equal(logits(merged), outputs)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(dtype=dtype), tmp_path)
    assert torch.equal(logits(again), outputs)
    moved = steps(model)
    assert min(share for name, share in moved.items() if "modules_to_save" in name or "sensi_" in name) > 0.5


@pytest.mark.parametrize("options", [TRIM, {"update": "low_rank+sparse", "rank": 2, "sparse": 8}], ids=str)
def test_a_cast_there_and_back(options):
    """Evaluation in 16 bits must not cost what was trained. `Trainer` casts with `bf16_full_eval` and stays there."""
    model = wrap(tiny_model(dtype=torch.bfloat16), **options)
    steps(model, 3, 1e-3)
    outputs, before = logits(model), {n: p.detach().clone() for n, p in trainable(model).items()}
    model.float()
    wide = logits(model)
    torch.testing.assert_close(logits(model.double()).float(), wide, atol=1e-4, rtol=1e-4)
    model.bfloat16()
    assert all(p.dtype == torch.float32 and torch.equal(p, before[n]) for n, p in trainable(model).items())
    assert torch.equal(logits(model.float().bfloat16()), outputs)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_a_cast_leaves_codes(kind, tmp_path):
    model = wrap(tiny_model(), **TRIM)
    steps(model, 3, 1e-3)
    model.base_model.compress(kind)
    outputs, codes = logits(model), {n: t.clone() for n, t in model.state_dict().items() if "sensi_" in n}
    for cast in (model.half, model.bfloat16, model.float):
        cast()
        assert_same_tensors({n: t for n, t in model.state_dict().items() if n in codes}, codes)
    model.save_pretrained(tmp_path)
    assert logits(PeftModel.from_pretrained(tiny_model(), tmp_path)).shape == outputs.shape


def test_a_cast_of_a_merged_model_reaches_what_unmerging_puts_back():
    model = wrap(tiny_model(), **TRIM)
    steps(model, 3, 1e-3)
    model.merge_adapter()
    model.bfloat16()
    merged = logits(model)
    model.unmerge_adapter()
    assert {p.dtype for n, p in model.named_parameters() if "base_layer" in n} == {torch.bfloat16}
    assert torch.equal(logits(model), merged)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_model(dtype=torch.bfloat16)))


@pytest.mark.parametrize("convert", ["data", "assign", "modules"])
def test_values_that_were_converted_one_by_one_warn_in_training_only(convert):
    model = wrap(tiny_model(dtype=torch.bfloat16), **TRIM)
    if convert == "data":  # as TRL does on a quantized base
        for parameter in trainable(model).values():
            parameter.data = parameter.data.bfloat16()
    elif convert == "modules":
        for module in model.modules():
            module.bfloat16()
    else:
        state = {n: t.bfloat16() if t.is_floating_point() else t for n, t in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        logits(model)
    model.train()
    with pytest.warns(UserWarning, match="float32"):
        model(**tiny_batches(1)[0])


INTEGERS = {
    "positions": {"update": "sparse", "sparse": 40, "target_modules": ["query"]},
    "mask": {"update": "low_rank", "rank": 2, "sparsity": 0.5, "target_modules": ["query"],
             "schedule": {"phase": "draw_mask", "at": 0.5}},
    "gates": {"budget": 0.5, "schedule": {"phase": "cut", "start": 0.5, "end": 0.5, "cuts": 1}},
    "codes": {"budget": {"trainable": 0.1}, "update": "dense"},
}  # fmt: skip


@pytest.mark.parametrize("dtype", SHORT, ids=str)
@pytest.mark.parametrize("kind", INTEGERS)
def test_integers_do_not_follow_a_conversion_of_all_frozen_parameters(kind, dtype, tmp_path):
    """Positions and codes are frozen parameters as well, and 16 bits cannot hold them."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 1}
    model, expected = (wrap(tiny_model(**sizes), **INTEGERS[kind]) for _ in range(2))
    if kind == "codes":
        steps(model, 3, 1e-3)
        model.base_model.compress("int8")
        model.save_pretrained(tmp_path)
        model, expected = (PeftModel.from_pretrained(tiny_model(**sizes), tmp_path) for _ in range(2))
    expected.to(dtype)
    cast_mixed_precision_params(model, dtype)
    torch.testing.assert_close(logits(model), logits(expected), atol=0.02, rtol=0)
    names = ("sensi_places", "sensi_bits", "sensi_gate", "sensi_codes")
    kept = {n: p for n, p in expected.named_parameters() if any(name in n for name in names)}
    assert kept
    assert_same_tensors({n: p for n, p in model.named_parameters() if n in kept}, kept)


def test_integers_that_a_conversion_has_spoiled_are_no_values():
    model = wrap(tiny_model(hidden_size=128, num_hidden_layers=1), **INTEGERS["positions"])
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            parameter.data = parameter.data.half() + 100
    with pytest.raises(SensiError, match="Convert parameters of float dtypes only"):
        logits(model)


def test_a_base_that_was_unfrozen_is_not_trained_in_silence():
    model = wrap(tiny_model(), **TRIM)
    model.requires_grad_(True)
    with pytest.warns(UserWarning, match="Weights of the base require gradients"):
        model.train()(**tiny_batches(1)[0]).loss.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()(**tiny_batches(1)[0])


def test_weights_that_are_trained_beside_the_adapter_are_not_lost_in_silence(tmp_path):
    model = wrap(tiny_model(), **TRIM)
    positions = "base_model.model.bert.embeddings.position_embeddings.weight"
    model.get_parameter(positions).requires_grad_(True)
    with pytest.warns(UserWarning, match="position_embeddings.weight' .1 in all.. The adapter is saved without them"):
        model.save_pretrained(tmp_path)
    model.get_parameter(positions).requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)


def test_trained_embeddings_that_peft_saves_are_not_reported_as_lost(tmp_path):
    model = wrap(tiny_model(), **TUNE)
    table = model.get_input_embeddings().weight.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
        model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any(torch.equal(table, tensor) for tensor in load_file(tmp_path / "adapter_model.safetensors").values())
