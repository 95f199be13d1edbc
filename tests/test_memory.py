"""Memory: what a model holds, and what autograd saves for the backward pass."""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from processes import PATIENCE
from tiny import TRIM, logits, tiny_batches, tiny_model, train, trained, wrap
from torch import nn

from peft_sensi import SensiConfig
from peft_sensi.anatomy.build import build_anatomy
from peft_sensi.layers import updates
from peft_sensi.layers.layer import SensiLayer, layers_of
from peft_sensi.scoring.scores import Scores


ROOT = Path(__file__).parents[1]
SIZES = {"hidden_size": 64, "intermediate_size": 320}
TOKENS = 8 * 16


def held_bytes(model: nn.Module) -> int:
    """Storages counted once, with what layers keep beside parameters."""
    gc.collect()
    tensors = [*model.parameters(), *model.buffers()]
    for layer in (m for m in model.modules() if isinstance(m, SensiLayer)):
        tensors += [t for entry in layer._sensi_fused.values() for t in entry if isinstance(t, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class Saved:
    """Bytes of all storages that autograd saves inside the block and that were not there before."""

    def __init__(self, model: nn.Module) -> None:
        self.known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        for layer in (m for m in model.modules() if isinstance(m, SensiLayer)):
            cached = (t for entry in layer._sensi_fused.values() for t in entry if isinstance(t, torch.Tensor))
            self.known |= {t.untyped_storage().data_ptr() for t in cached}
        self.storages: dict[int, int] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def units(self) -> float:
        """In hidden states: values a token divided by the hidden size."""
        return sum(self.storages.values()) / (4 * TOKENS * SIZES["hidden_size"])


def ffn_units(model: nn.Module) -> float:
    """Saved by the first FFN block with its residual and LayerNorm, in training with dropout, input included."""
    model.train()
    inner = getattr(model, "base_model", model)
    layer = next(m for m in inner.modules() if type(m).__name__ == "TransformerBlock")
    saved: list[float] = []
    hidden = torch.randn(8, 16, SIZES["hidden_size"], requires_grad=True)

    def block(x: torch.Tensor) -> torch.Tensor:
        return layer.output_layer_norm(layer.ffn(x) + x)

    block(hidden)  # fills caches
    hooks = Saved(model)
    with hooks.hooks:
        output = block(hidden * 1.0)  # an activation as in the model, and not a leaf
    saved.append(hooks.units)
    output.sum().backward()
    return saved[0]


def test_activations_that_an_ffn_saves():
    """A tenth of the neurons tuned on both sides: the input, the GELU's input, 0.4 of its output, dropout, the sum."""
    full = ffn_units(tiny_model("distilbert", **SIZES, dropout=0.1).requires_grad_(True))
    ours = ffn_units(wrap(tiny_model("distilbert", **SIZES, dropout=0.1), retention=0.1))
    # The usual figures are for four neurons a hidden unit; there are five here. LayerNorm's statistics are extra.
    statistics = 2 / SIZES["hidden_size"]
    assert full == pytest.approx(1 + 5 + 5 + 1 + 1 + statistics)
    assert ours == pytest.approx(1 + 5 + 0.5 + 1 + 1 + statistics)


def scored_by_layer(model: nn.Module, config: dict, best: str) -> Scores:
    anatomy = build_anatomy(model)
    return Scores({g.name: torch.full((g.size,), 1.0 + 99.0 * (best in g.name)) for g in anatomy.groups}, "magnitude")


@pytest.mark.parametrize("budget", [{"trainable": 0.02}, {"trainable": 0.02, "flops": 0.8}], ids=str)
def test_nothing_below_the_lowest_tuned_unit_is_differentiated(budget):
    base = tiny_model("bert", num_hidden_layers=4, **SIZES)
    scores = scored_by_layer(base, budget, "layer.2.")
    model = get_peft_model(base, SensiConfig(budget=budget, scores=scores, task_type="SEQ_CLS"))
    plan = model.base_model.plan()
    tuned = {g.layer.rpartition(".")[2] for g in plan.anatomy.groups if (plan.of(g) == 2).any()}
    lowest = min(map(int, tuned))
    assert lowest == 2
    batch = tiny_batches(1, size=8, length=16)[0]
    model.train()
    logits_before = model(**batch).logits  # fills caches
    flows, saved = {}, {}
    hooks = Saved(model)

    def before(module, arguments, index):
        saved[index] = len(hooks.storages)

    def after(module, arguments, output, index):
        output = output[0] if isinstance(output, tuple) else output
        flows[index] = output.requires_grad
        saved[index] = len(hooks.storages) - saved[index]

    layers = model.base_model.model.bert.encoder.layer
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda m, a, index=index: before(m, a, index))
        layer.register_forward_hook(lambda m, a, o, index=index: after(m, a, o, index))
    seen = []
    for index, layer in enumerate(layers):
        layer.register_full_backward_pre_hook(lambda m, g, index=index: seen.append(index))
    with hooks.hooks:
        loss = model(**batch).loss
    loss.backward()
    assert flows == {0: False, 1: False, 2: True, 3: True} and logits_before.requires_grad
    assert saved[0] == saved[1] == 0 and saved[2] > 0 and saved[3] > 0
    assert seen == [3, 2]


def test_a_trimmed_model_without_its_base_holds_less_than_the_base():
    base = held_bytes(tiny_model(**SIZES))
    for budget in (TRIM, {"budget": {"flops": 0.5, "trainable": 0.05}}):
        model = wrap(tiny_model(**SIZES), keep_base=False, **budget)
        train(model)
        logits(model)
        assert held_bytes(model) < base


@pytest.mark.parametrize("also", [[], ["norms", "embeddings"]], ids=str)
def test_without_the_base_nothing_is_held_twice(also):
    """Neither a cache of fused weights nor the base's copies of what is trained whole."""
    model = wrap(tiny_model(), keep_base=False, also_train=also, retention=0.25)
    train(model)
    logits(model)
    assert not any(m._sensi_fused for m in model.modules() if isinstance(m, SensiLayer))
    slices = sum(p.numel() * 4 for n, p in model.named_parameters() if ".sensi_" in n)
    assert held_bytes(model) <= held_bytes(tiny_model()) + slices


def test_the_weight_in_place_is_the_same_model():
    batches = tiny_batches(3, seed=3)
    results = []
    for keep in (True, False):
        model = wrap(tiny_model(), keep_base=keep, also_train=["biases", "norms"], retention=0.25)
        train(model, batches)
        first = logits(model)
        with torch.autocast("cpu", torch.bfloat16):
            logits(model)
        assert torch.equal(logits(model), first) and torch.equal(logits(copy.deepcopy(model)), first)
        model.merge_adapter()
        model.unmerge_adapter()
        train(model, batches)
        results.append((first, logits(model), logits(model.merge_and_unload())))
    for kept, dropped in zip(*results, strict=True):
        torch.testing.assert_close(dropped, kept, atol=1e-6, rtol=1e-6)


def test_saved_whole_and_without_the_base(tmp_path):
    model = trained(keep_base=False, also_train=["norms", "embeddings"], retention=0.25)
    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}):
        loaded = PeftModel.from_pretrained(tiny_model(), tmp_path, **options)
        assert torch.equal(logits(loaded), logits(model))
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-5, rtol=1e-5)
    assert all(p.numel() for p in merged.parameters())


