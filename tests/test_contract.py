"""The contract with PEFT and Transformers: every way in, every way out, and the base underneath untouched."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import warnings
from collections import UserDict
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from accelerate import init_empty_weights
from peft import (
    AutoPeftModel,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftModelForSequenceClassification,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners import tuners_utils
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load, load_file, save_file
from tiny import (
    BOTH,
    BUDGETS,
    TRIM,
    TUNE,
    VOCABULARY,
    assert_same_tensors,
    load_from_subfolder,
    logits,
    only_slow,
    snapshot,
    tiny_batches,
    tiny_config,
    tiny_model,
    train,
    trained,
    wrap,
)
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BertModel,
    BlipConfig,
    BlipForConditionalGeneration,
    PreTrainedModel,
)

import peft_sensi
from peft_sensi import (
    Budget,
    CalibrationError,
    Scores,
    SensiConfig,
    SensiError,
    SensiLoadError,
    build_anatomy,
    compute_scores,
    load_merged,
    make_plan,
)
from peft_sensi.layers.layer import SensiLayer, layers_of


HEADS = ("num_attention_heads", "all_head_size", "n_heads")


def attributes(model: nn.Module) -> dict[str, int]:
    """Numbers of heads and widths as the attention modules believe them."""
    return {
        f"{name}.{attribute}": getattr(module, attribute)
        for name, module in model.named_modules()
        for attribute in HEADS
        if isinstance(getattr(module, attribute, None), int)
    }


def is_plain(model: nn.Module) -> bool:
    return not any(isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for m in model.modules())


def assert_is_base(model: nn.Module, base: nn.Module) -> None:
    """`model` is what `base` is: types, tensors bit by bit, attributes, outputs."""
    assert is_plain(model)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in base.named_modules()]
    assert_same_tensors(snapshot(model), snapshot(base))
    assert attributes(model) == attributes(base)
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear):
            other = model.get_submodule(name)
            assert (other.in_features, other.out_features) == (module.in_features, module.out_features)
    assert torch.equal(logits(model), logits(base))


@pytest.fixture
def saved(budget, saved_adapter) -> tuple[torch.Tensor, Path]:
    """The logits of a trained model, and the folder of its adapter."""
    return saved_adapter(**budget)


@pytest.fixture
def base_folder(tmp_path) -> Path:
    tiny_model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


# -- wrapping ---------------------------------------------------------------------------------------------------------


def test_import_registers_once():
    from peft import mapping

    peft_sensi.register()
    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING["SENSI"] is SensiConfig
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING["SENSI"] is peft_sensi.SensiModel
    assert mapping.PEFT_TYPE_TO_PREFIX_MAPPING["SENSI"] == "sensi_"


def test_a_name_that_is_taken_is_an_error(monkeypatch):
    from peft import mapping

    monkeypatch.setitem(mapping.PEFT_TYPE_TO_TUNER_MAPPING, "SENSI", LoraConfig)
    with pytest.raises(SensiError, match="already registered.*SENSI"):
        peft_sensi.register()


def test_get_peft_model(family, budget):
    model = wrap(tiny_model(family), calibration=tiny_batches(), **budget)
    assert type(model) is PeftModelForSequenceClassification
    plan = model.base_model.plan()
    assert plan.trims == (
        "trainable" not in budget.get("budget", {}) if isinstance(budget["budget"], dict) else True
    ) or (budget is BOTH)
    assert model.peft_config["default"].plan == plan.to_dict()
    train(model)
    assert logits(model).shape == (4, 3)


@pytest.mark.parametrize("task", ["TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", "MASKED_LM"])
def test_other_tasks(family, task, budget, tmp_path):
    batches = tiny_batches(3, task=task)
    labeled = task != "FEATURE_EXTRACTION"
    options = {"calibration": batches, "score": "fisher"} if labeled else {}
    task_type = task if task != "MASKED_LM" else None
    torch.manual_seed(0)
    model = wrap(tiny_model(family, task), task_type=task_type, **options, **budget).eval()
    if labeled:
        train(model, batches)

    @torch.no_grad()
    def output(m):
        return m.eval()(**{k: v for k, v in batches[0].items() if k in ("input_ids", "attention_mask")})[0]

    expected = output(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(family, task), tmp_path)
    assert torch.equal(output(again), expected)
    merged = again.merge_and_unload()
    assert is_plain(merged)
    torch.testing.assert_close(output(merged), expected, atol=1e-5, rtol=1e-5)


def test_the_task_head_is_trained_and_saved_whole(family):
    model = trained(family, **TRIM)
    heads = {"bert": ["classifier"], "distilbert": ["pre_classifier", "classifier"]}.get(family, ["classifier"])
    names = {
        n.split(".modules_to_save")[0].rpartition(".")[2]
        for n, _ in model.named_parameters()
        if ".modules_to_save" in n
    }
    assert set(heads) <= names
    fresh = tiny_model(family)
    for head in heads:
        wrapper = getattr(model.base_model.model, head)
        assert_same_tensors(snapshot(wrapper.original_module), snapshot(getattr(fresh, head)))
        moved = [
            not torch.equal(p, q)
            for p, q in zip(
                wrapper.modules_to_save["default"].parameters(), wrapper.original_module.parameters(), strict=True
            )
        ]
        assert all(moved)


def test_a_language_model_head_is_left_alone():
    model = wrap(tiny_model(task="MASKED_LM"), task_type=None, **TUNE)
    assert not any("cls." in n for n, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("extra", [["bert.pooler.dense"], ["bert.embeddings.LayerNorm"], ["word_embeddings"]])
def test_modules_to_save_of_the_user(extra, tmp_path):
    model = trained(modules_to_save=extra, **TUNE)
    assert set(extra) <= set(model.peft_config["default"].modules_to_save)
    assert any(extra[0].split(".")[-1] in n for n, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    with again.disable_adapter():
        assert torch.equal(logits(again), logits(tiny_model()))
    assert_is_base(model.unload(), tiny_model())


@pytest.mark.parametrize(
    "also", [[], ["biases"], ["norms"], ["pooler"], ["embeddings"], ["norms", "biases", "embeddings"]]
)
def test_what_else_is_trained_is_counted_saved_and_put_back(also, tmp_path):
    model = trained(also_train=also, **TRIM)
    plan = model.base_model.plan()
    trainable = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "classifier" not in n)
    assert trainable == plan.trainable_params
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), logits(model))
    assert_is_base(model.unload(), tiny_model())


def test_a_tied_output_layer_is_no_target_by_default():
    """PEFT's "all-linear" leaves it out only if the model names it as its output layer, and BLIP does not."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 64}
    text = {**sizes, "vocab_size": 64, "encoder_hidden_size": 32, "max_position_embeddings": 40}
    image = {**sizes, "image_size": 16, "patch_size": 8}
    config = BlipConfig(text_config=text, vision_config=image, projection_dim=32)
    base = BlipForConditionalGeneration(config)
    tied = "text_decoder.cls.predictions.decoder"
    assert base.get_submodule(tied).weight is base.text_decoder.bert.embeddings.word_embeddings.weight
    model = wrap(base, budget={"trainable": 0.1}, score="magnitude", task_type=None)
    assert tied not in layers_of(model) and len(layers_of(model)) > 10


def test_tied_embeddings_are_refused():
    base = tiny_model(task="MASKED_LM")
    with pytest.raises(SensiError, match="tied"):
        wrap(base, task_type=None, also_train=["embeddings"], **TRIM)
    assert is_plain(base)


