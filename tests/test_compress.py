"""Adapters in bfloat16 and int8: the registered tensors equal those of the file, whatever loads it."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load, load_file, save_file
from tiny import BOTH, TRIM, TUNE, logits, snapshot, some_slow, tiny_batches, tiny_model, train, trained, wrap

from peft_sensi import SensiConfig, SensiError, SensiLoadError
from peft_sensi.layers.compression import BLOCK, decode, encode, sizes
from peft_sensi.layers.layer import SensiLayer


LOW_RANK = {"update": "low_rank", "rank": 3, "also_train": ["biases"]}
SPARSE = {"update": "low_rank+sparse", "rank": 2, "sparse": 70, "target_modules": ["query", "value"]}
MASKED = {**SPARSE, "sparsity": 0.2}
DENSE_AND_LOW = {"update": "dense+low_rank", "rank": 2, "retention": 0.3}
CASES = {
    "trim": TRIM,
    "tune": TUNE,
    "both": BOTH,
    "low rank": LOW_RANK,
    "sparse": SPARSE,
    "masked": MASKED,
    "dense+low rank": DENSE_AND_LOW,
}
KINDS = ("bfloat16", "int8")


@pytest.fixture(params=some_slow(CASES, "tune", "sparse"))  # these are parts of others
def case(request) -> dict:
    return CASES[request.param]


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


def compressed(kind: str, **config) -> PeftModel:
    model = trained(**config)
    model.base_model.compress(kind)
    return model


# -- codes ------------------------------------------------------------------------------------------------------------


def example_parts(dim: int, rows: int, columns: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "weight": (rows, columns),
        "bias": (rows,),
        "down": (2, columns),
        "up": (rows, 2),
        "values": (BLOCK + 5,),
    }
    parts = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    spread = torch.logspace(-6, 3, parts["weight"].shape[dim])  # every unit its own size
    parts["weight"] = parts["weight"] * spread.unsqueeze(1 - dim)
    return parts


@given(st.integers(0, 1), st.integers(0, 9), st.integers(0, 9), st.integers(0, 99))
def test_int8_is_right_to_half_a_step_of_the_units_own_scale(dim, rows, columns, seed):
    parts = example_parts(dim, rows, columns, seed)
    codes, scales = encode(parts, dim, "int8")
    shapes = {name: tuple(part.shape) for name, part in parts.items()}
    assert (len(codes), len(scales)) == sizes(shapes, dim, "int8")
    assert codes.dtype == torch.int8 and scales.dtype == torch.float32
    for name, found in decode(codes, scales, shapes, dim).items():
        part, axis = parts[name], {"weight": dim, "down": 0, "up": 1}.get(name)
        if not part.numel():
            continue
        if axis is None:
            largest = torch.cat([b.abs().amax().expand(len(b)) for b in part.split(BLOCK)])
        else:
            largest = part.abs().amax(1 - axis, keepdim=True)
        assert ((found - part).abs() <= largest / 127 * 0.501).all()


def test_codes_of_codes_are_the_same_codes(kind):
    parts = example_parts(1, 6, 5, 0)
    codes, scales = encode(parts, 1, kind)
    decoded = decode(codes, scales, {name: tuple(part.shape) for name, part in parts.items()}, 1)
    again, _ = encode(decoded, 1, kind)
    assert torch.equal(codes, again)


def test_zeros_stay_zeros(kind):
    codes, scales = encode({"weight": torch.zeros(3, 4)}, 0, kind)
    assert torch.equal(decode(codes, scales, {"weight": (3, 4)}, 0)["weight"], torch.zeros(3, 4))


# -- the compressed model ---------------------------------------------------------------------------------------------


def test_it_computes_nearly_the_same(case, kind):
    model = trained(**case)
    before = logits(model)
    base = logits(tiny_model())
    model.base_model.compress(kind)
    change = (logits(model) - before).abs().max()
    assert 0 < change < 0.05 * (before - base).abs().max()
    assert not [n for n, p in model.named_parameters() if ".sensi_" in n and p.requires_grad]


def test_the_base_stays_what_it_was(case, kind):
    model = compressed(kind, **case)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_model()))
    assert torch.equal(logits(model.unload()), logits(tiny_model()))


def test_merge_and_unmerge(case, kind):
    model = compressed(kind, **case)
    before = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)
    torch.testing.assert_close(logits(model.merge_and_unload()), before, atol=1e-5, rtol=1e-5)


def test_copy_autocast_and_tracing(kind):
    model = compressed(kind, **BOTH)
    before = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), before)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(logits(model).float(), before, atol=0.5, rtol=0.1)
    assert torch.equal(logits(model), before)
    traced = torch.compile(model.base_model.model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(traced), before, atol=1e-5, rtol=1e-5)


def test_a_cache_does_not_outlive_the_codes(kind):
    model = compressed(kind, **TUNE)
    before = logits(model)
    with torch.no_grad():
        for layer in (m for m in model.modules() if isinstance(m, SensiLayer)):
            layer.sensi_codes["default"].zero_()
    head = {n: p for n, p in model.named_parameters() if "modules_to_save" in n}
    assert head and not torch.equal(logits(model), before)


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"low_cpu_mem_usage": True}, {"adapter_name": "other"}], ids=str)
def test_every_load_gives_the_same_model(case, kind, options, saved_adapter, tmp_path):
    expected, folder = saved_adapter(kind=kind, **case)
    loaded = PeftModel.from_pretrained(tiny_model(), folder, **options)
    assert torch.equal(logits(loaded), expected)
    assert not any(p.is_meta for p in loaded.parameters())
    loaded.save_pretrained(tmp_path / "again", selected_adapters=[options.get("adapter_name", "default")])
    files = list((tmp_path / "again").rglob("*.safetensors"))
    before, after = load_file(folder / "adapter_model.safetensors"), load_file(files[0])
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize("options", [{"low_cpu_mem_usage": True}, {"adapter_name": "other"}], ids=str)
def test_load_adapter_of_transformers(case, kind, options, saved_adapter):
    expected, folder = saved_adapter(kind=kind, **case)
    loaded = tiny_model()
    loaded.load_adapter(str(folder), **options)
    assert torch.equal(logits(loaded), expected)


def test_auto_class_and_load_beside_another(kind, tmp_path):
    model = compressed(kind, **TRIM)
    model.save_pretrained(tmp_path / "a")
    tiny_model().save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "a")
    auto = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "a", num_labels=3)
    assert torch.equal(logits(auto), logits(model))
    other = trained(adapter_name="first", **BOTH)
    before = logits(other)
    other.load_adapter(str(tmp_path / "a"), "second")
    assert torch.equal(logits(other), before)
    other.set_adapter("second")
    assert torch.equal(logits(other), logits(model))


def test_a_base_of_half_precision(kind, tmp_path):
    model = wrap(tiny_model(dtype=torch.bfloat16), **BOTH)
    train(model)
    model.base_model.compress(kind)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(dtype=torch.bfloat16), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_loaded_without_the_base(case, kind, saved_adapter):
    expected, folder = saved_adapter(kind=kind, **case)
    config = SensiConfig.from_pretrained(folder)
    config.keep_base = False
    loaded = PeftModel.from_pretrained(tiny_model(), folder, config=config)
    assert torch.equal(logits(loaded), expected)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "bytes_a_value"), [("bfloat16", 2.05), ("int8", 1.1)])
def test_bytes_of_a_tuned_value(kind, bytes_a_value, tmp_path):
    # Rows of 128 values: a scale of 4 bytes is little, as in a real model.
    model = wrap(tiny_model(hidden_size=128, intermediate_size=256), budget=0.5)
    tuned = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and ".sensi_" in n)
    model.base_model.compress(kind)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    written = sum(t.nbytes for n, t in tensors.items() if n.rpartition(".")[2] in ("sensi_codes", "sensi_scales"))
    assert written <= bytes_a_value * tuned
    assert not [n for n in tensors if n.endswith(("sensi_weight", "sensi_bias", "sensi_up"))]


# -- what is refused --------------------------------------------------------------------------------------------------


def test_training_a_compressed_adapter_is_refused(kind, tmp_path):
    model = compressed(kind, **TRIM)
    model.save_pretrained(tmp_path)
    with pytest.raises(SensiError, match="compressed to .* not trained"):
        PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True)


def test_a_compressed_adapter_is_not_trained_on(kind):
    """Only the task head and the norms would be trained."""
    model, batch = compressed(kind, **TRIM), tiny_batches(1)[0]
    with pytest.raises(SensiError, match="only its task head and norms would be trained"):
        model.train()(**batch)
    with torch.no_grad():
        model(**batch)
    model.eval()(**batch).loss.backward()  # no training: gradients of inputs, for example
    model.requires_grad_(False).train()(**batch)


@pytest.mark.parametrize("stored", [None, "bfloat16", "int8"])
@pytest.mark.parametrize("running", [None, "bfloat16", "int8"])
def test_checkpoints_of_another_form_are_refused(stored, running, tmp_path):
    """As `Trainer` resumes: weights into a model that is there, without a look at the config."""
    if stored == running:
        return
    one, two = (trained(**TRIM) for _ in range(2))
    for model, kind in ((one, stored), (two, running)):
        if kind:
            model.base_model.compress(kind)
    one.save_pretrained(tmp_path)
    before = snapshot(two)
    with pytest.raises(SensiLoadError):
        two.load_adapter(str(tmp_path), "default")
    assert all(torch.equal(value, before[name]) for name, value in snapshot(two).items())


def test_broken_codes_are_refused(tmp_path):
    compressed("int8", **TRIM).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load(path.read_bytes())
    name = next(n for n in tensors if n.endswith("sensi_scales"))
    tensors[name][0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(SensiLoadError, match="NaN"):
        PeftModel.from_pretrained(tiny_model(), tmp_path)


def test_what_cannot_be_compressed(kind):
    model = trained(**TRIM)
    with pytest.raises(SensiError, match="bfloat16 or int8"):
        model.base_model.compress("int4")
    with pytest.raises(SensiError, match="no adapter"):
        model.base_model.compress(kind, "other")
    model.merge_adapter()
    with pytest.raises(SensiError, match="merged"):
        model.base_model.compress(kind)
    model.unmerge_adapter()
    model.base_model.compress(kind)
    with pytest.raises(SensiError, match="compressed already"):
        model.base_model.compress(kind)
    with pytest.raises(SensiError, match="keep_base=False"):
        trained(keep_base=False, **TRIM).base_model.compress(kind)
    with pytest.raises(SensiError, match="finished adapter"):
        SensiConfig(compressed=kind)


def test_compressing_one_of_two_adapters(kind):
    model = trained(**TRIM)
    model.add_adapter("second", SensiConfig(score="magnitude", task_type="SEQ_CLS", **BOTH))
    model.set_adapter("second")
    train(model, tiny_batches(3, seed=5))
    second = logits(model)
    model.base_model.compress(kind, "default")
    assert torch.equal(logits(model), second)
    model.set_adapter("default")
    logits(model)
