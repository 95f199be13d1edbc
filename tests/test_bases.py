"""Bases that are more than weights (masks, norms, hooks, frozen parts, offloaded weights), and odd batches."""

from __future__ import annotations

import copy
import types
import warnings

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from peft import PeftModel, get_peft_model
from test_undo import state
from tiny import TRIM, TUNE, assert_same_tensors, logits, snapshot, tiny_batches, tiny_model, train, trained, wrap
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from transformers import IBertConfig, IBertForSequenceClassification

from peft_sensi import AnatomyError, CalibrationError, SensiConfig, SensiError, compute_scores


pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
NAME = "bert.encoder.layer.0.intermediate.dense"


class Scaled(nn.Linear):
    """A subclass with a forward pass of its own."""

    def forward(self, x):
        return super().forward(x) * 2


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def subclass(linear: nn.Linear) -> None:
    linear.__class__ = Scaled


class Called(nn.Linear):
    def __call__(self, x):
        return super().__call__(x) * 2


def called(linear: nn.Linear) -> None:
    linear.__class__ = Called


def patched(linear: nn.Linear) -> None:
    linear.forward = types.MethodType(lambda self, x: nn.functional.linear(x, self.weight, self.bias) * 2, linear)


def computed(linear: nn.Linear) -> None:
    weight = linear.weight.detach()
    del linear.weight
    linear.weight = weight


def parametrized_bias(linear: nn.Linear) -> None:
    parametrize.register_parametrization(linear, "bias", Doubled())


SPECIAL = {
    "pruned": (lambda m: prune.l1_unstructured(m, "weight", 0.3), "prune.remove"),
    "pruned bias": (lambda m: prune.random_unstructured(m, "bias", 0.3), "prune.remove"),
    "structured": (lambda m: prune.ln_structured(m, "weight", 0.3, n=2, dim=0), "prune.remove"),
    "twice": (lambda m: [prune.random_unstructured(m, "weight", 0.2) for _ in range(2)], "prune.remove"),
    "weight norm": (weight_norm, "remove_weight_norm"),
    "spectral norm": (spectral_norm, "remove_spectral_norm"),
    "new weight norm": (parametrizations.weight_norm, "remove_parametrizations"),
    "orthogonal": (parametrizations.orthogonal, "remove_parametrizations"),
    "parametrized": (
        lambda m: parametrize.register_parametrization(m, "weight", Doubled()),
        "remove_parametrizations",
    ),
    "parametrized bias": (parametrized_bias, "remove_parametrizations"),
    "computed": (computed, "is no parameter"),
    "patched": (patched, "`forward` was replaced"),
    "subclass": (subclass, "is not supported"),
    "called": (called, "is not supported"),
}


def test_a_target_with_modules_inside_is_named_in_one_line():
    with pytest.raises(
        SensiError, match=r"^Target module 'bert.encoder', BertEncoder\(\.\.\.\), is not supported[^\n]*$"
    ):
        wrap(tiny_model(), score="random", target_modules=["encoder"])


@pytest.mark.parametrize("options", [TRIM, TUNE, {"sparsity": 0.5}, {"target_modules": "all-linear"}], ids=str)
@pytest.mark.parametrize("name", SPECIAL)
def test_a_linear_that_is_more_than_a_weight_is_refused_before_anything_is_touched(name, options):
    change, advice = SPECIAL[name]
    base = tiny_model()
    change(base.get_submodule(NAME))
    before, batches = state(base), iter(tiny_batches(1))
    with warnings.catch_warnings(), pytest.raises(SensiError, match=advice):
        warnings.simplefilter("ignore")
        wrap(base, calibration=batches, **{"score": "random", **options})
    assert state(base) == before
    assert next(batches)  # nothing was scored


def test_an_embedding_that_is_more_than_a_weight_can_be_left_out():
    base, options = tiny_model(), {**TRIM, "calibration": tiny_batches(2), "score": "magnitude"}
    parametrizations.spectral_norm(base.bert.embeddings.word_embeddings)
    with pytest.raises(SensiError, match=r"Or leave it out, with exclude_modules=\['word_embeddings'\]\.$"):
        wrap(base, **options)
    plan = wrap(base, **options, exclude_modules=["word_embeddings"]).base_model.plan()
    assert plan.params_share <= 0.5 and all(group.kind != "token" for group in plan.anatomy.groups)


def test_it_can_be_left_out_if_nothing_is_trimmed(tmp_path):
    def make():
        base = tiny_model()
        prune.l1_unstructured(base.get_submodule(NAME), "weight", 0.3)
        return base

    model = wrap(make(), exclude_modules=["layer.0.intermediate.dense", "layer.0.output.dense"], **TUNE)
    outputs = logits(model)
    torch.testing.assert_close(outputs, logits(make()))
    train(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(make(), tmp_path)), logits(model))