def test_print_trainable_parameters(budget, capsys):
    model = wrap(tiny_model(), **budget)
    model.print_trainable_parameters()
    text = capsys.readouterr().out
    trainable, everything = model.get_nb_trainable_parameters()
    assert trainable == model.base_model.plan().trainable_params + 32 * 3 + 3
    assert f"trainable params: {trainable:,} || all params: {everything:,}" in text


def test_the_same_config_wraps_a_second_model_with_a_plan_of_its_own():
    config = SensiConfig(calibration=tiny_batches(), score="fisher", priming_steps=2, task_type="SEQ_CLS", **TRIM)
    before = {k: copy.copy(v) for k, v in config.__dict__.items()}
    first = get_peft_model(tiny_model(), config)
    second = get_peft_model(tiny_model(seed=1), config)
    third = get_peft_model(tiny_model("distilbert"), config)
    assert first.base_model.plan() != second.base_model.plan()
    assert third.base_model.plan().anatomy.model_type == "distilbert"
    # PEFT itself writes these into the config that it is given.
    noted = ("base_model_name_or_path", "auto_mapping", "inference_mode", "modules_to_save")
    after = {k: v for k, v in config.__dict__.items() if k not in noted}
    assert after == {k: v for k, v in before.items() if k not in noted}
    assert first.peft_config["default"] is not config and first.peft_config["default"].calibration is None


@pytest.mark.parametrize("name", ["target_modules", "exclude_modules"])
def test_a_broken_pattern_of_modules_is_an_error_of_ours(name):
    with pytest.raises(SensiError, match=rf"`{name}` is no regular expression: missing \), .* got '\(\('"):
        SensiConfig(budget=0.5, **{name: "(("})


def test_target_modules_that_match_nothing_are_an_error():
    base = tiny_model()
    with pytest.raises(ValueError, match="nothing_like_this"):
        wrap(base, target_modules=["nothing_like_this"], **TRIM)
    assert_is_base(base, tiny_model())


@pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
def test_a_name_that_fits_nothing_beside_others_is_named(field):
    with pytest.warns(UserWarning, match=f"`{field}` names 'poler.dense'.*misspelled"):
        wrap(tiny_model(), **{field: ["bert.pooler.dense", "poler.dense"]}, **TUNE)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        wrap(tiny_model(), **{field: ["bert.pooler.dense"]}, **TUNE)


def test_a_module_that_may_be_trimmed_cannot_be_saved_whole():
    base = tiny_model()
    with pytest.raises(SensiError, match=r"`modules_to_save` has 'bert.encoder.layer.0.*leave it out"):
        wrap(base, modules_to_save=["dense"], **TRIM)
    assert_is_base(base, tiny_model())
    wrap(base, modules_to_save=["dense"], **TUNE)


def test_a_base_without_values(saved):
    """Nothing can be ranked on it, but a finished adapter can be loaded before the values of the base are."""
    with torch.device("meta"):
        empty = AutoModelForSequenceClassification.from_config(tiny_config("bert"))
    with pytest.raises(SensiError, match="meta device.*Load the base first"):
        wrap(empty, **TRIM)
    with init_empty_weights():
        empty = tiny_model()
    _, folder = saved
    model = PeftModel.from_pretrained(empty, folder, low_cpu_mem_usage=True)
    values = {n: p for n, p in model.named_parameters() if ".sensi_" in n}
    loaded = dict(PeftModel.from_pretrained(tiny_model(), folder).named_parameters())
    assert values and all(torch.equal(value, loaded[name]) for name, value in values.items())


def test_target_modules_as_peft_writes_them():
    for targets in (["query", "value"], r".*layer\.\d\.attention.*(query|value)", "all-linear"):
        model = wrap(tiny_model(), target_modules=targets, **TUNE)
        assert model.base_model.plan().trainable_params > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = wrap(tiny_model(), target_modules="all-linear", exclude_modules=["query"], **TUNE)
    assert not any("query.sensi_weight" in n for n, _ in model.named_parameters())


def test_distilbert_with_all_linear():
    """PEFT's own default crashes here: `pre_classifier` matches `classifier`."""
    model = wrap(tiny_model("distilbert"), target_modules="all-linear", **TRIM)
    train(model)
    assert logits(model).shape == (4, 3)


# -- a wrap that fails ------------------------------------------------------------------------------------------------


def interrupted():
    yield from tiny_batches(1)
    raise KeyboardInterrupt


FAILURES = {
    "empty": ([], CalibrationError),
    "unlabeled": (tiny_batches(labels=False), CalibrationError),
    "interrupted": (interrupted, KeyboardInterrupt),
    "broken": (
        [{"input_ids": torch.full((2, 3), 10**6), "labels": torch.zeros(2, dtype=torch.long)}],
        CalibrationError,
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_wrap_leaves_the_model_as_it_was(name):
    calibration, error = FAILURES[name]
    calibration = calibration() if callable(calibration) else calibration
    base = tiny_model().train()
    base.bert.embeddings.requires_grad_(False)
    flags = [p.requires_grad for p in base.parameters()]
    with pytest.raises(error):
        wrap(base, calibration=calibration, score="fisher", **TRIM)
    assert base.training and [p.requires_grad for p in base.parameters()] == flags
    assert_is_base(base, tiny_model())
    train(wrap(base, calibration=tiny_batches(), score="fisher", **TRIM))  # and it can be wrapped after all


@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_second_adapter_leaves_the_first_as_it_was(name):
    calibration, error = FAILURES[name]
    calibration = calibration() if callable(calibration) else calibration
    model = trained(**TRIM)
    before, tensors, config = logits(model), snapshot(model), model.peft_config["default"]
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(error):
        model.add_adapter("second", SensiConfig(calibration=calibration, priming_steps=2, task_type="SEQ_CLS", **TRIM))
    assert model.peft_config == {"default": config} and model.active_adapter == "default"
    assert_same_tensors(snapshot(model), tensors)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert torch.equal(logits(model), before)


# The first cannot be attributes. PEFT would take the others for parts of tensors' names.
NO_NAMES = ["half", "keys", "a.b", "", "weight", "dense", "classifier", "LayerNorm", "model", "base_model",
            "base_layer", "modules_to_save", "_extra_state", "sensi_weight"]  # fmt: skip


@pytest.mark.parametrize("name", NO_NAMES)
def test_names_that_modules_cannot_hold_are_refused_before_anything_changes(name):
    base = tiny_model()
    with pytest.raises(SensiError, match="cannot be called"):
        get_peft_model(base, SensiConfig(task_type="SEQ_CLS", **TRIM), adapter_name=name)
    assert_is_base(base, tiny_model())
    model = trained(**TRIM)
    before = logits(model)
    with pytest.raises(SensiError, match="cannot be called"):
        model.add_adapter(name, SensiConfig(task_type="SEQ_CLS", **TRIM))
    assert list(model.peft_config) == ["default"] and torch.equal(logits(model), before)


@pytest.mark.parametrize("name", ["query", "0", "encoder", "bert"])
def test_an_adapter_that_is_called_like_a_module_must_be_alone(name, tmp_path):
    model = get_peft_model(tiny_model(), SensiConfig(task_type="SEQ_CLS", **TRIM), adapter_name=name)
    train(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path / name)), logits(model))
    for first, second in ((model, "other"), (trained(**TRIM), name)):
        with pytest.raises(SensiError, match=f"{name!r} here, because it is a part of the name"):
            first.add_adapter(second, SensiConfig(task_type="SEQ_CLS", **TRIM))


