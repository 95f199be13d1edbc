"""Families of encoders, encoder-decoders and image models: one table, one set of checks."""

from __future__ import annotations

from functools import partial

import pytest
from family_checks import (
    VOCABULARY,
    Case,
    check_costs,
    check_disable_adapter,
    check_gates_equal_removal,
    check_merge_equals_unmerged,
    check_save_load,
    check_training_step,
    token_batch,
)
from transformers import AutoConfig, AutoModelForSequenceClassification


# 3 heads of width 10, an FFN that no power of two divides.
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 30,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "intermediate_size": 43,
    "max_position_embeddings": 24,
    "num_labels": 3,
    "pad_token_id": 1,
}


def config(model_type, **changes):
    return partial(AutoConfig.for_model, model_type, **{**SIZES, **changes})


def classifier(model_type, name="", **changes):
    """A classifier of token sequences."""
    attention = changes.pop("attention", ("eager", "sdpa"))
    return Case(
        name or model_type,
        config(model_type, **changes),
        AutoModelForSequenceClassification,
        token_batch,
        "SEQ_CLS",
        attention=attention,
    )


CASES = [
    classifier("bert"),
    classifier("roberta"),
    classifier("electra", embedding_size=14),
    classifier("distilbert", dim=30, n_heads=3, n_layers=2, hidden_dim=43),
]


@pytest.fixture(params=CASES, ids=str)
def case(request) -> Case:
    return request.param


def test_gates_equal_removal(case):
    for attention in case.attention:
        check_gates_equal_removal(case, attention)


def test_merge_equals_unmerged(case):
    check_merge_equals_unmerged(case)


def test_costs(case):
    check_costs(case)


def test_save_and_load(case, tmp_path):
    check_save_load(case, tmp_path)


def test_disable_adapter(case):
    check_disable_adapter(case)


def test_calibration_and_training(case, tmp_path):
    check_training_step(case, tmp_path)
