"""The compared methods. Each row of a table has a name and a function from a base model to a model to train."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, ShiraConfig, SupertuningConfig, get_peft_model
from torch import nn

from peft_sensi import SensiConfig, compute_scores, recipes
from peft_sensi.scoring.head import head_to_train

from other_trimmers import lower_layers, torch_pruning


@dataclass(frozen=True)
class Run:
    """What a method may know about the training."""

    calibration: Any
    steps: int
    epochs: int
    seed: int


@dataclass(frozen=True)
class Method:
    """`rate` is the learning rate of AdamW. `control` is the row with which the method is compared."""

    build: Callable[[nn.Module, Run], nn.Module]
    rate: float
    control: str = ""


def full(base: nn.Module, run: Run) -> nn.Module:
    return base


def started(build: Callable[[nn.Module, Run], nn.Module]) -> Callable[[nn.Module, Run], nn.Module]:
    """Starts from the primed task head. Rows of `SensiConfig` that trim do this by default."""

    def primed(base: nn.Module, run: Run) -> dict[str, torch.Tensor]:
        return compute_scores(base, run.calibration, score="random", seed=run.seed, progress=False).head

    return _with_head(primed, build)


def at_prior(build: Callable[[nn.Module, Run], nn.Module]) -> Callable[[nn.Module, Run], nn.Module]:
    """Starts from the head of `SensiConfig` rows that are not primed: uneven labels start at their prior."""

    def head(base: nn.Module, run: Run) -> dict[str, torch.Tensor]:
        return head_to_train(base, list(itertools.islice(run.calibration, SensiConfig().calibration_steps)))

    return _with_head(head, build)


def _with_head(
    head: Callable[[nn.Module, Run], dict[str, torch.Tensor]], build: Callable[[nn.Module, Run], nn.Module]
) -> Callable[[nn.Module, Run], nn.Module]:
    def build_with_head(base: nn.Module, run: Run) -> nn.Module:
        base.load_state_dict(head(base, run), strict=False)
        return build(base, run)

    return build_with_head


def blocks_only(base: nn.Module, run: Run) -> nn.Module:
    """Full fine-tuning without the embedding tables."""
    for module in base.modules():
        if isinstance(module, nn.Embedding):
            module.weight.requires_grad = False
    return base


def head_only(base: nn.Module, run: Run) -> nn.Module:
    return _freeze(base, lambda name: False)


def bitfit(base: nn.Module, run: Run) -> nn.Module:
    """All biases (Ben Zaken et al. 2022, arXiv 2106.10199)."""
    return _freeze(base, lambda name: name.endswith("bias"))


def lora(base: nn.Module, run: Run, rank: int = 8) -> nn.Module:
    return get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, **on_all_linears(base)))


def layer_norm(base: nn.Module, run: Run) -> nn.Module:
    return _freeze(base, lambda name: "LayerNorm" in name)


def lora_of(share: float) -> Callable[[nn.Module, Run], nn.Module]:
    """LoRA on all Linears with a share of the base's values."""
    return lambda base, run: lora(base, run, rank=rank_of(base, share))


def shira_of(share: float) -> Callable[[nn.Module, Run], nn.Module]:
    """SHiRA (arXiv 2406.13175). Its `r` gives each matrix as many values as LoRA of this rank has."""
    return lambda base, run: get_peft_model(base, ShiraConfig(r=rank_of(base, share), **on_all_linears(base)))