@pytest.mark.parametrize("when", ["first layer", "fifth layer", "before the head", "after the head"])
def test_an_error_while_modules_are_replaced_is_rolled_back(when, monkeypatch):
    base = tiny_model()
    base.bert.embeddings.requires_grad_(False)
    flags = [p.requires_grad for p in base.parameters()]
    calls = []
    update, add_head = SensiLayer.update_layer, tuners_utils.set_additional_trainable_modules

    def failing_layer(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == {"first layer": 1, "fifth layer": 5}.get(when):
            raise RuntimeError("boom")
        return update(self, *args, **kwargs)

    def failing_head(*args, **kwargs):
        if when == "after the head":
            add_head(*args, **kwargs)
        raise RuntimeError("boom")

    monkeypatch.setattr(SensiLayer, "update_layer", failing_layer)
    monkeypatch.setattr(tuners_utils, "set_additional_trainable_modules", failing_head)
    with pytest.raises(RuntimeError, match="boom"):
        wrap(base, **TRIM)
    monkeypatch.undo()
    assert_is_base(base, tiny_model())
    assert [p.requires_grad for p in base.parameters()] == flags
    train(wrap(base, **TRIM))


# -- saving and loading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_trainable": True},
        {"low_cpu_mem_usage": True},
        {"adapter_name": "other"},
        {"autocast_adapter_dtype": False},
        {"is_trainable": True, "low_cpu_mem_usage": True, "adapter_name": "third"},
    ],
    ids=str,
)
def test_from_pretrained(saved, options):
    expected, folder = saved
    model = PeftModel.from_pretrained(tiny_model(), folder, **options)
    assert type(model) is PeftModelForSequenceClassification
    assert torch.equal(logits(model), expected)
    assert not any(p.is_meta for p in model.parameters())
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert bool(trainable) == options.get("is_trainable", False)
    if trainable:
        train(model)
        assert not torch.equal(logits(model), expected)


def test_training_goes_on_where_it_stopped(budget, tmp_path):
    model = trained(**budget)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True)
    names = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (model, again)]
    assert names[0] == names[1]
    for m in (model, again):
        train(m)
    assert torch.equal(logits(model), logits(again))


def test_loading_needs_no_calibration_data_and_no_warning(saved):
    _, folder = saved
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PeftModel.from_pretrained(tiny_model(), folder)


def test_files_of_an_adapter(saved):
    _, folder = saved
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "SENSI" and config["format_version"] == 1
    assert not {"calibration", "scores", "loss_fn"} & set(config)
    assert not list(folder.glob("*.bin")) and not list(folder.glob("*.pt"))
    trained_values = {n: t for n, t in tensors.items() if t.dtype == torch.float32}
    assert set(tensors) - set(trained_values) == {"base_model.model.sensi_plan"}
    assert not any("base_layer" in n for n in tensors)


def test_the_config_survives_json(saved, tmp_path):
    _, folder = saved
    config = PeftConfig.from_pretrained(folder)
    assert type(config) is SensiConfig and config.inference_mode
    config.save_pretrained(tmp_path / "copy")
    again = SensiConfig.from_pretrained(tmp_path / "copy")
    assert again == config
    first, second = (json.loads((d / "adapter_config.json").read_text()) for d in (folder, tmp_path / "copy"))
    for values in (first, second):
        values["target_modules"].sort()  # a set in memory
    assert first == second


FIELDS = {
    "budget": {"params": 0.5, "trainable": 1000}, "score": "taylor", "target_modules": ["query"],
    "exclude_modules": ["key"], "modules_to_save": ["pooler"], "also_train": ["biases", "norms"],
    "calibration_steps": 3, "priming_steps": 0,
    "priming_lr": 0.5, "priming_optimizer": "sign",
    "refit": False, "sequence_length": 17, "multiple_of": 4, "min_units": 0, "keep_base": False,
    "seed": 5, "blocks": [{"layer": "blocks.*", "up": "first", "down": "second"}], "task_type": "SEQ_CLS",
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_survives_json(name, tmp_path):
    config = SensiConfig(**{name: FIELDS[name]})
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    value = getattr(again, name)
    assert (sorted(value) if isinstance(value, set) else value) == FIELDS[name]
    assert getattr(again, name) == getattr(config, name)


def test_every_field_has_a_default():
    assert SensiConfig().budget is None and SensiConfig().keep_base


WRONG_FIELDS = [
    ("calibration_steps", 0), ("calibration_steps", 1.5), ("priming_steps", -1), ("priming_steps", True),
    ("priming_lr", 0), ("priming_lr", float("nan")), ("priming_lr", "fast"), ("priming_optimizer", "sgd"),
    ("sequence_length", 0),
    ("multiple_of", 0), ("multiple_of", "8"), ("min_units", -1), ("seed", None), ("keep_base", 1),
    ("init_weights", "no"), ("refit", "yes"), ("also_train", "norms"), ("also_train", ["norm"]), ("blocks", []),
    ("blocks", "bert"), ("blocks", [5]), ("plan", "none"), ("plan", [1]), ("scores", {}), ("budget", {"param": 0.5}),
    ("score", "fischer"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG_FIELDS, ids=str)
def test_malformed_fields_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match="score" if name == "scores" else "plan|Plan" if name == "plan" else name[:6]):
        SensiConfig(**{name: value})


def test_a_loss_function_without_data_has_no_effect_and_is_refused():
    with pytest.raises(SensiError, match="loss_fn"):
        SensiConfig(loss_fn=lambda model, batch: 0)


@pytest.mark.parametrize("unused", ["calibration", "scores"])
def test_data_beside_a_finished_plan_has_no_effect_and_is_refused(unused):
    plan = wrap(tiny_model(), budget=0.5).plan()
    data = {"calibration": tiny_batches(1), "scores": Scores({}, "own")}[unused]
    with pytest.raises(SensiError, match="`plan` is finished"):
        SensiConfig(plan=plan, **{unused: data})


@pytest.mark.parametrize("options", [{"update": "low_rank", "rank": 4}, {"also_train": ["norms"]}, {}], ids=str)
def test_a_plan_from_elsewhere_counts_what_is_trained_here(options, tmp_path):
    """`make_plan` does not know what another config trains beside the units."""
    base = tiny_model()
    anatomy = build_anatomy(base)
    scores = compute_scores(base, score="magnitude", progress=False)
    chosen = make_plan(anatomy, scores, 0.8, tunes="update" not in options)
    model = wrap(base, plan=chosen, **options)
    assert model.plan() == chosen

    def counts() -> tuple[int, int]:
        head = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "classifier" in n)
        return model.plan().trainable_params, sum(p.numel() for p in model.parameters() if p.requires_grad) - head

    assert counts()[0] == counts()[1] > 0
    model.trim(0.4, tiny_batches(4))
    assert counts()[0] == counts()[1] > 0
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(logits(again), logits(model.eval()))


@pytest.mark.parametrize(
    "fields",
    [
        {"budget": Budget(params=0.5)},
        {"budget": UserDict(params=0.5)},
        {"budget": MappingProxyType({"params": 0.5})},
        {"budget": 0.5, "target_modules": frozenset(["query", "key", "value", "intermediate.dense"])},
        {"budget": 0.5, "exclude_modules": ("query",)},
        {"budget": 0.5, "schedule": UserDict(phase="cut", start=0.1, end=0.1, cuts=1)},
    ],
    ids=["Budget", "UserDict", "MappingProxyType", "frozenset", "tuple", "schedule"],
)
def test_whatever_a_config_accepts_can_be_saved_and_loaded(fields, tmp_path):
    if "schedule" not in fields:
        fields = {**fields, "score": "magnitude"}
    model = wrap(tiny_model(), **fields)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(logits(again.eval()), logits(model.eval()))


