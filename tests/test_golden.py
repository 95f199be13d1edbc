"""Adapters that earlier versions made are loaded to the same logits (see `golden_adapters`)."""

from __future__ import annotations

import json

import pytest
import torch
from golden_adapters import ADAPTERS, FOLDER, LOGITS, STORED, golden_base, golden_logits
from peft import PeftModel

from peft_sensi import SensiConfig
from peft_sensi.layers.compression import KINDS


NAMES = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())


def test_every_recipe_and_stored_type_has_one():
    assert set(ADAPTERS) <= set(NAMES)
    assert {*KINDS, "bits"} <= set(STORED.values())


@pytest.mark.parametrize("name", NAMES)
def test_the_logits_are_what_they_were(name):
    expected = torch.tensor(json.loads(LOGITS.read_text())[name])
    base = golden_base()
    assert not torch.allclose(golden_logits(base), expected, atol=1e-2)
    found = golden_logits(PeftModel.from_pretrained(base, FOLDER / name))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_they_are_small_and_have_a_version(name):
    assert sum(path.stat().st_size for path in (FOLDER / name).iterdir()) < 20_000
    assert SensiConfig.from_pretrained(FOLDER / name).format_version == 1
