"""Large models: no stage needs more temporary memory than it must, and gives the same values as a simple form."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import PATIENCE
from tiny import BOTH, TRIM, TUNE, tiny_model, train, wrap
from torch import nn

from peft_sensi.layers.layer import layers_of
from peft_sensi.scoring import priming
from peft_sensi.scoring.priming import AdamSteps, SignSteps


ROOT = Path(__file__).parents[1]
KINDS = {
    "trim": TRIM,
    "tune": TUNE,
    "both": BOTH,
    "low rank": {"update": "low_rank", "rank": 3},
    "sparse": {"update": "sparse", "sparse": 20},
    "mask": {"update": "mask", "sparsity": 0.2, "granularity": "weight"},
}


def gradients(shapes, seed, dtypes):
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(*shape, generator=generator) * 3.0 for shape in shapes]
    return [value.to(dtype) for value, dtype in zip(drawn, dtypes, strict=True)]


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.float64),
    ],
)
def test_the_steps_of_priming_equal_those_of_one_adamw(dtypes):
    shapes = [(6, 5), (7,), (3, 4)]
    ours, reference = ([nn.Parameter(g) for g in gradients(shapes, 0, dtypes)] for _ in range(2))
    masters = [nn.Parameter(p.detach().to(torch.promote_types(p.dtype, torch.float32))) for p in reference]
    optimizer = torch.optim.AdamW(masters, lr=1e-2, weight_decay=0.0)
    steps = AdamSteps(ours, 1e-2)
    for seed in range(1, 4):
        for parameter, master, g in zip(ours, masters, gradients(shapes, seed, dtypes), strict=True):
            parameter.grad, master.grad = g, g.to(master.dtype, copy=True)
        if seed == 2:
            ours[1].grad = masters[1].grad = None
        assert torch.nn.utils.clip_grad_norm_(masters, 1.0) > 1.0
        optimizer.step()
        assert steps.step() and all(p.grad is None for p in ours)
    for parameter, master in zip(ours, masters, strict=True):
        torch.testing.assert_close(parameter.detach(), master.detach().to(parameter.dtype))


def test_a_gradient_that_is_not_finite_changes_nothing():
    weights = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, dtype=torch.bfloat16))]
    weights[0].grad, weights[1].grad = torch.ones(3), torch.tensor([1.0, torch.inf], dtype=torch.bfloat16)
    assert not AdamSteps(weights, 0.1).step()
    assert all(bool((p == 1).all()) for p in weights)


@pytest.mark.parametrize("shape", [(), (5,), (4, 6), (2, 3, 4), (0, 3)], ids=str)
def test_sign_steps_reach_every_part_of_a_weight(shape, monkeypatch):
    monkeypatch.setattr(priming, "_AT_ONCE", 6)
    parameter = nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16))
    with SignSteps([parameter], 0.5):
        sign = torch.ones(shape, dtype=torch.bfloat16)
        sign.view(-1)[::2] = -1.0
        (parameter * sign * 7.0).sum().backward()
    assert torch.equal(parameter, -0.5 * sign)


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_in_the_dtype_of_the_base_has_the_adapted_weights(kind, dtype, drop):
    model = wrap(tiny_model(dtype=dtype), keep_base=not drop, **KINDS[kind])
    train(model)
    expected = {}
    for name, layer in layers_of(model).items():
        weight, bias = layer.get_adapted_weight("default")
        expected[name] = (weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype))
    model.merge_adapter()
    for name, layer in layers_of(model).items():
        weight, bias = expected[name]
        assert torch.equal(layer.base_layer.weight, weight) and layer.base_layer.weight.is_contiguous()
        assert bias is None or torch.equal(layer.base_layer.bias, bias)
        own = {p.data_ptr() for p in layer.own_parts("default").values() if p.numel()}
        assert layer.base_layer.weight.data_ptr() not in own


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from /proc")
@pytest.mark.parametrize("budget", ["0.5", '{"params": 0.5, "trainable": 0.2}'])
def test_the_stages_of_a_large_model_in_small(budget):
    command = [
        sys.executable,
        "examples/benchmarks/scale.py",
        "--layers",
        "2",
        "--hidden",
        "64",
        "--vocabulary",
        "128",
    ]
    command += ["--length", "16", "--steps", "2", "--priming-steps", "1", "--budget", budget]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    output = subprocess.run(
        command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True, timeout=PATIENCE
    ).stdout
    rows = [line for line in output.splitlines() if line.startswith("| ")][1:]
    stages = [row.split("|")[1].strip() for row in rows if not row.startswith("| ---")]
    assert len(stages) == 10 and stages[0] == "base" and stages[-1] == "load the merged model"