@pytest.mark.parametrize("where", ["bert.pooler.dense", "classifier"])
def test_such_a_module_is_not_saved_whole(where):
    base = tiny_model()
    weight_norm(base.get_submodule(where))
    before = state(base)
    with pytest.raises(SensiError, match=r"saved whole.*remove_weight_norm"):
        wrap(base, **TRIM)
    assert state(base) == before


def test_the_way_out_works():
    base = tiny_model()
    linear = base.get_submodule(NAME)
    prune.l1_unstructured(linear, "weight", 0.3)
    outputs = logits(base)
    prune.remove(linear, "weight")
    torch.testing.assert_close(logits(wrap(base, **TUNE)), outputs)


def test_a_file_does_not_load_on_such_a_base(tmp_path):
    trained(**TRIM).save_pretrained(tmp_path)
    base = tiny_model()
    parametrizations.weight_norm(base.get_submodule(NAME))
    before = state(base)
    with pytest.raises(SensiError, match="remove_parametrizations"):
        PeftModel.from_pretrained(base, tmp_path)
    assert state(base) == before


# -- hooks ------------------------------------------------------------------------------------------------------------


def hooked(model: nn.Module, name: str = NAME):
    """Hooks of all kinds on one Linear, the names of those that ran, and their handles."""
    seen: list[str] = []
    linear = model.get_submodule(name)
    handles = [
        linear.register_forward_pre_hook(lambda m, a: seen.append("before")),
        linear.register_forward_pre_hook(lambda m, a, k: seen.append("before, named"), with_kwargs=True),
        linear.register_forward_hook(lambda m, a, y: seen.append("after")),
        linear.register_forward_hook(lambda m, a, k, y: seen.append("after, named"), with_kwargs=True),
        linear.register_full_backward_hook(lambda m, i, o: seen.append("back")),
    ]
    return seen, handles


ALL = ["before", "before, named", "after", "after, named", "back"]


def run(model: nn.Module) -> None:
    batch = tiny_batches(1)[0]
    embeds = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    model(inputs_embeds=embeds, **batch).loss.backward()


@pytest.mark.parametrize("options", [TRIM, TUNE, {"keep_base": False, **TRIM}], ids=str)
def test_hooks_run_once_in_every_state(options):
    base = tiny_model()
    seen, handles = hooked(base)
    model = wrap(base, **options)
    run(model)
    assert seen == ALL
    if options.get("keep_base", True):
        seen.clear()
        with model.disable_adapter():
            run(model)
        assert seen == ALL
    seen.clear()
    merged = copy.deepcopy(model).merge_and_unload()
    assert len(merged.get_submodule(NAME)._forward_hooks) == 2
    handles[2].remove()
    run(model)
    assert seen == [name for name in ALL if name != "after"]
    if options.get("keep_base", True):
        model.unload()
        seen.clear()
        run(base)
        assert seen == [name for name in ALL if name != "after"]
        for handle in handles:
            handle.remove()
        seen.clear()
        run(base)
        assert not seen


def test_a_hook_changes_the_adapted_output_as_it_changes_the_merged_one():
    base = tiny_model()
    base.get_submodule(NAME).register_forward_hook(lambda m, a, y: y * 0.5)
    base.get_submodule(NAME).register_forward_pre_hook(lambda m, a: (a[0] + 0.1,))
    plain = trained(**TRIM)
    model = wrap(base, **TRIM)
    model.load_state_dict(plain.state_dict(), strict=False)
    outputs = logits(model)
    assert not torch.allclose(outputs, logits(plain))
    torch.testing.assert_close(logits(copy.deepcopy(model).merge_and_unload()), outputs, atol=1e-5, rtol=1e-5)


def test_hooks_survive_a_failed_wrap_and_a_trim():
    base = tiny_model()
    seen, _ = hooked(base)
    with pytest.raises(CalibrationError):
        wrap(base, calibration=[], **TRIM)
    run(base)
    assert seen == ALL
    model = wrap(base, budget=1.0)
    model.base_model.trim(0.5)
    seen.clear()
    run(model)
    assert seen == ALL


def test_hooks_of_embeddings_run():
    base = tiny_model()
    seen = []
    base.bert.embeddings.word_embeddings.register_forward_hook(lambda m, a, y: seen.append(len(a[0])))
    model = wrap(base, calibration=tiny_batches(2), score="taylor", priming_steps=1, **TRIM)
    seen.clear()
    logits(model)
    assert seen == [4] and "word_embeddings" in str(model.peft_config["default"].target_modules)