def adalora_of(share: float) -> Callable[[nn.Module, Run], nn.Module]:
    """AdaLoRA (arXiv 2303.10512): starts with 1.5 times as many ranks as LoRA with this share; ends with as many."""

    def build(base: nn.Module, run: Run) -> nn.Module:
        rank = rank_of(base, share)
        steps = {"total_step": run.steps, "tinit": run.steps // 10, "tfinal": run.steps // 3, "deltaT": 10}
        config = AdaLoraConfig(
            target_r=rank, init_r=math.ceil(1.5 * rank), lora_alpha=2 * rank, **steps, **on_all_linears(base)
        )
        return get_peft_model(base, config)

    return build


def supertuning_of(share: float) -> Callable[[nn.Module, Run], nn.Module]:
    """Supertuning (arXiv 2607.09287): tunes the largest weights, a share of the base's values."""

    def build(base: nn.Module, run: Run) -> nn.Module:
        inside = on_all_linears(base)
        weights = sum(base.get_submodule(name).weight.numel() for name in inside["target_modules"])
        sparsity = 1 - share * base.base_model.num_parameters() / weights
        return get_peft_model(base, SupertuningConfig(sparsity=sparsity, **inside))

    return build


def rank_of(base: nn.Module, share: float) -> int:
    """The largest LoRA rank on all Linears whose values do not exceed a share of the base's values; at least 1."""
    per_rank = sum(sum(m.weight.shape) for m in linears(base).values())
    return max(1, int(share * base.base_model.num_parameters() / per_rank))


def on_all_linears(base: nn.Module) -> dict[str, Any]:
    """PEFT's arguments for all Linears of the base, the pooler included. The task head is trained whole."""
    inside = base.base_model.named_modules()
    names = [f"{base.base_model_prefix}.{name}" for name, m in inside if isinstance(m, nn.Linear)]
    return {"task_type": task_type(base), "target_modules": names}


def task_type(base: nn.Module) -> str:
    kinds = {"TokenClassification": "TOKEN_CLS", "QuestionAnswering": "QUESTION_ANS"}
    return next((kind for end, kind in kinds.items() if type(base).__name__.endswith(end)), "SEQ_CLS")


def linears(base: nn.Module) -> dict[str, nn.Linear]:
    """The Linears of the transformer's blocks."""
    modules = base.base_model.named_modules()
    return {name: m for name, m in modules if isinstance(m, nn.Linear) and "pooler" not in name}


def sensi(make: Callable[..., SensiConfig], **options: Any) -> Callable[[nn.Module, Run], nn.Module]:
    """A row of `SensiConfig`, or of the recipe `make`. Options that are functions are called with the run."""

    def build(base: nn.Module, run: Run) -> nn.Module:
        given = {name: value(run) if callable(value) else value for name, value in options.items()}
        given |= {"calibration": run.calibration, "task_type": task_type(base), "seed": run.seed}
        return get_peft_model(base, make(**given))

    return build


def _freeze(base: nn.Module, trained: Callable[[str], bool]) -> nn.Module:
    """Freezes all parameters except the task head and those for which `trained` returns True."""
    for name, parameter in base.named_parameters():
        parameter.requires_grad = not name.startswith(base.base_model_prefix + ".") or trained(name)
    return base


SYSTEMS: dict[str, Method] = {
    "full fine-tuning": Method(at_prior(full), 1.5e-4),
    "head only": Method(at_prior(head_only), 1e-3),
    "BitFit": Method(at_prior(bitfit), 1e-3, "head only"),
    "LoRA r=8, all Linears": Method(at_prior(lora), 1e-3, "head only"),
    "SensiConfig(0.5)": Method(sensi(SensiConfig, budget=0.5), 1.5e-4, "random units 0.5"),
    "sensi_bert(0.5)": Method(sensi(recipes.sensi_bert, budget=0.5), 1.5e-4, "random units 0.5"),
    "sensi_bert(0.5), in cuts": Method(
        sensi(recipes.sensi_bert, budget=0.5, trim="in cuts"), 1.5e-4, "random units 0.5"
    ),
    "random units 0.5": Method(sensi(SensiConfig, budget=0.5, score="random"), 1.5e-4),
    "far(0.1)": Method(sensi(recipes.far, retention=0.1, training_steps=lambda run: run.steps), 1.5e-4, "far, random"),
    "far, random": Method(sensi(recipes.far, retention=0.1, score="random"), 1.5e-4),
    "learners(64)": Method(
        sensi(recipes.learners, priming_epochs=lambda run: run.epochs / 2), 3e-4, "learners, no priming"
    ),
    "learners, no priming": Method(sensi(recipes.learners, priming_epochs=0), 3e-4),
    "dsee(16, 128)": Method(sensi(recipes.dsee), 1e-3, "dsee, random support"),
    "dsee, random support": Method(sensi(recipes.dsee, support="random"), 1e-3),
    "dsee, half the weights": Method(sensi(recipes.dsee, mask="unstructured", sparsity=0.5), 1e-3),
    "l0_close(0.1)": Method(sensi(recipes.l0_close, share=0.1), 1.5e-4, "l0_close, random"),
    "l0_close, random": Method(sensi(recipes.l0_close, share=0.1, score="random"), 1.5e-4),
    "binary_mask(0.1)": Method(sensi(recipes.binary_mask), 3e-3, "head only"),
}


# Trimming. The budget is the share of the heads' and neurons' parameters that is kept.
TRIMMING: dict[str, Callable[[float], Callable[[nn.Module, Run], nn.Module]]] = {
    "random": lambda budget: sensi(SensiConfig, budget=budget, score="random", refit=False),
    "magnitude": lambda budget: sensi(SensiConfig, budget=budget, score="magnitude", refit=False),
    "uniform width, magnitude": lambda budget: sensi(
        SensiConfig, budget=budget, widths="uniform", score="magnitude", refit=False
    ),
    "lower layers": lambda budget: started(lambda base, run: lower_layers(base, budget)),
    "Torch-Pruning, Taylor": lambda budget: started(lambda base, run: torch_pruning(base, run.calibration, budget)),
    "random, refitted": lambda budget: sensi(SensiConfig, budget=budget, score="random"),
    "learned masks (EarlyBERT)": lambda budget: sensi(SensiConfig, budget=budget, score="mask", refit=False),
    "Fisher, not primed (Kwon)": lambda budget: started(sensi(SensiConfig, budget=budget, priming_steps=0)),
    "ours, embeddings frozen": lambda budget: sensi(
        SensiConfig, budget=budget, also_train=["norms", "output_biases", "pooler"]
    ),
    "ours": lambda budget: sensi(SensiConfig, budget=budget),
}

# Tuning. The budget is the share of the base's values that is trained.
TUNING: dict[str, Callable[[float], Callable[[nn.Module, Run], nn.Module]]] = {
    "BitFit": lambda budget: bitfit,
    "LayerNorm": lambda budget: layer_norm,
    "LoRA": lambda budget: lora_of(budget),
    "AdaLoRA": lambda budget: adalora_of(budget),
    "SHiRA": lambda budget: shira_of(budget),
    "Supertuning": lambda budget: supertuning_of(budget),
    "random units": lambda budget: sensi(SensiConfig, budget={"trainable": budget}, score="random"),
    "units": lambda budget: sensi(SensiConfig, budget={"trainable": budget}, update="dense"),
    "ours": lambda budget: sensi(SensiConfig, budget={"trainable": budget}),
    "unscaled rank": lambda budget: sensi(SensiConfig, budget={"trainable": budget}, update="low_rank", scale=1.0),
    "unscaled rank, half the FLOPs": lambda budget: sensi(
        SensiConfig, budget={"trainable": budget, "flops": 0.5}, update="low_rank", scale=1.0
    ),
    "ours, half the FLOPs": lambda budget: sensi(SensiConfig, budget={"trainable": budget, "flops": 0.5}),
}


def is_sensi(model: nn.Module) -> bool:
    return type(getattr(model, "base_model", None)).__name__ == "SensiModel"
