"""Properties that hold for every family of models: one function per property, for tables of small random models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from tiny import units_at_zero
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

from peft_sensi import SensiConfig, build_anatomy, make_plan
from peft_sensi.anatomy.modules import residual_factor
from peft_sensi.layers.layer import SensiLayer
from peft_sensi.merging.load import load_merged
from peft_sensi.merging.save import save_merged
from peft_sensi.scoring.calibration import observing
from peft_sensi.utils.states import FROZEN, TRIMMED, TUNED


VOCABULARY = 50


@dataclass(frozen=True)
class Case:
    """One row of the table: how to make a model of a family, and batches for it.

    Attributes:
        config: Makes a fresh Transformers config. Its sizes should be odd and uneven.
        auto: The class that makes the model from the config.
        batch: Makes a batch with labels from a number of examples and a length. Every second example is padded.
        length: The number of tokens of an example inside the model (for images: patches and special tokens).
        heads, neurons: Whether these can be trimmed.
    """

    name: str
    config: Callable[[], Any]
    auto: Any
    batch: Callable[..., dict[str, torch.Tensor]]
    task_type: str | None = None
    length: int = 9
    heads: bool = True
    neurons: bool = True
    attention: tuple[str, ...] = ("eager", "sdpa")
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def model(self, attention: str = "eager", seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The same arguments give the same weights, large enough for all parts to matter."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = self.config()
            config._attn_implementation = attention
            model = self.auto.from_config(config, attn_implementation=attention)
            make_lively(model)
        return model.to(dtype).eval()

    def wrap(self, model: nn.Module, **config: Any) -> PeftModel:
        fixed = {"task_type": self.task_type, "priming_steps": 2, "calibration_steps": 3, "multiple_of": 1}
        if "calibration" not in config:
            fixed["score"] = "magnitude"
        return get_peft_model(model, SensiConfig(**{**fixed, **self.options, **config}))

    def blocks(self) -> Any:
        return SensiConfig(**self.options).layouts()

    def anatomy(self, model: nn.Module) -> Any:
        return build_anatomy(model, blocks=self.blocks())


def make_lively(model: nn.Module) -> None:
    """Sets weights with which every head, neuron, bias and position changes the output. The stock ones hide errors."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, Conv1D)):
                fan = module.weight.shape[1 if isinstance(module, nn.Linear) else 0]
                module.weight.normal_(std=1.2 * fan**-0.5)
                if module.bias is not None:
                    module.bias.normal_(std=0.2)
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(std=1.0 if "relative" in name or "rel_" in name else 0.5)
            elif "Norm" in type(module).__name__:
                for parameter in module.parameters(recurse=False):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, parameter in model.named_parameters():
            if "lambda" in name:  # LayerScale
                parameter.uniform_(0.5, 1.5)


