"""PEFT's tests with our config class, models and budgets in place of its own lists of parameters.

`_point_at` replaces the values of the tests' `parametrize` marks, found by their argument names. Tests that take LoRA
as an example of any method get ours in its place. What is left out, and why, says `deselected.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from peft_sensi import SensiConfig

from . import models
from .fetch import Unavailable, import_suite


try:
    custom, config, decoders, features, classifiers, low_level = import_suite(
        "test_custom_models",
        "test_config",
        "test_decoder_models",
        "test_feature_extraction_models",
        "test_seq_classifier",
        "test_low_level_api",
    )
except Unavailable as reason:
    pytest.skip(f"PEFT's own tests can't be had: {reason}", allow_module_level=True)

pytestmark = pytest.mark.conformance

# -- what PEFT's tests are run with: "whole" tunes its targets, "tune" a part of them, "trim" drops units -------------

TUNE, TRIM = {"budget": {"trainable": 0.3}, "update": "dense"}, {"budget": 0.5}
TRIM_TUNE = {"budget": {"params": 0.5, "trainable": 0.2}}
BLOCKS = {"blocks": [models.Blocks.layout]}

CUSTOM = [
    ("MLP", "tune-all", {"budget": {"trainable": 0.5}, "update": "dense"}),
    ("MLP", "tune-one", {"target_modules": ["lin0"], **TUNE}),
    ("MLP", "tune-saved", {"target_modules": ["lin0"], "modules_to_save": ["lin1"], **TUNE}),
    ("MLP", "whole-one", {"target_modules": ["lin0"]}),
    ("MLP", "whole-two", {"target_modules": ["lin0", "lin1"]}),
    ("MLP", "whole-regex", {"target_modules": r"lin\d", "exclude_modules": ["lin1"]}),
    ("MLP_LayerNorm", "whole-norm-saved", {"target_modules": "all-linear", "modules_to_save": ["layernorm1"]}),
    ("EmbConv1D", "whole-transposed", {"target_modules": ["conv1d"]}),
    ("EmbConv1D", "tune-transposed", {"target_modules": ["conv1d", "lin0"], **TUNE}),
    ("EmbConv1D", "whole-embedding-saved", {"target_modules": ["lin0"], "modules_to_save": ["emb"]}),
    ("Blocks", "tune-blocks", {**BLOCKS, **TUNE}),
    ("Blocks", "trim-blocks", {**BLOCKS, **TRIM}),
    ("Blocks", "trim-tune-blocks", {**BLOCKS, **TRIM_TUNE}),
    ("MLP", "low-rank", {"update": "low_rank", "rank": 2}),
    ("Blocks", "trim-low-rank-blocks", {**BLOCKS, **TRIM, "update": "low_rank", "rank": 2}),
]
PAIRS = [
    ("pair-same", {"target_modules": ["lin0"]}, {"target_modules": ["lin0"]}),
    ("pair-different", {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
    ("pair-overlapping", {"target_modules": ["lin0"], **TUNE}, {"target_modules": ["lin0", "lin1"]}),
]
# By default norms are trained together with blocks that are trimmed.
ENCODER = {"tune": TUNE, "trim": {**TRIM, "also_train": []}, "trim-norms": TRIM, "trim-tune": TRIM_TUNE}
DECODER = {"tune": TUNE, "trim": {**TRIM, "also_train": []}, "trim-norms": TRIM, "trim-tune": TRIM_TUNE}


def _point_at(cls: Any, **values: Any) -> Any:
    """`cls`, whose `parametrize` marks of the argument names `a, b` now have the values called `a__b` here."""
    for test in vars(cls).values():
        marks = getattr(test, "pytestmark", [])
        for index, mark in enumerate(marks):
            names = mark.args[0] if mark.name == "parametrize" else ""
            if (ours := values.get("__".join(re.findall(r"\w+", names)))) is not None:
                marks[index] = pytest.mark.parametrize(names, ours).mark
    return cls


def _models(auto_class: Any, names: Any) -> list:
    return [pytest.param(models.saved(auto_class, name), id=name) for name in names]


def _configs(task_type: str, rows: dict[str, dict[str, Any]]) -> list:
    return [pytest.param(SensiConfig, {"task_type": task_type, **kwargs}, id=name) for name, kwargs in rows.items()]


def _pair(*kwargs: dict[str, Any]) -> list:
    return [{**each, "init_weights": False} for each in kwargs]


OURS = {
    "test_name__model_id__config_cls__config_kwargs": [
        pytest.param(name, model, SensiConfig, kwargs, id=name) for model, name, kwargs in CUSTOM
    ],
    "test_name__tuner_method__config_cls__config_kwargs_1__config_kwargs_2": [
        pytest.param(name, "sensi", SensiConfig, *_pair(*kwargs), id=name) for name, *kwargs in PAIRS
    ],
    "config_cls": [SensiConfig],
    "config_class": [SensiConfig],
    "config_class__mandatory_kwargs": [pytest.param(SensiConfig, {}, id="defaults")],
    "config0": [pytest.param(SensiConfig(target_modules=["lin0"], init_weights=False), id="SensiConfig")],
}

# -- stand-ins -------------------------------------------------------------------------------------------------------


class LocalModels(custom.MockTransformerWrapper):
    """Knows one more model, of which units can be trimmed."""

    @classmethod
    def from_pretrained(cls, model_id: str, dtype: Any = None) -> Any:
        if model_id != "Blocks":
            return super().from_pretrained(model_id, dtype=dtype)
        torch.manual_seed(0)
        return models.Blocks().to(dtype or torch.float32)


def lora_as_sensi(init_lora_weights: bool = True, **kwargs: Any) -> SensiConfig:
    for name in ("r", "lora_alpha", "lora_dropout", "bias"):
        kwargs.pop(name, None)
    return SensiConfig(init_weights=init_lora_weights, **kwargs)


class _Local:
    """An auto class that loads our random model, whichever id it is asked for."""

    def __init__(self, auto_class: Any, name: str) -> None:
        self.load = partial(auto_class.from_pretrained, models.saved(auto_class, name))

    def from_pretrained(self, model_id: str) -> Any:
        return self.load()


class LoraIsSensi:
    """For tests whose parameters are not ours: where they make a LoRA config or load a model, they get ours."""

    @pytest.fixture(autouse=True)
    def _lora_is_sensi(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
        if "config_kwargs" not in parameters:
            # Many of these load an adapter onto freshly drawn weights, which for us is the wrong base.
            monkeypatch.setattr("peft_sensi.tuner.decision.check_fingerprint", lambda *args: None)
        if {"config_cls", "config0"} & parameters.keys():
            yield
            return
        stand_in = Mock(side_effect=lora_as_sensi)
        for module in (custom, low_level):
            monkeypatch.setattr(module, "LoraConfig", stand_in)
            monkeypatch.setattr(module, "AutoModelForCausalLM", _Local(AutoModelForCausalLM, "opt"))
        bert = _Local(AutoModelForSequenceClassification, "bert")
        monkeypatch.setattr(custom, "AutoModelForSequenceClassification", bert)
        yield
        assert stand_in.called, "this test is about another method: deselect it"


# -- the suites ------------------------------------------------------------------------------------------------------


class TestCustom(LoraIsSensi, _point_at(custom.TestPeftCustomModel, **OURS)):
    transformers_class = LocalModels


class TestSeveralActive(_point_at(custom.TestMultipleActiveAdapters, **OURS)):
    pass


class TestRequiresGrad(LoraIsSensi, _point_at(custom.TestRequiresGrad, **OURS)):
    def check_requires_grad(self, model: Any, *params_expected: str) -> None:
        ours = [re.sub(r"lora_A\.(\w+)\.weight", r"sensi_weight.\1", name) for name in params_expected]
        ours = [re.sub(r"lora_B\.(\w+)\.weight", r"sensi_bias.\1", name) for name in ours]
        super().check_requires_grad(model, *ours)


class TestFsdp(_point_at(custom.TestPeftFsdpStateDict, **OURS)):
    transformers_class = LocalModels


class TestStateDict(LoraIsSensi, low_level.TestPeftStateDict):
    pass


class TestBaseStateDict(LoraIsSensi, low_level.TestGetBaseModelStateDict):
    pass


class TestConfig(_point_at(config.TestPeftConfig, **OURS)):
    @pytest.fixture(autouse=True)
    def _ours_on_the_hub(self, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        SensiConfig(budget=0.5).save_pretrained(tmp_path / "saved")
        monkeypatch.setattr(config, "PEFT_MODELS_TO_TEST", [(str(tmp_path / "saved"), None)])


class TestFeatureExtraction(
    _point_at(
        features.TestPeftFeatureExtractionModel,
        model_id=_models(AutoModel, models.ENCODERS),
        config_cls__config_kwargs=_configs("FEATURE_EXTRACTION", ENCODER),
    )
):
    @pytest.fixture(autouse=True)
    def _ours_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:  # for the one test without parameters
        monkeypatch.setattr(features, "LoraConfig", partial(SensiConfig, **TRIM))
        monkeypatch.setattr(features, "PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST", [models.saved(AutoModel, "bert")])


class TestSequenceClassification(
    _point_at(
        classifiers.TestSequenceClassificationModels,
        model_id=_models(AutoModelForSequenceClassification, models.ENCODERS),
        config_cls__config_kwargs=_configs("SEQ_CLS", ENCODER),
    )
):
    pass


class TestDecoder(
    _point_at(
        decoders.TestDecoderModels,
        model_id=_models(AutoModelForCausalLM, models.DECODERS),
        config_cls__config_kwargs=_configs("CAUSAL_LM", DECODER),
    )
):
    pass
