"""Tiny random models, batches with real padding, and the few steps that most tests share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    LlamaConfig,
    RobertaConfig,
)

from peft_sensi import LatencyTable, SensiConfig
from peft_sensi.anatomy.build import build_anatomy
from peft_sensi.anatomy.latency_points import kinds_of, points_of, table_from
from peft_sensi.utils.timing import Timing


FAMILIES = ("bert", "roberta", "electra", "distilbert")
VOCABULARY = 64
LABELS = 3
AUTO = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
    "MASKED_LM": AutoModelForMaskedLM,
    "FEATURE_EXTRACTION": AutoModel,
}

# The three kinds of budget: everything that is left is tuned, nothing is trimmed, and both cuts at once.
TRIM = {"budget": 0.5}
TUNE = {"budget": {"trainable": 0.1}, "update": "dense"}
BOTH = {"budget": {"flops": 0.6, "trainable": 0.08}}
BUDGETS = {"trim": TRIM, "tune": TUNE, "both": BOTH}


def only_slow(*values: Any) -> list[Any]:
    """Parameters for which a test runs in `make slow` only."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def some_slow(values: Iterable[Any], *slow: str) -> list[Any]:
    """All values as parameters. Those with a name in `slow` are much like others, and run in `make slow` only."""
    values = list(values)
    assert set(slow) < set(map(str, values))
    return [pytest.param(value, marks=pytest.mark.slow if str(value) in slow else ()) for value in values]


def tiny_config(family: str, **changes: Any) -> Any:
    common = {"vocab_size": VOCABULARY, "num_labels": LABELS, "pad_token_id": 0}
    usual = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 40,
    }
    if family == "distilbert":
        short = {"hidden_size": "dim", "num_attention_heads": "n_heads", "num_hidden_layers": "n_layers",
                 "intermediate_size": "hidden_dim"}  # fmt: skip
        usual = {short.get(name, name): value for name, value in usual.items()}
        changes = {short.get(name, name): value for name, value in changes.items()}
    if family == "electra":
        usual["embedding_size"] = 16
    if family == "llama":
        usual["num_key_value_heads"] = 2
    classes = {"bert": BertConfig, "roberta": RobertaConfig, "electra": ElectraConfig, "distilbert": DistilBertConfig,
               "llama": LlamaConfig}  # fmt: skip
    return classes[family](**{**common, **usual, **changes})