def test_a_merge_and_then_an_unload_gives_a_model_that_can_be_saved(tmp_path):
    model = wrap(tiny_model(), budget=0.5)
    expected = logits(model.eval())
    model.merge_adapter()
    small = model.unload()
    small.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load_merged(tmp_path)), expected)


def test_a_merge_before_the_cuts_are_finished_warns():
    model = wrap(tiny_model(), budget=0.5, schedule={"phase": "cut", "start": 0.5, "end": 0.5, "cuts": 1})
    with pytest.warns(UserWarning, match="cuts of the adapter 'default' are not finished"):
        model.merge_and_unload()


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
def test_a_task_that_the_model_cannot_do_is_refused_before_anything_is_scored(task_type):
    base = tiny_model()
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(SensiError, match=f"`task_type` is '{task_type}'.*generates no text"):
        get_peft_model(base, SensiConfig(budget=0.5, task_type=task_type, calibration=iter([])))
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())


def edit_config(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(values))


def test_an_unknown_key_in_a_file_warns(saved):
    expected, folder = saved
    edit_config(folder, invented_later=1)
    with pytest.warns(UserWarning, match="invented_later"):
        model = PeftModel.from_pretrained(tiny_model(), folder)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("version", [2, 999, "2", None, True, 0])
def test_another_format_version_is_an_error(saved, version):
    _, folder = saved
    edit_config(folder, format_version=version)
    with pytest.raises(SensiLoadError, match="format_version"):
        PeftModel.from_pretrained(tiny_model(), folder)


@pytest.mark.parametrize("key", ["calibration", "scores", "loss_fn"])
def test_what_exists_at_run_time_only_is_refused_in_a_file(saved, key):
    _, folder = saved
    edit_config(folder, **{key: None})
    with pytest.raises(SensiLoadError, match=key):
        PeftModel.from_pretrained(tiny_model(), folder)


OTHER_BASES = {
    "other weights": {"seed": 1},
    "wider": {"intermediate_size": 128},
    "deeper": {"num_hidden_layers": 3},
    "shallower": {"num_hidden_layers": 1},
    "more heads": {"num_attention_heads": 8},
}


@pytest.mark.parametrize("name", OTHER_BASES)
def test_the_wrong_base_is_refused(saved, name):
    _, folder = saved
    base = tiny_model(**OTHER_BASES[name])
    with pytest.raises(SensiLoadError, match="base model"):
        PeftModel.from_pretrained(base, folder)
    assert_is_base(base, tiny_model(**OTHER_BASES[name]))


def test_another_family_is_refused(saved):
    _, folder = saved
    for family in ("distilbert", "roberta"):
        with pytest.raises(ValueError):
            PeftModel.from_pretrained(tiny_model(family), folder)


def test_the_check_of_the_base_can_be_switched_off(saved):
    _, folder = saved
    config = PeftConfig.from_pretrained(folder)
    config.fingerprint = None
    model = PeftModel.from_pretrained(tiny_model(seed=1), folder, config=config)
    assert logits(model).shape == (4, 3)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), folder)), saved[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_same_base_in_another_precision_passes(saved, dtype):
    expected, folder = saved
    model = PeftModel.from_pretrained(tiny_model(dtype=dtype), folder)
    torch.testing.assert_close(logits(model).float(), expected, atol=0.2, rtol=0.2)


@pytest.mark.parametrize("layers", [6, 7, 12])
def test_a_copy_that_differs_in_one_kind_of_linears_is_refused(layers, tmp_path):
    """So does a base into which LoRA was merged. The fingerprint is of up to 64 Linears."""
    shape = {"num_hidden_layers": layers, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    wrap(tiny_model(**shape), budget={"params": 0.9}).save_pretrained(tmp_path)
    PeftModel.from_pretrained(tiny_model(**shape), tmp_path)
    for kind in ("query", "value", "attention.output", "intermediate"):
        base = tiny_model(**shape)
        for name, p in base.named_parameters():
            if f"{kind}." in name and p.dim() == 2:
                p.data += 0.1 * p.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
        with pytest.raises(SensiLoadError, match="fine-tuned copy"):
            PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.parametrize("part", ["LayerNorm.weight", "LayerNorm.bias", "query.bias", "intermediate.dense.bias"])
def test_a_copy_that_differs_in_norms_or_biases_is_refused(saved, part):
    base = tiny_model()
    with torch.no_grad():
        for name, p in base.named_parameters():
            if name.endswith(part):
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * 0.05)
    with pytest.raises(SensiLoadError, match="fine-tuned copy"):
        PeftModel.from_pretrained(base, saved[1])
    config = PeftConfig.from_pretrained(saved[1])
    del config.fingerprint["vectors"]  # as in files of earlier versions
    PeftModel.from_pretrained(base, saved[1], config=config)


def test_a_copy_of_which_only_some_tokens_were_trained_is_refused(saved):
    """All rows of the embedding have an influence, except the last eighth, where users add tokens."""

    def changed(rows, size=VOCABULARY):
        base = tiny_model()
        base.resize_token_embeddings(size, mean_resizing=False)
        with torch.no_grad():
            weight = base.get_input_embeddings().weight
            weight[rows] += 0.1 * weight.std() * torch.randn(weight[rows].shape)
        return base

    for size in (VOCABULARY, 72, 59):  # other numbers of tokens, and other values of those that the base did not have
        PeftModel.from_pretrained(changed(slice(56, None), size), saved[1])
        for rows in (slice(5, 6), slice(40, 50)):
            with pytest.raises(SensiLoadError, match="fine-tuned copy"):
                PeftModel.from_pretrained(changed(rows, size), saved[1])
    config = PeftConfig.from_pretrained(saved[1])
    ranges = {name: mark for name, mark in config.fingerprint["vectors"].items() if name.endswith("]")}
    assert len(ranges) == 14
    for name in ranges:  # as in files of earlier versions
        del config.fingerprint["vectors"][name]
    PeftModel.from_pretrained(changed(slice(5, 6)), saved[1], config=config)


@pytest.mark.parametrize(("part", "size"), [("", 0.01), ("layer.1.", 0.03)], ids=["all", "the last layer"])
def test_a_fine_tuned_copy_of_the_base_is_refused(saved, part, size):
    """Fine-tuning changes weights by about a hundredth of their size, or only some of them by more."""
    base = tiny_model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in base.named_parameters():
            if part in name and p.dim() == 2:
                p.add_(torch.randn(p.shape, generator=generator) * p.std() * size)
    with pytest.raises(SensiLoadError, match="fine-tuned copy"):
        PeftModel.from_pretrained(base, saved[1])
    # If the adapter was made on a quantized copy, the weights are too inexact to tell.
    config = PeftConfig.from_pretrained(saved[1])
    config.fingerprint["quantized"] = True
    PeftModel.from_pretrained(base, saved[1], config=config)


def test_values_are_float32_on_a_16_bit_base_whatever_is_asked(saved):
    with pytest.warns(UserWarning, match="`autocast_adapter_dtype=False` has no effect"):
        model = PeftModel.from_pretrained(tiny_model(dtype=torch.bfloat16), saved[1], autocast_adapter_dtype=False)
    assert {p.dtype for n, p in model.named_parameters() if ".sensi_" in n} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_reloaded_exactly(budget, dtype, tmp_path):
    model = wrap(tiny_model(dtype=dtype), init_weights=False, **budget)
    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}):
        again = PeftModel.from_pretrained(tiny_model(dtype=dtype), tmp_path, **options)
        assert torch.equal(logits(again), logits(model))
        sensi = [p for n, p in again.named_parameters() if ".sensi_" in n]
        assert all(p.dtype == torch.float32 and p.requires_grad == bool(options.get("is_trainable")) for p in sensi)


