"""Offline, quiet and reproducible, before anything of Hugging Face is imported."""

from __future__ import annotations

import os


os.environ["HF_HUB_OFFLINE"] = "1"
# One thread here and in all processes that tests start: the matrices are tiny, and there are as many workers as cores.
# More threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import gc
import random
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings
from processes import keep_tqdm_from_forks
from tiny import BUDGETS, FAMILIES, LABELS, VOCABULARY, logits, some_slow, tiny_batches, tiny_model, trained


# Models are built inside the tests, on machines that are busy: time per example says nothing here.
settings.register_profile(
    "sensi", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile("sensi")

torch.set_num_threads(1)  # whatever OMP_NUM_THREADS says
keep_tqdm_from_forks()


# A wrap makes thousands of small objects. With Python's own thresholds, many of them would start a collection.
gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True, scope="module")
def short_garbage_collections():
    """Takes all that is loaded by now out of garbage collections: each `Trainer` makes a full one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fixed_random_state():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def quiet():
    """Deprecations of other libraries are theirs to fix; our own warnings are asserted where they belong."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


@pytest.fixture(params=some_slow(FAMILIES, "roberta", "electra"))  # their layers are those of BERT
def family(request) -> str:
    return request.param


@pytest.fixture(params=BUDGETS)
def budget(request) -> dict:
    """Config fields of each kind of budget: trimming, tuning a part, both."""
    return BUDGETS[request.param]


@pytest.fixture
def bert():
    return tiny_model("bert")


@pytest.fixture
def batches():
    return tiny_batches()


class Rows(torch.utils.data.Dataset):
    """Padded examples that a tiny model can learn: the label is a function of the first token."""

    def __init__(self, size: int = 32, length: int = 10, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(2, VOCABULARY, (size, length), generator=generator)
        ends = torch.randint(length // 2, length + 1, (size,), generator=generator)
        mask = (torch.arange(length)[None] < ends[:, None]).long()
        self.rows = [
            {"input_ids": i, "attention_mask": m, "labels": i[0] % LABELS}
            for i, m in zip(ids * mask, mask, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


@pytest.fixture
def rows() -> Rows:
    """A dataset for `Trainer`."""
    return Rows()


@pytest.fixture(scope="session")
def adapters_made(tmp_path_factory) -> dict[str, tuple[torch.Tensor, Path]]:
    return {}


@pytest.fixture
def saved_adapter(adapters_made, tmp_path, tmp_path_factory):
    """Makes `trained(...)`: its logits, and a copy of its saved adapter. It is trained and saved only once."""

    def make(family: str = "bert", kind: str = "", **options) -> tuple[torch.Tensor, Path]:
        key = repr((family, kind, options))
        if key not in adapters_made:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = trained(family, **options)
            if kind:
                model.base_model.compress(kind)
            folder = tmp_path_factory.mktemp("adapter")
            model.save_pretrained(folder)
            adapters_made[key] = logits(model), folder
        expected, folder = adapters_made[key]
        return expected.clone(), shutil.copytree(folder, tmp_path / "adapter")

    return make


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """Loads a folder with `trust_remote_code`; its modeling files are copied into a folder of this test."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))

    def load(folder, auto_class="AutoModelForSequenceClassification"):
        return getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)

    return load
