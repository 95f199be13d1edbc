"""Supports, masks and their packing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model

from peft_sensi import SensiConfig
from peft_sensi.layers.updates import learned_mask, pack_mask, sparse_support, top_mask, unpack_mask


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 99))
def test_packing_is_lossless_and_takes_one_bit(rows, columns, seed):
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    bits = pack_mask(mask)
    assert bits.dtype == torch.uint8 and len(bits) == -(-rows * columns // 8)
    assert torch.equal(unpack_mask(bits, (rows, columns)), mask)


@given(numel=st.integers(1, 200), percent=st.integers(0, 99), levels=st.integers(1, 5))
def test_mask_removes_exactly_the_share_even_with_ties(numel, percent, levels):
    scores = (torch.arange(numel) * 7 % levels).float()
    mask = top_mask(scores, percent / 100)
    assert int((~mask).sum()) == percent * numel // 100
    if mask.any() and not mask.all():
        assert scores[mask].min() >= scores[~mask].max()


def test_learned_mask_passes_the_gradient_straight_through():
    scores = torch.randn(3, 4, requires_grad=True)
    upstream = torch.randn(3, 4)
    (learned_mask(scores, 0.5) * upstream).sum().backward()
    assert torch.equal(scores.grad, upstream)


def test_a_matrix_with_a_single_weight_starts_with_a_finite_mask():
    """A single weight has no standard deviation, and its scores made all outputs of the model NaN."""
    config = SensiConfig(update="mask", granularity="weight", sparsity=0.5, target_modules=["0", "1"])
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 1), torch.nn.Linear(1, 1)), config)
    assert model(torch.randn(3, 4)).isfinite().all()


@pytest.mark.parametrize("support", ["magnitude", "random", "decomposition"])
def test_support_is_sorted_unique_and_deterministic(support):
    weight = torch.randn(12, 8)
    places = sparse_support(weight, 20, support, rank=3, seed=1)
    assert places.dtype == torch.int32 and len(places) == 20
    assert (places.diff() > 0).all() and places.min() >= 0 and places.max() < weight.numel()
    with torch.device("meta"):  # as `set_default_device("cuda")` would, where there is none
        assert torch.equal(places, sparse_support(weight, 20, support, rank=3, seed=1))


def test_magnitude_support_and_ties():
    weight = torch.tensor([[1.0, -3.0], [3.0, 1.0]])
    assert sparse_support(weight, 3, "magnitude", 1, 0).tolist() == [0, 1, 2]


def test_decomposition_finds_the_sparse_part():
    torch.manual_seed(0)
    sparse = torch.zeros(30, 20)
    chosen = torch.randperm(600)[:10].sort().values
    sparse.view(-1)[chosen] = 5.0
    weight = torch.randn(30, 2) @ torch.randn(2, 20) + sparse
    assert sparse_support(weight, 10, "decomposition", 2, 0).tolist() == chosen.tolist()


def test_decomposition_of_a_small_matrix_caps_its_rank():
    places = sparse_support(torch.randn(4, 3), 5, "decomposition", rank=64, seed=0)
    assert len(places.unique()) == 5