def spoil(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load(path.read_bytes())
    change(tensors)
    save_file(tensors, path)


def first(tensors: dict, part: str = "sensi_weight") -> str:
    return next(n for n in sorted(tensors) if n.endswith(part))


BROKEN = {
    "missing": (lambda t: t.pop(first(t)), "lacks"),
    "surplus": (lambda t: t.update({"base_model.model.bert.pooler.dense.sensi_weight": torch.ones(1)}), "pooler"),
    "shape": (lambda t: t.update({first(t): t[first(t)][:-1].contiguous()}), "shape"),
    "nan": (lambda t: t[first(t)].view(-1)[0].fill_(float("nan")), "NaN"),
    "infinity": (lambda t: t[first(t)].view(-1)[0].fill_(float("inf")), "infinity"),
    "whole numbers": (lambda t: t.update({first(t): t[first(t)].int()}), "dtype"),
    "no plan": (lambda t: t.pop("base_model.model.sensi_plan"), "sensi_plan"),
    "garbage for a plan": (lambda t: t["base_model.model.sensi_plan"].fill_(7), "sensi_plan|JSON"),
    "a plan of floats": (lambda t: t.update({"base_model.model.sensi_plan": torch.ones(3)}), "bytes"),
    "no bias": (lambda t: t.pop(first(t, "sensi_bias")), "lacks"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused(saved, name):
    change, message = BROKEN[name]
    spoil(saved[1], change)
    with pytest.raises(SensiLoadError, match=message):
        PeftModel.from_pretrained(tiny_model(), saved[1])


@pytest.mark.parametrize("options", [{}, {"is_trainable": True}], ids=str)
def test_a_file_does_not_overwrite_the_base(saved, options):
    """PEFT would load a tensor with a name of the base's into the base."""
    name = "bert.encoder.layer.0.attention.self.query.base_layer.weight"
    spoil(saved[1], lambda t: t.update({f"base_model.model.{name}": torch.zeros(32, 32)}))
    base = tiny_model()
    with pytest.raises(SensiLoadError, match="query.base_layer.weight"):
        PeftModel.from_pretrained(base, saved[1], **options)
    assert all(p.any() for p in base.parameters() if p.dim() == 2)


def test_resized_embeddings_are_saved_and_loaded(budget, base_folder, tmp_path):
    base = AutoModelForSequenceClassification.from_pretrained(base_folder)
    base.resize_token_embeddings(70, mean_resizing=False)
    model = wrap(base, **budget)
    train(model)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    other = AutoModelForSequenceClassification.from_pretrained(base_folder)
    other.resize_token_embeddings(70, mean_resizing=False)
    batch = {"input_ids": torch.tensor([[5, 69, 68]])}
    assert torch.equal(logits(PeftModel.from_pretrained(other, tmp_path / "adapter"), batch), logits(model, batch))


def test_a_base_with_another_number_of_labels_is_refused(saved):
    """A base loaded without `num_labels` has two."""
    base = tiny_model()
    base.classifier, base.num_labels = nn.Linear(32, 2), 2
    with pytest.raises(SensiLoadError, match=r"'classifier.bias' has shape \(3,\), expected \(2,\).*`num_labels`"):
        PeftModel.from_pretrained(base, saved[1])


def test_a_file_that_lacks_the_head_is_refused(saved):
    spoil(saved[1], lambda t: [t.pop(n) for n in list(t) if "classifier" in n])
    with pytest.raises((SensiLoadError, KeyError), match="classifier"):
        PeftModel.from_pretrained(tiny_model(), saved[1])


@pytest.mark.parametrize(("of_config", "of_weights"), [(TRIM, TUNE), (TUNE, TRIM), (TRIM, {"budget": 0.3})])
def test_files_of_two_adapters_do_not_go_together(of_config, of_weights, tmp_path):
    for name, options in (("config", of_config), ("weights", of_weights)):
        trained(**options).save_pretrained(tmp_path / name)
    (tmp_path / "config" / "adapter_model.safetensors").write_bytes(
        (tmp_path / "weights" / "adapter_model.safetensors").read_bytes()
    )
    # PEFT itself stumbles first where one saves modules whole that the other does not.
    with pytest.raises((SensiLoadError, KeyError), match="do not belong together|LayerNorm"):
        PeftModel.from_pretrained(tiny_model(), tmp_path / "config")


def test_auto_class_for_sequence_classification(saved, base_folder):
    expected, folder = saved
    edit_config(folder, base_model_name_or_path=str(base_folder))
    model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert torch.equal(logits(model), expected)


def test_auto_class_without_a_task(budget, base_folder, tmp_path):
    base = AutoModelForSequenceClassification.from_pretrained(base_folder)
    model = wrap(base, task_type=None, **budget)
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModel.from_pretrained(tmp_path / "adapter", num_labels=3)
    assert torch.equal(logits(again), logits(model))


def test_save_and_reload_under_another_name(saved, tmp_path):
    expected, folder = saved
    model = PeftModel.from_pretrained(tiny_model(), folder, adapter_name="other")
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path / "again" / "other")), expected)


def test_load_adapter_beside_another(saved):
    expected, folder = saved
    model = trained(adapter_name="first", **TUNE)
    own = logits(model)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    model.load_adapter(folder, adapter_name="loaded")
    assert torch.equal(logits(model), own)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable
    model.set_adapter("loaded")
    assert torch.equal(logits(model), expected)
    model.set_adapter("first")
    assert torch.equal(logits(model), own)


# -- the base underneath ----------------------------------------------------------------------------------------------


def test_disable_adapter_is_the_base_bit_by_bit(family, budget):
    model = trained(family, **budget)
    before = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_model(family)))
        assert attributes(model.base_model.model) == attributes(tiny_model(family))
    assert torch.equal(logits(model), before)
    model.base_model.disable_adapter_layers()
    assert torch.equal(logits(model), logits(tiny_model(family)))
    model.base_model.enable_adapter_layers()
    assert torch.equal(logits(model), before)
    train(model)
    assert not torch.equal(logits(model), before)


def test_unload_gives_the_untouched_base(family, budget):
    assert_is_base(trained(family, **budget).unload(), tiny_model(family))


def test_unload_after_disabling_and_after_merging_and_unmerging():
    model = trained(**TRIM)
    with model.disable_adapter():
        pass
    model.merge_adapter()
    model.unmerge_adapter()
    assert_is_base(model.unload(), tiny_model())


def test_merge_and_unmerge(family, budget):
    model = trained(family, **budget)
    before, tensors = logits(model), snapshot(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)
    assert_same_tensors(snapshot(model), tensors)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


@pytest.mark.parametrize("how", ["merge_and_unload", "unload"])
def test_an_adapter_that_is_gone_is_neither_saved_nor_loaded(how, saved, tmp_path):
    """PEFT would save a file without values, and say nothing."""
    expected, folder = saved
    model = PeftModel.from_pretrained(tiny_model(), folder)
    model.save_pretrained(tmp_path)
    getattr(model, how)()
    with pytest.raises(SensiError, match="was merged or unloaded. Save an adapter before that"):
        model.save_pretrained(tmp_path)
    with pytest.raises(SensiError, match="load one on a fresh base"):
        model.load_adapter(str(folder), "default")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), expected)