def test_loading_does_not_choose_places_again(tmp_path, monkeypatch):
    """The support of DSEE takes ten decompositions of every matrix, and the file says where its values are."""
    model = trained(update="sparse", sparse=20, support="decomposition", target_modules=["query"])
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(updates, "_sparse_part", lambda *arguments: pytest.fail("decomposed"))
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), logits(model))


_WRAPPING = """
import json, sys, tempfile, torch
sys.path[:0] = ["examples/benchmarks", "tests"]
from memory_split import free_at_once, peak_of_process
from peft import PeftModel, get_peft_model
from tiny import tiny_batches, tiny_model
from peft_sensi import SensiConfig
free_at_once()
sizes = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": 6}
keep, refit = json.loads(sys.argv[1])
base = tiny_model(**sizes)
base_bytes = sum(p.numel() * 4 for p in base.parameters())
layer = sum(p.numel() * 4 for p in base.bert.encoder.layer[0].parameters())
batches = tiny_batches(2, size=2, length=8)
base(**batches[0]).loss.backward(); base.zero_grad()
before = peak_of_process(reset=True)
config = {"calibration": batches, "priming_steps": 0, "refit": refit, "keep_base": keep, "task_type": "SEQ_CLS"}
model = get_peft_model(base, SensiConfig(budget=0.5, **config))
wrap = peak_of_process() - before
adapter = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    del model
    fresh = tiny_model(**sizes)
    peak_of_process(reset=True)
    before = peak_of_process()
    loaded = PeftModel.from_pretrained(fresh, folder, low_cpu_mem_usage=True)
    load = peak_of_process() - before
print(json.dumps({"wrap": wrap, "load": load, "adapter": adapter, "layer": layer, "base": base_bytes}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from /proc")
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("refit", [True, False])
def test_wrapping_and_loading_need_the_adapter_and_one_layer(keep, refit):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    # The libraries' buffers grow with the instructions that they use: by 3 MB with AMX.
    environment |= {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
    command = [sys.executable, "-c", _WRAPPING, json.dumps([keep, refit])]
    output = subprocess.run(
        command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True, timeout=PATIENCE
    )
    found = json.loads(output.stdout.strip().splitlines()[-1])
    slack = 12 << 20  # the interpreter's own, and activations
    # The closed form of a refit is one layer's own matter: Gram matrices in float64.
    assert found["wrap"] <= found["adapter"] + (2 if refit else 1) * found["layer"] + slack, found
    assert found["load"] <= found["adapter"] + found["layer"] + slack, found


def test_merging_keeps_the_weights_of_one_layer_only(monkeypatch):
    """The base's weights are let go one by one, so an interrupted merge is completed and not undone."""
    model = trained(**TRIM)
    weights = [weakref.ref(layer.get_base_layer().weight) for layer in layers_of(model).values()]
    merge, alive = SensiLayer.merge, []

    def counted(layer, *args, **kwargs):
        alive.append(sum(reference() is not None for reference in weights))
        return merge(layer, *args, **kwargs)

    monkeypatch.setattr(SensiLayer, "merge", counted)
    model.merge_and_unload()
    assert alive[0] == len(weights) and alive[-1] <= 2