# -- parts that the user has frozen -----------------------------------------------------------------------------------


def frozen(*parts: str) -> nn.Module:
    base = tiny_model()
    for part in parts:
        base.get_submodule(part).requires_grad_(False)
    return base


def trains(model: nn.Module, part: str) -> list[str]:
    return [n for n, p in model.named_parameters() if p.requires_grad and n.startswith(f"base_model.model.{part}")]


@pytest.mark.parametrize("options", [TRIM, TUNE, {**TRIM, "target_modules": "all-linear"}], ids=str)
def test_a_frozen_layer_stays_frozen(options, tmp_path):
    base = frozen("bert.embeddings", "bert.encoder.layer.0")
    with pytest.warns(UserWarning, match=r"frozen before the wrap, such as 'bert.encoder.layer.0.*stay frozen"):
        model = wrap(base, calibration=tiny_batches(2), **options)
    assert not trains(model, "bert.embeddings") and not trains(model, "bert.encoder.layer.0")
    assert trains(model, "bert.encoder.layer.1") and trains(model, "classifier")
    train(model)
    model.save_pretrained(tmp_path)
    for other in (tiny_model(), frozen("bert.encoder.layer.0")):  # the file says what it trains
        again = PeftModel.from_pretrained(other, tmp_path)
        assert torch.equal(logits(again), logits(model))


def test_a_bias_that_was_frozen_alone_is_reported():
    model = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith(".query.bias"))
    with pytest.warns(UserWarning, match=r"of 2 modules was frozen before the wrap, such as in '.*query'"):
        wrap(model, **TRIM)


@pytest.mark.parametrize("part", ["classifier", "bert.encoder.layer.0.attention.self.query"])
def test_a_lazy_module_needs_a_forward_pass_first(part):
    model = tiny_model()
    linear = model.get_submodule(part)
    model.set_submodule(part, nn.LazyLinear(linear.out_features))
    with pytest.raises(SensiError, match=f"'{part}.weight' has no values yet"):
        wrap(model, **TRIM)
    assert isinstance(model.get_submodule(part), nn.LazyLinear)
    logits(model)
    assert logits(wrap(model, **TRIM)).shape == (4, 3)


def test_what_is_named_is_trained_and_reported():
    with pytest.warns(UserWarning, match="`target_modules` names them"):
        model = wrap(frozen("bert.encoder.layer.0"), target_modules=["query", "value"], budget={"trainable": 1.0})
    assert trains(model, "bert.encoder.layer.0.attention.self.query")
    with pytest.warns(UserWarning, match="'classifier' was frozen"):
        model = wrap(frozen("classifier"), **TRIM)
    assert trains(model, "classifier")


def test_a_base_that_is_frozen_as_a_whole_is_tuned():
    base = tiny_model().requires_grad_(False)
    expected = {n for n, p in wrap(tiny_model(), **TRIM).named_parameters() if p.requires_grad}
    model = wrap(base, **TRIM)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == expected
    merged = model.merge_and_unload()  # its norms require gradients, and its Linears do not
    again = wrap(merged, budget=1.0)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == expected


# -- offloaded bases --------------------------------------------------------------------------------------------------


def on_disk(model, folder):
    return dispatch_model(model, {"bert.embeddings": "cpu", "bert.encoder": "disk", "bert.pooler": "cpu",
                                  "classifier": "cpu"}, main_device="cpu", offload_dir=str(folder))  # fmt: skip


@pytest.mark.parametrize("offload", [lambda m, folder: cpu_offload(m, torch.device("cpu")), on_disk])
def test_an_offloaded_base_is_refused(offload, tmp_path):
    trained(**TRIM).save_pretrained(tmp_path / "adapter")
    base = tiny_model()
    offload(base, tmp_path / "offload")
    outputs = logits(base)
    for enter in (lambda: wrap(base, **TRIM), lambda: base.load_adapter(str(tmp_path / "adapter"))):
        with pytest.raises(SensiError, match="offloaded"):
            enter()
        assert torch.equal(logits(base), outputs)


def test_one_device_is_no_offload():
    base = dispatch_model(tiny_model(), {"": "cpu"}, force_hooks=True)
    torch.testing.assert_close(logits(wrap(base, **TUNE)), logits(tiny_model()))


# -- calibration in other forms ---------------------------------------------------------------------------------------