def test_training_a_merged_adapter_warns():
    model = trained(**TRIM)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="is merged into the base.*`unmerge_adapter"):
        model.train()(**tiny_batches(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        logits(model)
        model.unmerge_adapter()
        model.train()(**tiny_batches(1)[0])


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload", "set_requires_grad"])
def test_an_adapter_that_does_not_exist_is_an_error(call):
    """For LoRA, PEFT does nothing and does not say so."""
    model = trained(**TRIM)
    expected = logits(model)
    for owner in (model, model.base_model):
        with pytest.raises(SensiError, match="There is no adapter 'nope'"):
            getattr(owner, call)(adapter_names=["nope"])
        assert torch.equal(logits(model), expected)


def test_disabling_a_merged_adapter_unmerges_it():
    model = trained(**TRIM)
    before = logits(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_model()))
    assert torch.equal(logits(model), before)


def test_merge_and_unload_gives_a_plain_smaller_model(family, budget):
    model = trained(family, **budget)
    before, plan = logits(model), model.base_model.plan()
    merged = model.merge_and_unload()
    assert type(merged) is type(tiny_model(family)) and is_plain(merged)
    torch.testing.assert_close(logits(merged), before, atol=1e-5, rtol=1e-5)
    base = tiny_model(family)
    removed = plan.anatomy.prunable_params - plan.kept_params
    assert sum(p.numel() for p in merged.parameters()) == sum(p.numel() for p in base.parameters()) - removed
    found = attributes(merged)
    assert found.keys() == attributes(base).keys() and found
    for group in plan.anatomy.groups:
        kept = int((plan.of(group) > 0).sum())
        for path, per_unit in group.attributes:
            assert found[path] == kept * per_unit
        for side in group.sides:
            linear = merged.get_submodule(side.module)
            assert type(linear) is nn.Linear
            assert (linear.out_features, linear.in_features) == linear.weight.shape
            assert linear.weight.shape[side.dim] == kept * side.width
            assert linear.bias is None or linear.bias.shape == (linear.out_features,)
    assert not hasattr(merged, "peft_config")
    merged.requires_grad_(True)
    merged(**tiny_batches(1)[0]).loss.backward()


def test_a_merged_model_keeps_the_order_of_the_base():
    """Rows of the merged weights are the base's own, in ascending order: nobody needs the permutation."""
    model = wrap(tiny_model(), also_train=[], **BOTH)
    plan, base = model.base_model.plan(), tiny_model()
    merged = model.merge_and_unload()
    for group in plan.anatomy.groups:
        units = (plan.of(group) > 0).nonzero()[0]
        for side in group.sides:
            index = torch.from_numpy(side.positions(units))
            expected = base.get_submodule(side.module).weight.index_select(side.dim, index)
            assert torch.equal(merged.get_submodule(side.module).weight, expected)


def test_safe_merge_refuses_nan():
    model = trained(**TRIM)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if ".sensi_weight" in n).view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match="NaNs"):
        model.merge_and_unload(safe_merge=True)
    assert torch.isfinite(logits(trained(**TRIM).merge_and_unload(safe_merge=True))).all()


def test_the_merged_model_can_be_wrapped_again():
    merged = trained(**TRIM).merge_and_unload()
    again = wrap(merged, budget=0.5)
    train(again)
    assert again.base_model.plan().params_share <= 0.5
    assert logits(again).shape == (4, 3)


# -- several adapters -------------------------------------------------------------------------------------------------


def two_adapters(first=TRIM, second=BOTH) -> PeftModel:
    model = trained(adapter_name="first", **first)
    model.add_adapter("second", SensiConfig(score="magnitude", task_type="SEQ_CLS", multiple_of=1, **second))
    model.set_adapter("second")
    train(model)
    return model


@pytest.mark.parametrize(
    ("one", "two"), [(TRIM, BOTH), (TUNE, TRIM), (TRIM, {"budget": 0.3}), (TUNE, {"budget": 1.0})]
)
def test_two_adapters_with_different_plans(one, two, tmp_path):
    model = two_adapters(one, two)
    assert model.base_model.plan("first") != model.base_model.plan("second")
    outputs = {}
    for name in ("first", "second"):
        model.set_adapter(name)
        outputs[name] = logits(model)
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trainable and all(f".{name}" in n for n in trainable)
    assert not torch.equal(outputs["first"], outputs["second"])
    for name in ("second", "first", "second"):
        model.set_adapter(name)
        assert torch.equal(logits(model), outputs[name])
        plan = model.base_model.plan(name)
        heads = {p: v for g in plan.anatomy.groups for p, v in [(g.attributes or ((None, 0),))[0]] if p}
        found = attributes(model.base_model.model)
        for group in plan.anatomy.groups:
            for path, per_unit in group.attributes:
                assert found[path] == int((plan.of(group) > 0).sum()) * per_unit
        assert heads
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_model()))
    model.save_pretrained(tmp_path)
    for name in outputs:
        alone = PeftModel.from_pretrained(tiny_model(), tmp_path / name)
        assert torch.equal(logits(alone), outputs[name])
    assert_is_base(model.unload(), tiny_model())


def test_a_second_adapter_is_scored_on_the_base():
    """What the first adapter makes of the model has no part in the second's plan."""
    options = {"score": "fisher", "calibration": tiny_batches(), "priming_steps": 3, "task_type": "SEQ_CLS", **TRIM}
    model = trained(adapter_name="first", **TUNE)
    torch.manual_seed(5)
    model.add_adapter("second", SensiConfig(**options))
    torch.manual_seed(5)
    alone = get_peft_model(tiny_model(), SensiConfig(**options))
    assert model.base_model.plan("second") == alone.base_model.plan()
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(alone))


def test_adding_an_adapter_leaves_the_others_flags_alone(saved):
    _, folder = saved
    model = PeftModel.from_pretrained(tiny_model(), folder, adapter_name="first")
    model.add_adapter("second", SensiConfig(score="magnitude", task_type="SEQ_CLS", **TUNE))
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".first" in n)


def test_merge_the_chosen_adapter():
    for name in ("first", "second"):
        model = two_adapters()
        model.set_adapter(name)
        expected = logits(model)
        merged = model.merge_and_unload()
        assert is_plain(merged)
        torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)


def test_delete_adapter():
    model = two_adapters()
    model.set_adapter("first")
    first_logits = logits(model)
    model.delete_adapter("second")
    assert list(model.peft_config) == ["first"]
    assert not any(".second" in n for n in model.state_dict())
    assert torch.equal(logits(model), first_logits)


def test_delete_the_active_adapter():
    model = two_adapters()
    model.set_adapter("first")
    first_logits = logits(model)
    model.set_adapter("second")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that another one is active now
        model.delete_adapter("second")
    assert model.active_adapters == ["first"]
    assert torch.equal(logits(model), first_logits)
    model.delete_adapter("first")
    inner = model.base_model.model  # `PeftModel.forward` of PEFT needs an active adapter
    assert torch.equal(logits(inner), logits(tiny_model()))
    assert attributes(inner) == attributes(tiny_model())


@pytest.mark.parametrize("how", ["active", "merged", "merged one by one", "unloaded"])
def test_adapters_that_trim_nothing_add_up(how):
    options = {"task_type": "FEATURE_EXTRACTION", "also_train": [], **TUNE}
    model = wrap(tiny_model(task="FEATURE_EXTRACTION"), "first", **options)
    model.add_adapter("second", SensiConfig(score="random", **options))
    expected = tiny_model(task="FEATURE_EXTRACTION")
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, SensiLayer):
            linear = expected.get_submodule(name)
            for adapter, step in (("first", 0.1), ("second", -0.2)):
                if adapter in layer.sensi_weight:
                    slice_ = layer.sensi_slices[adapter]
                    with torch.no_grad():
                        layer.sensi_weight[adapter].add_(step)
                        moved = torch.zeros_like(linear.weight)
                        linear.weight.add_(moved.index_fill(slice_.dim, slice_.tuned_positions, step))
    batch = tiny_batches(1, labels=False)[0]
    model.base_model.set_adapter(["first", "second"])
    if how == "merged":
        model.merge_adapter()
    elif how == "merged one by one":
        model.merge_adapter(["second"])
        model.merge_adapter(["first"])
    elif how == "unloaded":
        model = model.merge_and_unload()
    with torch.no_grad():
        found, right = (m.eval()(**batch).last_hidden_state for m in (model, expected))
    torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)


