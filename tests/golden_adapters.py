"""Small golden adapters of every recipe and stored type. Every later version must load them to the same logits.

    python tests/golden_adapters.py

adds the adapters that are missing in `tests/golden`, with their logits. It never changes an adapter that is there.
When the format changes, old adapters stay, and new names are added here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from peft_sensi import SensiConfig, recipes


FOLDER = Path(__file__).parent / "golden"
LOGITS = FOLDER / "logits.json"

ADAPTERS: dict[str, Callable[[], SensiConfig]] = {
    "sensi_bert": lambda: recipes.sensi_bert(0.5, score="magnitude", task_type="SEQ_CLS", multiple_of=1),
    "sensi_bert_sublayers": lambda: recipes.sensi_bert(
        0.7, score="magnitude", granularity="tensor", task_type="SEQ_CLS", priming_steps=0
    ),
    "sensi_bert_during_cuts": lambda: recipes.sensi_bert(
        0.5, score="magnitude", trim="in cuts", task_type="SEQ_CLS", multiple_of=1
    ),
    "far": lambda: recipes.far(0.25, score="magnitude", task_type="SEQ_CLS"),
    "learners": lambda: recipes.learners(2, priming_epochs=1, task_type="SEQ_CLS"),
    "dsee": lambda: recipes.dsee(2, 5, support="magnitude", task_type="SEQ_CLS"),
    "dsee_unstructured": lambda: recipes.dsee(
        2, 5, mask="unstructured", sparsity=0.3, support="magnitude", task_type="SEQ_CLS"
    ),
    "l0_close": lambda: recipes.l0_close(0.3, score="magnitude", task_type="SEQ_CLS"),
    "binary_mask": lambda: recipes.binary_mask(0.2, task_type="SEQ_CLS"),
    "binary_mask_bits": lambda: recipes.binary_mask(0.2, task_type="SEQ_CLS"),
    "trim_and_tune": lambda: SensiConfig(
        budget={"flops": 0.6, "trainable": 0.2}, score="magnitude", task_type="SEQ_CLS", multiple_of=1
    ),
    "trim_and_tune_bfloat16": lambda: SensiConfig(
        budget={"flops": 0.6, "trainable": 0.2}, score="magnitude", task_type="SEQ_CLS", multiple_of=1
    ),
    "trim_and_tune_int8": lambda: SensiConfig(
        budget={"flops": 0.6, "trainable": 0.2}, score="magnitude", task_type="SEQ_CLS", multiple_of=1
    ),
    "low_rank_scaled": lambda: SensiConfig(update="low_rank", rank=2, scale=0.5, task_type="SEQ_CLS"),
    "dsee_int8": lambda: recipes.dsee(2, 5, support="magnitude", task_type="SEQ_CLS"),
    "without_base": lambda: SensiConfig(
        budget=0.5, score="magnitude", keep_base=False, task_type="SEQ_CLS", multiple_of=1
    ),
}
ADAPTERS["tokens"] = lambda: SensiConfig(
    budget=0.5,
    score="magnitude",
    calibration=[{"input_ids": torch.arange(3, 15).reshape(2, 6), "labels": torch.tensor([0, 1])}],
    refit=False,
    task_type="SEQ_CLS",
    multiple_of=1,
)
STORED = {"binary_mask_bits": "bits", "trim_and_tune_bfloat16": "bfloat16"}
STORED |= {"trim_and_tune_int8": "int8", "dsee_int8": "int8"}


def golden_base() -> BertForSequenceClassification:
    """A model whose weights follow from a formula, so that they do not depend on a random generator."""
    config = BertConfig(
        vocab_size=24,
        hidden_size=16,
        num_attention_heads=4,
        num_hidden_layers=1,
        intermediate_size=24,
        max_position_embeddings=12,
        num_labels=2,
        pad_token_id=0,
        attn_implementation="eager",
    )
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        for index, (name, parameter) in enumerate(sorted(model.named_parameters())):
            parameter.copy_(formula(parameter, index) + (1.0 if "LayerNorm.weight" in name else 0.0))
    return model.eval()


def formula(like: torch.Tensor, index: int) -> torch.Tensor:
    """Numbers between -0.5 and 0.5, rounded so that the last bit of a sine does not matter."""
    steps = torch.arange(like.numel(), dtype=torch.float64)
    values = torch.sin(steps * (0.7 + 0.011 * index) + steps.square() * 0.013 + index) / 2
    return values.round(decimals=3).reshape(like.shape).to(like.dtype)


@torch.no_grad()
def golden_logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(1, 21).reshape(4, 5)
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    return model.eval()(input_ids=ids, attention_mask=mask).logits


def make(name: str) -> PeftModel:
    model = get_peft_model(golden_base(), ADAPTERS[name]())
    with torch.no_grad():
        for index, (key, parameter) in enumerate(sorted(model.named_parameters())):
            if parameter.requires_grad:
                parameter.add_(formula(parameter, index), alpha=0.2)
            elif ".sensi_gate." in key:
                parameter[::3] = 0
    if name in STORED:
        model.base_model.compress(STORED[name])
    return model


def main() -> None:
    logits = json.loads(LOGITS.read_text()) if LOGITS.exists() else {}
    for name in ADAPTERS:
        if not (FOLDER / name).exists():
            model = make(name)
            model.peft_config["default"].base_model_name_or_path = "golden"
            model.save_pretrained(FOLDER / name)
            (FOLDER / name / "README.md").unlink(missing_ok=True)
            logits[name] = golden_logits(model).tolist()
            size = sum(path.stat().st_size for path in (FOLDER / name).iterdir())
            print(f"{name}: {size:,} bytes", file=sys.stderr)
    LOGITS.write_text(json.dumps(logits, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