FORMS = {
    "numpy": lambda v: v.numpy(),
    "int32": lambda v: v.numpy().astype(np.int32),
    "lists": lambda v: v.tolist(),
    "tuples": lambda v: tuple(map(tuple, v.tolist())) if v.dim() > 1 else tuple(v.tolist()),
}


@pytest.mark.parametrize("form", FORMS)
def test_arrays_and_lists_score_like_tensors(form):
    batches = [{k: FORMS[form](v) for k, v in batch.items()} for batch in tiny_batches(2)]
    found, expected = (
        compute_scores(tiny_model(), b, priming_steps=1, progress=False) for b in (batches, tiny_batches(2))
    )
    assert_same_tensors(found.values, expected.values)


def test_float_targets_in_numpy():
    batches = [{k: v.numpy() for k, v in b.items()} | {"labels": np.ones(4)} for b in tiny_batches(2)]
    tensors = [{**b, "labels": torch.ones(4)} for b in tiny_batches(2)]
    found, expected = (
        compute_scores(tiny_model(num_labels=1), b, priming_steps=1, progress=False) for b in (batches, tensors)
    )
    assert_same_tensors(found.values, expected.values)


BAD = {
    "rows of text": ([{"text": "a film", "label": 1}], "'text' of calibration batch 0.*holds text.*`calibration`"),
    "columns of text": ([{"text": ["a", "b"], "labels": torch.zeros(2)}], "holds text"),
    "text beside tensors": ([{**tiny_batches(1)[0], "sentence": ["a"] * 4}], "'sentence'.*leave out columns"),
    "no inputs": ([{"labels": torch.zeros(4, dtype=torch.long)}], "`calibration`, whose keys.*labels"),
    "too few labels": ([{**tiny_batches(1)[0], "labels": torch.zeros(3, dtype=torch.long)}], "of `calibration`"),
    "ragged": ([{"input_ids": [[1, 2], [3]], "labels": [0, 1]}], "differ in length.*Pad"),
    "a label too many": ([{**tiny_batches(1)[0], "labels": torch.full((4,), 3)}], "of `calibration`.*out of bounds"),
    "an unknown id": ([{"input_ids": torch.full((4, 12), 64), "labels": torch.zeros(4).long()}], "out of range"),
    "float ids": ([{**tiny_batches(1)[0], "input_ids": torch.ones(4, 12)}], "of `calibration`.*Long"),
    "one example": ([{"input_ids": [1, 2, 3], "labels": 0}], "single example"),
    "a text": ("text", "must be an iterable of batches"),
    "texts": (["a film"], "is a str"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_batch_is_refused_by_name(name):
    calibration, message = BAD[name]
    base = tiny_model()
    before = state(base)
    with pytest.raises(CalibrationError, match=message):
        wrap(base, calibration=calibration, score="fisher", **TRIM)
    assert state(base) == before


def test_a_loss_function_may_read_texts():
    batches = [{"text": ["a", "b"], **batch} for batch in tiny_batches(2)]

    def loss(model, batch):
        assert batch["text"] == ["a", "b"]
        return model(**{k: v for k, v in batch.items() if k != "text"}).loss

    compute_scores(tiny_model(), batches, loss_fn=loss, priming_steps=1, progress=False)


def test_a_spent_generator_is_named():
    batches = (batch for batch in tiny_batches(2))
    config = SensiConfig(calibration=batches, priming_steps=1, task_type="SEQ_CLS", **TRIM)
    get_peft_model(tiny_model(), config)
    with pytest.raises(CalibrationError, match=r"generator.*earlier wrap.*2 batches.*model_init"):
        get_peft_model(tiny_model(), config)


def test_a_generator_that_goes_on_is_reported():
    batches = (batch for batch in tiny_batches(6))
    options = {"calibration_steps": 2, "priming_steps": 1, "progress": False}
    compute_scores(tiny_model(), batches, **options)
    with pytest.warns(UserWarning, match="This time, other batches are used"):
        compute_scores(tiny_model(), batches, **options)


def test_the_base_is_whole_after_all_this():
    assert_same_tensors(snapshot(wrap(tiny_model(), **TUNE).unload()), snapshot(tiny_model()))


@pytest.mark.parametrize(
    ("limit", "error", "message"),
    [
        (0.5, AnatomyError, "no heads or neurons that can be trimmed"),
        ({"trainable": 0.1}, SensiError, "has no Linear"),
    ],
)
def test_a_model_without_any_linear_outside_of_its_head(limit, error, message):
    """I-BERT has quantized layers of its own."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    with pytest.raises(error, match=message):
        wrap(IBertForSequenceClassification(IBertConfig(vocab_size=40, **sizes)), budget=limit, task_type=None)