def token_batch(
    size: int = 4, length: int = 9, *, seed: int = 0, padded: bool = True, task: str = "SEQ_CLS", labels: int = 3
) -> dict[str, torch.Tensor]:
    """Token ids with a 2 at the end of each example, padding on the right, and labels for the task."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (size, length), generator=generator)
    mask = torch.ones(size, length, dtype=torch.long)
    if padded:
        mask[1::2, length * 2 // 3 :] = 0
        ids = torch.where(mask.bool(), ids, 1)
    ids[torch.arange(size), mask.sum(1) - 1] = 2
    batch = {"input_ids": ids, "attention_mask": mask}
    if task == "SEQ_CLS":
        batch["labels"] = torch.randint(0, labels, (size,), generator=generator)
    elif task == "TOKEN_CLS":
        values = torch.randint(0, labels, (size, length), generator=generator)
        batch["labels"] = torch.where(mask.bool(), values, -100)
    elif task == "QUESTION_ANS":
        batch["start_positions"] = torch.randint(0, length // 3, (size,), generator=generator)
        batch["end_positions"] = torch.randint(0, length // 3, (size,), generator=generator)
    elif task in ("CAUSAL_LM", "MASKED_LM", "SEQ_2_SEQ_LM"):
        batch["labels"] = torch.where(mask.bool(), ids, -100)
    return batch


def image_batch(
    size: int = 4, length: int = 0, *, seed: int = 0, padded: bool = True, side: int = 12, labels: int = 3
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(size, 3, side, side, generator=generator),
        "labels": torch.randint(0, labels, (size,), generator=generator),
    }


@torch.no_grad()
def run(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The model's main output in evaluation mode."""
    output = model.eval()(**batch)
    for name in ("logits", "start_logits", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            return getattr(output, name).clone()
    return output[0].clone()


def random_plan(case: Case, model: nn.Module, seed: int = 0, tuned: float = 0.6) -> Any:
    """Keeps half of each group that can be trimmed (rounded up). Of the kept units, some are frozen."""
    anatomy, rng = case.anatomy(model), np.random.default_rng(seed)
    states = []
    for group in anatomy.groups:
        order, row = rng.permutation(group.size), np.full(group.size, TUNED, dtype=np.uint8)
        kept = -(-group.size // 2) if group.trimmable else group.size
        row[order[kept:]] = TRIMMED
        row[order[: kept - max(1, round(tuned * kept))]] = FROZEN
        states.append(row.tobytes())
    like = make_plan(anatomy, {g.name: np.ones(g.size) for g in anatomy.groups}, None, sequence_length=case.length)
    return type(like)(anatomy, tuple(states), like.targets, like.sequence_length)


def train(model: nn.Module, case: Case, steps: int = 2) -> list[float]:
    """Changes all trained values visibly. Leaves the model in evaluation mode."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(steps):
        loss = model(**case.batch(seed=50 + step)).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return losses


def assert_plain_values_equal(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert [n for n in expected if not torch.equal(found[n], expected[n])] == []


# -- the checks ------------------------------------------------------------------------------------------------------


def check_gates_equal_removal(case: Case, attention: str = "eager") -> None:
    """A trimmed model computes the same as the whole model with the trimmed units' activations at zero."""
    model, other = case.model(attention), case.model(attention)
    batch = case.batch()
    plan = random_plan(case, model)
    kinds = {g.kind for g in plan.anatomy.trimmable}
    assert kinds == {name for name, wanted in (("head", case.heads), ("neuron", case.neurons)) if wanted}, kinds
    with units_at_zero(model, plan):
        gated = run(model, batch)
    whole = run(model, batch)
    wrapped = case.wrap(other, plan=plan)
    scale = whole.abs().max()
    assert (whole - gated).abs().max() > 1e-2 * scale  # the removed units did something
    torch.testing.assert_close(run(wrapped, batch), gated, atol=2e-5 * float(scale), rtol=1e-4)
    small = wrapped.merge_and_unload()
    torch.testing.assert_close(run(small, batch), gated, atol=2e-5 * float(scale), rtol=1e-4)
    for group in plan.anatomy.trimmable:
        kept = int((plan.of(group) != TRIMMED).sum())
        for side in group.sides:
            before, after = (m.get_submodule(side.module).weight.numel() for m in (model, small))
            assert after * group.size == before * kept


def check_merge_equals_unmerged(case: Case) -> None:
    """Merging does not change the output, and unmerging restores the base's own tensors."""
    base = case.model()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    batch = case.batch(seed=3)
    whole = run(base, batch)
    model = case.wrap(base, plan=random_plan(case, base))
    train(model, case)
    expected = run(model, batch)
    tolerance = 2e-5 * float(expected.abs().max())
    model.merge_adapter()
    torch.testing.assert_close(run(model, batch), expected, atol=tolerance, rtol=1e-4)
    with model.disable_adapter():
        assert torch.equal(run(model, batch), whole)
    assert torch.equal(run(model, batch), expected)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(run(model, batch), expected)
    small = copy.deepcopy(model).merge_and_unload()
    assert not any(isinstance(m, SensiLayer) for m in small.modules())
    torch.testing.assert_close(run(small, batch), expected, atol=tolerance, rtol=1e-4)
    assert_plain_values_equal(model.unload(), before)


def flops(model: nn.Module, batch: dict[str, torch.Tensor]) -> int:
    model.requires_grad_(False)  # the counter fails on views of parameters
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(**batch)
    return counter.get_total_flops()


def check_costs(case: Case) -> None:
    """The parameters and FLOPs that the plan removes are the differences of `numel` and of torch's FLOP counter."""
    base, other = case.model("eager"), case.model("eager")
    plan = random_plan(case, base)
    anatomy = plan.anatomy
    small = case.wrap(other, plan=plan).merge_and_unload()
    sizes = [sum(p.numel() for p in m.parameters()) for m in (base, small)]
    assert 0 < plan.kept_params < anatomy.prunable_params
    assert sizes[0] - sizes[1] == anatomy.prunable_params - plan.kept_params
    batch = case.batch(1, padded=False)
    missing = flops(base, batch) - flops(small, batch)
    assert 0 < plan.kept_flops < 2 * anatomy.prunable_macs(case.length)
    assert missing == 2 * anatomy.prunable_macs(case.length) - plan.kept_flops


def check_save_load(case: Case, folder: Any) -> None:
    """The adapter, loaded on a fresh base, gives bit-identical outputs."""
    base = case.model()
    model = case.wrap(base, plan=random_plan(case, base))
    train(model, case)
    batch = case.batch(seed=3)
    expected = run(model, batch)
    model.save_pretrained(folder)
    for low in (False, True):
        loaded = PeftModel.from_pretrained(case.model(), folder, low_cpu_mem_usage=low)
        assert torch.equal(run(loaded, batch), expected)


def check_disable_adapter(case: Case) -> None:
    """With the adapter disabled or unloaded, the outputs are exactly those of the base."""
    base, batch = case.model(), case.batch(seed=3)
    before = run(base, batch)
    model = case.wrap(base, plan=random_plan(case, base))
    train(model, case)
    expected = run(model, batch)
    assert not torch.equal(expected, before)
    with model.disable_adapter():
        assert torch.equal(run(model, batch), before)
    assert torch.equal(run(model, batch), expected)
    assert torch.equal(run(model.unload(), batch), before)


def check_training_step(case: Case, folder: Any) -> None:
    """Calibration gives a plan within the budget, and Trainer changes the trained values and nothing else."""
    base = case.model()
    batches = [case.batch(seed=seed) for seed in range(4)]
    model = case.wrap(base, budget=0.55, calibration=batches)
    plan = model.base_model.plan()
    assert plan.trims and 0.3 < plan.params_share <= 0.55
    assert plan.sequence_length == case.length
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    rows = [{k: v[i] for k, v in batch.items()} for batch in batches for i in range(2)]
    # `save_strategy="no"`: the folder stays empty.
    arguments = TrainingArguments(str(folder), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2,
                                  save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True)  # fmt: skip
    result = Trainer(model, arguments, train_dataset=rows).train()
    assert np.isfinite(result.training_loss)
    after = dict(model.named_parameters())
    assert [n for n in frozen if not torch.equal(after[n], frozen[n])] == []
    still = [n for n in trained if torch.equal(after[n], trained[n]) and "sensi_" in n and trained[n].numel()]
    assert len(still) <= len(trained) // 10, still


def check_trim(case: Case, folder: Any) -> None:
    """A trained adapter is trimmed: its units are those of the trained model. Trimmed again, it loads and merges."""
    batches = [case.batch(seed=seed) for seed in range(4)]
    model, batch = case.wrap(case.model(), budget=1.0, calibration=batches), case.batch(seed=3)
    train(model, case)
    whole = copy.deepcopy(model).merge_and_unload()
    plan = model.base_model.trim(0.6, calibration=batches, refit=False)
    assert plan.trims and plan.params_share <= 0.6
    with units_at_zero(whole, plan):
        gated = run(whole, batch)
    tolerance = {"atol": 2e-5 * float(gated.abs().max()), "rtol": 1e-4}
    torch.testing.assert_close(run(model, batch), gated, **tolerance)
    model.base_model.trim(0.4, calibration=batches)
    train(model, case)
    expected = run(model, batch)
    model.save_pretrained(folder)
    assert torch.equal(run(PeftModel.from_pretrained(case.model(), folder), batch), expected)
    torch.testing.assert_close(run(model.merge_and_unload(), batch), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def check_sums(case: Case) -> None:
    """What is added to a sublayer's output is added to the sum that the refit looks at, times the layer's factor."""
    model, batch = case.model(), case.batch(seed=3)

    def sums(group: Any, shift: float) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        hook = model.get_submodule(group.output).register_forward_hook(lambda module, args, output: output + shift)
        with observing(model, [group], lambda group, z, y, total: found.append(total)):
            model(**batch)
        hook.remove()
        return found

    for group in case.anatomy(model).trimmable:
        if group.layer and group.repeats == 1:
            before, after = sums(group, 0.0), sums(group, 0.25)
            assert len(before) == len(after) == 1, group.name
            shift = (0.25 * residual_factor(model, group)).expand_as(before[0])
            torch.testing.assert_close(after[0] - before[0], shift, atol=1e-4, rtol=0, msg=group.name)


def check_empty_sublayers(case: Case) -> None:
    """A layer without heads or neurons (except those that its code needs) still runs and can be trained."""
    base, other, batch = case.model(), case.model(), case.batch()
    like = random_plan(case, base)
    states = []
    for index, group in enumerate(like.anatomy.groups):
        row = np.full(group.size, TUNED, dtype=np.uint8)
        if group.trimmable and index < 3:
            row[group.least :] = TRIMMED
        states.append(row.tobytes())
    plan = replace(like, states=tuple(states))
    with units_at_zero(base, plan):
        gated = run(base, batch)
    model = case.wrap(other, plan=plan)
    torch.testing.assert_close(run(model, batch), gated, atol=2e-5 * float(gated.abs().max()), rtol=1e-4)
    train(model, case)
    after = run(model, batch)
    torch.testing.assert_close(run(model.merge_and_unload(), batch), after, atol=1e-4, rtol=1e-4)


def check_merged_files(case: Case, folder: Any) -> None:
    """A merged model that was saved and loaded has the same outputs as the adapter."""
    base, batch = case.model(), case.batch(seed=3)
    model = case.wrap(base, plan=random_plan(case, base))
    train(model, case)
    expected = run(model, batch)
    save_merged(model, folder)
    scale = float(expected.abs().max())
    torch.testing.assert_close(run(load_merged(folder), batch), expected, atol=2e-5 * scale, rtol=1e-4)


def check_generation(case: Case) -> None:
    """Greedy decoding gives the same tokens with and without cache, merged and not, also for left-padded prompts."""
    base = case.model(case.attention[-1])
    ids = torch.randint(3, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    batch = {"input_ids": torch.where(mask.bool(), ids, 1), "attention_mask": mask}

    def generate(model: nn.Module, **options: Any) -> torch.Tensor:
        fixed = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 1}
        return model.eval().generate(**batch, **{**fixed, **options})

    before = generate(base)
    model = case.wrap(base, plan=random_plan(case, base))
    train(model, case)
    expected = generate(model)
    with_scores = {"return_dict_in_generate": True, "output_scores": True}
    with model.disable_adapter():
        base_scores = generate(model, **with_scores).scores[0]
    assert not torch.equal(generate(model, **with_scores).scores[0], base_scores)
    assert torch.equal(generate(model, use_cache=False), expected)
    with model.disable_adapter():
        assert torch.equal(generate(model), before)
    assert torch.equal(generate(model, num_beams=2), generate(model, num_beams=2, use_cache=False))
    small = model.merge_and_unload()
    assert torch.equal(generate(small), expected)
    assert torch.equal(generate(small, use_cache=False), expected)