def test_several_active_adapters_of_which_one_trims_are_refused():
    model = two_adapters()
    before = logits(model)
    with pytest.raises(SensiError, match="cannot be active or merged together"):
        model.base_model.set_adapter(["first", "second"])
    with pytest.raises(SensiError, match="cannot be active or merged together"):
        model.merge_and_unload(adapter_names=["first", "second"])
    assert torch.equal(logits(model), before)


def test_adapter_names_in_forward_are_refused():
    model = two_adapters()
    with pytest.raises(SensiError, match="adapter_names"):
        model(**tiny_batches(1)[0], adapter_names=["first"] * 4)


# -- without PeftModel ------------------------------------------------------------------------------------------------


def test_inject_adapter_in_model(budget):
    config = SensiConfig(score="magnitude", task_type="SEQ_CLS", **budget)
    model = inject_adapter_in_model(config, tiny_model())
    assert type(model) is BertForSequenceClassification
    train(model)
    state = get_peft_model_state_dict(model)
    fresh = inject_adapter_in_model(config, tiny_model())
    result = set_peft_model_state_dict(fresh, state)
    assert not result.unexpected_keys
    assert torch.equal(logits(fresh), logits(model))
    wrapped = wrap(tiny_model(), **budget)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == wrapped.get_nb_trainable_parameters()[0]


def test_add_adapter_of_transformers(budget):
    model = tiny_model()
    model.add_adapter(SensiConfig(score="magnitude", task_type="SEQ_CLS", **budget), adapter_name="mine")
    train(model)
    before = logits(model)
    assert model.active_adapters() == ["mine"]
    model.disable_adapters()
    assert torch.equal(logits(model), logits(tiny_model()))
    assert attributes(model) == attributes(tiny_model())
    model.enable_adapters()
    assert torch.equal(logits(model), before)
    # Of the same kind: Transformers' `set_adapter` wants every module that is saved whole to have all adapters.
    model.add_adapter(SensiConfig(score="random", task_type="SEQ_CLS", **budget), adapter_name="other")
    assert model.active_adapters() == ["other"]
    model.set_adapter("mine")
    assert torch.equal(logits(model), before)
    model.delete_adapter("other")
    assert torch.equal(logits(model), before)
    model.delete_adapter("mine")
    assert torch.equal(logits(model), logits(tiny_model()))
    assert attributes(model) == attributes(tiny_model())


@pytest.mark.parametrize("order", [("trim", "tune"), ("tune", "trim")])
def test_adapters_that_train_other_parts_in_transformers(order):
    """Only one of them saves norms and the pooler whole, and Transformers activates both in every such module."""
    model, expected, trained_parts = tiny_model(), {}, {}
    for name in order:
        model.add_adapter(SensiConfig(score="magnitude", task_type="SEQ_CLS", **BUDGETS[name]), name)
        model.set_adapter(name)
        train(model)
        expected[name] = logits(model)
        trained_parts[name] = {n for n, p in model.named_parameters() if p.requires_grad}
    for name in order:
        model.set_adapter(name)
        assert torch.equal(logits(model), expected[name])
        assert {n for n, p in model.named_parameters() if p.requires_grad} == trained_parts[name]
    assert any("pooler" in n for n in trained_parts["trim"]) and not any("pooler" in n for n in trained_parts["tune"])
    model.disable_adapters()
    assert torch.equal(logits(model), logits(tiny_model()))
    model.enable_adapters()
    assert torch.equal(logits(model), expected[order[-1]])


@pytest.mark.parametrize(
    "options", [{}, {"low_cpu_mem_usage": True}, {"is_trainable": True}, {"adapter_name": "other"}], ids=str
)
def test_load_adapter_of_transformers(saved, options):
    expected, folder = saved
    model = tiny_model()
    model.load_adapter(str(folder), **options)
    assert torch.equal(logits(model), expected)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert bool(trainable) == bool(options.get("is_trainable"))


def test_load_adapter_of_transformers_for_other_methods_is_as_without_this_package(tmp_path):
    get_peft_model(tiny_model(), LoraConfig(task_type="SEQ_CLS")).save_pretrained(tmp_path)
    found = []
    for call in (PreTrainedModel.load_adapter, PreTrainedModel.load_adapter.__wrapped__):
        model = tiny_model()
        call(model, str(tmp_path))
        found.append({name for name, parameter in model.named_parameters() if parameter.requires_grad})
    assert found[0] == found[1]