def tiny_model(
    family: str = "bert",
    task: str = "SEQ_CLS",
    *,
    seed: int = 0,
    lively: bool = True,
    dtype: Any = None,
    **changes: Any,
) -> Any:
    """A random model in evaluation mode; the same arguments give the same weights, whatever the random state.

    `lively` makes weights and biases large enough for all parts to matter. With the stock initialization, heads and
    neurons hardly change the output, so a test could pass with a wrong result.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fixed = {"num_labels": 2} if task == "QUESTION_ANS" else {}
        model = AUTO[task].from_config(tiny_config(family, **{**fixed, **changes}))
        if lively:
            with torch.no_grad():
                for module in model.modules():
                    if isinstance(module, nn.Linear):
                        module.weight.mul_(8.0)
                        if module.bias is not None:
                            module.bias.normal_(std=0.2)
    return model.to(dtype or torch.float32).eval()


def tiny_batches(
    count: int = 4,
    *,
    size: int = 4,
    length: int = 12,
    seed: int = 0,
    task: str = "SEQ_CLS",
    padding: bool = True,
    labels: bool = True,
) -> list[dict[str, torch.Tensor]]:
    """Batches in which every second example is shorter than the others, and padded."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(2, VOCABULARY, (size, length), generator=generator)
        mask = torch.ones(size, length, dtype=torch.long)
        if padding:
            ends = torch.randint(length // 3, length, (size,), generator=generator)
            ends[::2] = length
            mask = (torch.arange(length)[None] < ends[:, None]).long()
            ids = ids * mask
        batch = {"input_ids": ids, "attention_mask": mask}
        if labels and task == "SEQ_CLS":
            batch["labels"] = torch.randint(0, LABELS, (size,), generator=generator)
        elif labels and task == "TOKEN_CLS":
            values = torch.randint(0, LABELS, (size, length), generator=generator)
            batch["labels"] = torch.where(mask.bool(), values, -100)
        elif labels and task == "MASKED_LM":
            batch["labels"] = torch.where(mask.bool(), ids, -100)
        elif labels and task == "QUESTION_ANS":
            batch["start_positions"] = torch.randint(0, length // 3, (size,), generator=generator)
            batch["end_positions"] = torch.randint(0, length // 3, (size,), generator=generator)
        batches.append(batch)
    return batches


def wrap(model: nn.Module, adapter_name: str = "default", **config: Any) -> PeftModel:
    """Wraps with magnitude scores, for tests in which it does not matter which units are chosen."""
    config = {"score": "magnitude", "task_type": "SEQ_CLS", "priming_steps": 2, "calibration_steps": 3, **config}
    return get_peft_model(model, SensiConfig(**config), adapter_name=adapter_name)


def train(model: nn.Module, batches: list[dict[str, torch.Tensor]] | None = None, steps: int = 3) -> None:
    """Changes all trainable values visibly. Leaves the model in evaluation mode, without gradients."""
    batches = tiny_batches(steps, seed=7) if batches is None else batches
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # dropout
        for batch in batches[:steps]:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()


def trained(family: str = "bert", adapter_name: str = "default", **config: Any) -> PeftModel:
    model = wrap(tiny_model(family), adapter_name, **config)
    train(model)
    return model


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    batch = tiny_batches(1, seed=99, labels=False)[0] if batch is None else batch
    return model.eval()(**batch).logits.clone()


@contextmanager
def units_at_zero(model: nn.Module, plan: Any) -> Iterator[None]:
    """Inside the block, the activations of the units that `plan` trims are multiplied by zero."""
    handles = []
    for group in plan.anatomy.trimmable:
        gate = torch.from_numpy(np.repeat(plan.of(group) > 0, group.sides[-1].width)).float()
        output = model.get_submodule(group.output)
        handles.append(output.register_forward_pre_hook(lambda m, a, gate=gate: (a[0] * gate, *a[1:])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def load_from_subfolder(model: nn.Module, folder: Path) -> Any:
    """Transformers' `load_adapter`, past our checks of the file, which look at no subfolders."""
    try:
        return model.load_adapter(str(folder.parent), adapter_kwargs={"subfolder": folder.name})
    except ValueError as error:
        if "not found" not in str(error):
            raise
        pytest.skip("this version of Transformers finds no subfolder of a local folder")


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict(keep_vars=True).items()}


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Same names, dtypes and bits."""
    assert found.keys() == expected.keys()
    different = [n for n in expected if found[n].dtype != expected[n].dtype or not torch.equal(found[n], expected[n])]
    assert not different


def clone(value: Any) -> Any:
    return copy.deepcopy(value)


def interrupted(function: Callable[..., Any], at: int = 6) -> Callable[..., Any]:
    """The function, with a Ctrl-C when it is called the `at`-th time."""
    calls = count(1)

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return call


def made_up_table(model: nn.Module) -> LatencyTable:
    """What a measurement of a model with two layers would find: each of its four sublayers takes 1 of 10 ms."""
    kinds = kinds_of(build_anatomy(model))

    def seconds(counts: dict) -> float:
        return 6e-3 + sum(1e-3 * kind.groups * counts.get(kind.shape, kind.units) / kind.units for kind in kinds)

    times = {name: Timing(seconds(counts), 0.0) for name, counts in points_of(kinds).items()}
    about = {"model": "bert", "device": "x", "runtime": "torch", "versions": {}, "threads": 1, "dtype": "float32",
             "batch_size": 1, "sequence_length": 8, "phase": "prefill"}  # fmt: skip
    return table_from(kinds, Timing(1e-2, 0.0), times, about)
