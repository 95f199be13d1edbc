"""Thousands of broken adapters: each is refused with a clear error, or gives a model that passes all checks."""

from __future__ import annotations

import base64
import collections
import json
import os
from multiprocessing.connection import Connection
from typing import Any

import pytest
from fuzz_worker import ADAPTERS, GOOD, serve
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import FORKS, PATIENCE


pytestmark = pytest.mark.skipif(not hasattr(os, "fork") or not os.path.isdir("/proc/self"), reason="needs Linux")


@pytest.fixture(scope="module")
def worker():
    """A connection to a process that answers lists of jobs."""
    ours, theirs = FORKS.Pipe()
    process = FORKS.Process(target=serve, args=(theirs,))
    process.start()
    theirs.close()
    yield ours
    ours.send(None)
    process.join(PATIENCE)
    assert process.exitcode == 0


def check(worker: Connection, jobs: list[dict[str, Any]]) -> collections.Counter:
    """Counts the outcomes."""
    worker.send([{"id": number, **job} for number, job in enumerate(jobs)])
    found = worker.recv()
    assert len(found) == len(jobs)
    bad = [a for a in found if a["outcome"] not in GOOD]
    assert not bad, "\n".join(f"{jobs[a['id']]}: {a['outcome']}: {a['detail']}" for a in bad[:10])
    return collections.Counter(a["outcome"] for a in found)


def run_seeds(worker: Connection, seeds: range) -> collections.Counter:
    counts = check(worker, [{"seed": seed} for seed in seeds])
    print(f"{len(seeds)} mutated adapters: {dict(counts)}")
    return counts


def test_mutated_adapters(worker):
    counts = run_seeds(worker, range(400))
    assert min(counts[outcome] for outcome in GOOD) > 10  # the mutations reach all three


@pytest.mark.slow
def test_many_mutated_adapters(worker):
    run_seeds(worker, range(10_000, 30_000))


# -- made by Hypothesis -----------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**300, max_value=10**310)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["dense", "mask", "unit", "bits", "all", "none", "(a*)*b", "query", "cut"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [
    "also_train", "auto_mapping", "base_model_name_or_path", "blocks", "budget", "calibration_steps", "compressed",
    "exclude_modules", "fingerprint", "format_version", "granularity", "inference_mode", "init_weights", "keep_base",
    "min_units", "modules_to_save", "multiple_of", "peft_type", "peft_version", "plan", "priming_lr", "priming_steps",
    "rank", "refit", "retention", "revision", "schedule", "score", "seed", "sequence_length", "sparse", "sparsity",
    "support", "target_modules", "task_type", "update",
]  # fmt: skip
adapters = st.sampled_from(sorted(ADAPTERS))


@st.composite
def jobs_with_fields(draw) -> dict[str, Any]:
    changes = draw(st.dictionaries(st.sampled_from(FIELDS), json_values, min_size=1, max_size=2))
    return {"adapter": draw(adapters), "fields": changes}


@st.composite
def jobs_with_headers(draw) -> dict[str, Any]:
    names = st.sampled_from(["base_model.model.sensi_plan", "x", "base_model.model.classifier.weight"])
    entry = st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["F32", "U8", "I32", "F4", "BOOL"]) | json_values,
            "shape": st.lists(st.integers(-1, 2**64), max_size=3) | json_values,
            "data_offsets": st.lists(st.integers(-1, 2**64), min_size=2, max_size=2) | json_values,
        },
    )
    header = json.dumps(draw(st.dictionaries(names | st.text(max_size=5), entry | json_values, max_size=3))).encode()
    length = draw(st.just(len(header)) | st.integers(0, 2**64 - 1))
    data = length.to_bytes(8, "little") + header + draw(st.binary(max_size=64))
    return {"adapter": draw(adapters), "weights": base64.b64encode(data).decode()}


@settings(max_examples=6)
@given(jobs=st.lists(jobs_with_fields(), min_size=30, max_size=30))
def test_fields_of_any_kind(worker, jobs):
    check(worker, jobs)


@settings(max_examples=5)
@given(jobs=st.lists(jobs_with_headers(), min_size=30, max_size=30))
def test_headers_of_any_kind(worker, jobs):
    check(worker, jobs)