def test_save_pretrained_and_from_pretrained_of_transformers(budget, base_folder, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(base_folder)
    model.add_adapter(SensiConfig(score="magnitude", task_type="SEQ_CLS", **budget))
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    names = {p.name for p in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names and "model.safetensors" not in names
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3)
    assert torch.equal(logits(again), logits(model))
    # The other library reads the same folder.
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")), logits(model))


@pytest.mark.parametrize("fields", [TRIM, TUNE, {"update": "low_rank", "rank": 2}], ids=["trim", "tune", "low rank"])
def test_a_base_model_loads_an_adapter_that_was_made_with_a_head(fields, base_folder, tmp_path):
    """As `AutoModel` does for LoRA: `pipeline("feature-extraction", model=folder)` and others load classifiers so."""
    model = wrap(AutoModelForSequenceClassification.from_pretrained(base_folder), score="random", **fields)
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    batch = tiny_batches(1, labels=False)[0]

    @torch.no_grad()
    def states(found):
        return found.eval()(**batch).last_hidden_state

    expected = states(model.base_model.model.bert)
    inner = AutoModel.from_pretrained(tmp_path / "adapter")
    assert type(inner) is BertModel and torch.equal(states(inner), expected)
    inner.save_pretrained(tmp_path / "again")
    assert torch.equal(states(AutoModel.from_pretrained(tmp_path / "again")), expected)
    assert torch.equal(states(PeftModel.from_pretrained(tiny_model().bert, tmp_path / "again")), expected)

    base = tiny_model().bert
    with pytest.raises(SensiLoadError, match=r"load the adapter on the model with the head, and use its `bert`"):
        PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert is_plain(base)
    other = tiny_model(seed=1).bert
    with pytest.raises(SensiLoadError, match="another base model"):
        other.load_adapter(str(tmp_path / "adapter"))
    assert is_plain(other)


def test_the_wrong_base_is_refused_by_transformers_too(saved):
    base = tiny_model(seed=1)
    with pytest.raises(SensiLoadError, match="base model"):
        base.load_adapter(str(saved[1]))
    assert is_plain(base)


@pytest.mark.parametrize("fault", ["missing", "nan"])
@pytest.mark.parametrize("part", ["sensi_weight", "sensi_bias", "sensi_up", "sensi_values", "classifier.weight"])
@pytest.mark.parametrize("how", ["folder", "tensors"])
def test_damaged_values_are_refused_at_first_use_in_transformers(part, fault, how, saved_adapter):
    """Its `load_adapter` calls no hook, and leaves what a file lacks as it was."""
    options = {"sensi_up": {"update": "low_rank", "rank": 2}, "sensi_values": {"update": "sparse", "sparse": 5}}
    _, folder = saved_adapter(**options.get(part, {"budget": 0.5}))

    def damage(tensors: dict) -> None:
        name = next(name for name in tensors if name.endswith(part))
        if fault == "missing":
            del tensors[name]
        else:
            tensors[name].fill_(float("nan"))

    config = PeftConfig.from_pretrained(folder)
    spoil(folder, damage)
    tensors = load_file(folder / "adapter_model.safetensors")
    model = tiny_model()
    if how == "folder":
        with pytest.raises(SensiLoadError, match="lack|NaN"):
            model.load_adapter(str(folder))
        assert is_plain(model)
        load_from_subfolder(model, folder)
    else:
        model.load_adapter(peft_config=config, adapter_state_dict=tensors)
    for _ in range(2):  # it is refused again and again
        with pytest.raises(SensiLoadError, match="lack|NaN"):
            logits(model)


def test_a_loader_of_transformers_that_reads_nothing_is_refused(saved):
    """It only prints a report of names that it does not know."""
    config, tensors = PeftConfig.from_pretrained(saved[1]), load_file(saved[1] / "adapter_model.safetensors")
    base = tiny_model()
    before = logits(base)
    with pytest.raises(SensiLoadError, match=r"has read nothing.*`PeftModel.from_pretrained`"):
        base.load_adapter(peft_config=config, adapter_state_dict={f"unknown.{n}": t for n, t in tensors.items()})
    assert is_plain(base) and torch.equal(logits(base), before)


def test_a_second_adapter_of_transformers_is_active_as_a_whole(saved):
    """The task head and the norms too, not only the layers."""
    expected, folder = saved
    base = tiny_model()
    base.load_adapter(str(folder))
    base.load_adapter(str(folder), "second")
    assert base.active_adapters() == ["second"] and torch.equal(logits(base), expected)
    base.set_adapter("default")
    assert torch.equal(logits(base), expected)
    base.add_adapter(SensiConfig(budget=1.0, score="magnitude", task_type="SEQ_CLS", update="dense"), "third")
    wrappers = [module for module in base.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    assert all(w.active_adapters == ["third"] for w in wrappers if "third" in w.modules_to_save)
    assert all(p.requires_grad for n, p in base.named_parameters() if "modules_to_save.third" in n)


def test_transformers_reports_only_tensors_that_nothing_reads(saved, tmp_path):
    assert not tiny_model().load_adapter(str(saved[1])).unexpected_keys, "the plan is no surprise"
    folder = shutil.copytree(saved[1], tmp_path / "folder")
    spoil(folder, lambda tensors: tensors.update({"base_model.model.bert.stray.weight": torch.ones(1)}))
    base = tiny_model()
    with pytest.raises(SensiLoadError, match="stray"):
        base.load_adapter(str(folder))
    found = load_from_subfolder(base, folder)
    assert {key.removeprefix("base_model.model.") for key in found.unexpected_keys} == {"bert.stray.weight"}
    assert "_load_pretrained_model" not in vars(base), "the reader is the class's again"


def test_a_fresh_adapter_from_the_config_of_a_file(saved):
    config = PeftConfig.from_pretrained(saved[1])
    config.inference_mode = False
    model = get_peft_model(tiny_model(), config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model)
    assert model.base_model.plan().to_dict() == PeftConfig.from_pretrained(saved[1]).plan
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("default" in name for name in changed), "only values of the adapter"


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
def test_a_task_that_the_model_cannot_do(saved, task):
    config = json.loads((saved[1] / "adapter_config.json").read_text())
    (saved[1] / "adapter_config.json").write_text(json.dumps({**config, "task_type": task}))
    base = tiny_model()
    with pytest.raises(SensiLoadError, match="task_type"):
        PeftModel.from_pretrained(base, saved[1])
    assert_is_base(base, tiny_model())


# -- the rest of the ecosystem ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(budget, reentrant):
    plain, model = (trained(**budget) for _ in range(2))
    batch = tiny_batches(1)[0]
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    plain.train()
    for m in (plain, model):
        torch.manual_seed(3)
        m(**batch).loss.backward()
    assert model.base_model.model.is_gradient_checkpointing
    found, expected = ({n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in (model, plain))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-5)


def test_deepcopy(budget):
    model = trained(**budget)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    before = logits(model)
    train(twin)
    assert torch.equal(logits(model), before) and not torch.equal(logits(twin), before)
    with twin.disable_adapter():
        assert torch.equal(logits(twin), logits(tiny_model()))
        assert torch.equal(logits(model), before)  # the copy's attributes are its own
    assert_is_base(twin.unload(), tiny_model())


@pytest.mark.parametrize("kind", ["generator", "loader"])
def test_calibration_that_cannot_be_copied(kind, rows, tmp_path):
    def batches():
        yield from tiny_batches()

    calibration = batches() if kind == "generator" else torch.utils.data.DataLoader(rows, batch_size=4, num_workers=0)
    config = SensiConfig(calibration=calibration, priming_steps=2, task_type="SEQ_CLS", **TRIM)
    copy.deepcopy(config)
    model = get_peft_model(tiny_model(), config)
    twin = copy.deepcopy(model)
    twin.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), logits(model))
    config.to_dict()


def test_pickle(budget):
    model = trained(**budget)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), logits(model))


@pytest.mark.slow
def test_compiled_forward():
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception:
        pytest.skip("no C++ compiler")
    model = trained(**BOTH)
    expected = logits(model)
    compiled = torch.compile(model)
    with torch.no_grad():
        found = compiled(**tiny_batches(1, seed=99, labels=False)[0]).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("budget", [BOTH, *only_slow(TRIM, TUNE)], ids=str)
def test_traced_without_graph_breaks(budget):
    """As `torch.compile`, forward and backward, without waiting for a compiler."""
    model = trained(**budget)
    batch = tiny_batches(1, seed=99)[0]
    expected = logits(model, batch)
    traced = torch.compile(model.base_model.model, backend="aot_eager", fullgraph=True)
    output = traced(**batch)
    torch.testing.assert_close(output.logits.detach(), expected, atol=1e-5, rtol=1e-5)
    output.loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-4)
    torch.compiler.reset()


def test_a_model_that_learns_its_mask_is_exported():
    model = trained(update="mask", sparsity=0.5)
    batch = tiny_batches(1, seed=99, labels=False)[0]
    exported = torch.export.export(model.base_model.model, (), batch).module()
    torch.testing.assert_close(exported(**batch).logits, logits(model, batch))


@pytest.mark.parametrize("fields", [*BUDGETS.values(), {"update": "sparse", "sparse": 20}], ids=str)
def test_torchscript(fields):
    """The trace is the same each time, and holds for batches of other sizes."""
    model = trained(**fields)
    inner = model.base_model.model.eval()
    first, second = tiny_batches(1, labels=False)[0], tiny_batches(1, size=3, length=9, seed=5, labels=False)[0]
    names = list(first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the model's own code
        traced = torch.jit.trace(inner, example_kwarg_inputs=first, strict=False)
    assert names == list(second)
    for batch in (first, second):
        torch.testing.assert_close(traced(**batch)["logits"], logits(model, batch))


def test_the_helper_that_switches_casts_off_changes_nothing():
    from peft.helpers import disable_input_dtype_casting

    model = wrap(tiny_model(), budget=0.5)
    expected = logits(model)
    with disable_input_dtype_casting(model):
        assert torch.equal(logits(model), expected)
