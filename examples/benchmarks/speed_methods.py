"""The models (with random weights) and the methods that `speed.py` compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    LlamaConfig,
)

from peft_sensi import SensiConfig, recipes


@dataclass(frozen=True)
class Shape:
    """A model and its batch. `linears` are the Linears of its blocks, which "all linear" means for every method."""

    config: Callable[[], Any]
    linears: tuple[str, ...]
    query_value: tuple[str, ...]
    norms: tuple[str, ...]
    batch: int = 16
    length: int = 128
    causal: bool = False
    needs_gpu: bool = False

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        auto = AutoModelForCausalLM if self.causal else AutoModelForSequenceClassification
        return auto.from_config(self.config())

    def batches(self, count: int, device: torch.device, size: int = 0, length: int = 0) -> list[dict[str, Any]]:
        size, length = size or self.batch, length or self.length
        generator = torch.Generator().manual_seed(1)
        made = []
        for _ in range(count):
            ids = torch.randint(5, self.config().vocab_size, (size, length), generator=generator)
            labels = ids if self.causal else torch.randint(0, 2, (size,), generator=generator)
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
            made.append({name: value.to(device) for name, value in batch.items()})
        return made


_BERT = {
    "linears": ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"),
    "query_value": ("query", "value"),
    "norms": ("LayerNorm",),
}
SHAPES = {
    "distilbert": Shape(
        DistilBertConfig,
        ("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"),
        ("q_lin", "v_lin"),
        ("sa_layer_norm", "output_layer_norm"),
    ),
    "bert-base": Shape(BertConfig, **_BERT),
    # The shape of TinyLlama, with about 1.1 billion parameters.
    "decoder-1b": Shape(
        lambda: LlamaConfig(
            vocab_size=32000,
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=22,
            num_attention_heads=32,
            num_key_value_heads=4,
        ),
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        ("q_proj", "v_proj"),
        ("input_layernorm", "post_attention_layernorm"),
        batch=4,
        length=512,
        causal=True,
        needs_gpu=True,
    ),
    # For tests of this script.
    "tiny": Shape(
        lambda: BertConfig(
            vocab_size=64,
            hidden_size=32,
            num_attention_heads=4,
            num_hidden_layers=2,
            intermediate_size=64,
            max_position_embeddings=32,
        ),
        **_BERT,
        batch=2,
        length=16,
    ),
}


@dataclass(frozen=True)
class Method:
    label: str
    wrap: Callable[[nn.Module, Shape, dict[str, Any]], nn.Module]
    ours: bool = False
    merges: bool = False
    saves: bool = True  # as an adapter


def _by_peft(config: type, **fields: Any) -> Callable[[nn.Module, Shape, dict[str, Any]], nn.Module]:
    """A method of PEFT, on the Linears that `Shape` has under the name `targets`. The task head is trained too."""
    targets = fields.pop("targets")

    def wrap(model: nn.Module, shape: Shape, extra: dict[str, Any]) -> nn.Module:
        # For classification, PEFT also trains `classifier`, but not DistilBERT's fresh `pre_classifier`, which the
        # other methods train.
        more = {"modules_to_save": ["pre_classifier"]} if hasattr(model, "pre_classifier") else {}
        task = "CAUSAL_LM" if shape.causal else "SEQ_CLS"
        made = config(task_type=task, target_modules=list(getattr(shape, targets)), **more, **fields)
        return peft.get_peft_model(model, made)

    return wrap


def _by_us(make: Callable[..., SensiConfig], **fields: Any) -> Callable[[nn.Module, Shape, dict[str, Any]], nn.Module]:
    def wrap(model: nn.Module, shape: Shape, extra: dict[str, Any]) -> nn.Module:
        # The score does not change the cost of a step. `extra` has the calibration data when wrapping is timed.
        more = extra or {"score": "random"}
        return peft.get_peft_model(model, make(task_type="CAUSAL_LM" if shape.causal else "SEQ_CLS", **fields, **more))

    return wrap


def _half_with_tokens(model: nn.Module, shape: Shape, extra: dict[str, Any]) -> nn.Module:
    """Trains tokens too. Two batches of random tokens have about as many different ones as a thousand sentences."""
    more = extra or {"score": "random", "calibration": shape.batches(2, torch.device("cpu")), "refit": False}
    return _by_us(SensiConfig, budget=0.5)(model, shape, more)


def _full(model: nn.Module, shape: Shape, extra: dict[str, Any]) -> nn.Module:
    return model


def _bitfit(model: nn.Module, shape: Shape, extra: dict[str, Any]) -> nn.Module:
    for name, parameter in model.named_parameters():
        head = name.startswith(("classifier", "pre_classifier", "score"))
        parameter.requires_grad_(head or name.endswith(".bias"))
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("This model has no biases.")
    return model


METHODS = {
    "full": Method("full fine-tuning", _full, saves=False),
    "bitfit": Method("BitFit", _bitfit, saves=False),
    "ln": Method("LN tuning", _by_peft(peft.LNTuningConfig, targets="norms")),
    "lora_qv": Method("LoRA r=8, q and v", _by_peft(peft.LoraConfig, r=8, targets="query_value"), merges=True),
    "lora_all": Method("LoRA r=8, all linear", _by_peft(peft.LoraConfig, r=8, targets="linears"), merges=True),
    "adalora": Method(
        "AdaLoRA r=8, all linear",
        _by_peft(peft.AdaLoraConfig, init_r=12, target_r=8, total_step=1000, tinit=100, tfinal=100, targets="linears"),
        merges=True,
    ),
    "shira": Method("SHiRA r=8, all linear", _by_peft(peft.ShiraConfig, r=8, targets="linears"), merges=True),
    "supertuning": Method(
        "Supertuning 1 %, all linear",
        _by_peft(peft.SupertuningConfig, sparsity=0.99, targets="linears"),
        merges=True,
    ),
    "half": Method("budget 0.5", _by_us(SensiConfig, budget=0.5), ours=True, merges=True),
    "half_tokens": Method("budget 0.5, tokens of the data", _half_with_tokens, ours=True, merges=True),
    "half_flops": Method(
        "budget 0.5 of the FLOPs", _by_us(SensiConfig, budget={"flops": 0.5}), ours=True, merges=True
    ),
    "tenth": Method(
        "trainable 0.1, units", _by_us(SensiConfig, budget={"trainable": 0.1}, update="dense"), ours=True, merges=True
    ),
    "tenth_small": Method(
        "trainable 0.1, units, base dropped",
        _by_us(SensiConfig, budget={"trainable": 0.1}, update="dense", keep_base=False),
        ours=True,
        merges=True,
    ),
    "hundredth": Method(
        "trainable 0.01, units",
        _by_us(SensiConfig, budget={"trainable": 0.01}, update="dense"),
        ours=True,
        merges=True,
    ),
    # The update is the default with other scores than the random ones of `_by_us`.
    "tenth_low_rank": Method(
        "trainable 0.1", _by_us(SensiConfig, budget={"trainable": 0.1}, update="low_rank"), ours=True, merges=True
    ),
    "hundredth_low_rank": Method(
        "trainable 0.01", _by_us(SensiConfig, budget={"trainable": 0.01}, update="low_rank"), ours=True, merges=True
    ),
    "both": Method(
        "FLOPs 0.5, trainable 0.01, units",
        _by_us(SensiConfig, budget={"flops": 0.5, "trainable": 0.01}, update="dense"),
        ours=True,
        merges=True,
    ),
    "both_low_rank": Method(
        "FLOPs 0.5, trainable 0.01",
        _by_us(SensiConfig, budget={"flops": 0.5, "trainable": 0.01}, update="low_rank"),
        ours=True,
        merges=True,
    ),
    "far10": Method("FAR10", _by_us(recipes.far), ours=True, merges=True),
    "far10_small": Method("FAR10, base dropped", _by_us(recipes.far, keep_base=False), ours=True, merges=True),
    "far10_frozen": Method("FAR10, embeddings frozen", _by_us(recipes.far, embeddings=False), ours=True, merges=True),
    "learner64": Method("Learner64", _by_us(recipes.learners, rank=64, priming_epochs=0), ours=True, merges=True),
    "dsee": Method("DSEE r=16", _by_us(recipes.dsee, support="magnitude"), ours=True, merges=True),
}
