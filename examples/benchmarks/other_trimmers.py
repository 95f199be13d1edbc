"""Other ways to make a model smaller: the pruning of another library, and removing whole layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice

import torch
from torch import nn

from peft_sensi import SensiConfig


class BudgetMissed(ValueError):
    """The method cannot meet the requested size. Its row is skipped."""


def torch_pruning(base: nn.Module, calibration: Iterable[Mapping[str, torch.Tensor]], budget: float) -> nn.Module:
    """Torch-Pruning (Fang et al. 2023, arXiv 2301.12900) with its Taylor importance, for a BERT.

    Heads are ranked over all layers, and so are neurons. The share `budget` of each is kept. The library never removes
    all heads of a layer. If its ranking would do so, it keeps all heads of this layer, and a small budget is exceeded.

    Raises:
        BudgetMissed: The budget is exceeded by more than one percent of the blocks' matrices.
    """
    import torch_pruning as tp

    heads, stays = {}, []
    for name, module in base.named_modules():
        if name.endswith((".query", ".key", ".value")):
            heads[module] = base.config.num_attention_heads
        elif isinstance(module, nn.Embedding | nn.Linear) and not name.endswith("intermediate.dense"):
            stays.append(module)  # these determine the width between blocks
    batches = list(islice(calibration, SensiConfig().calibration_steps))  # as many as `SensiConfig` scores
    pruner = tp.pruner.BasePruner(
        base,
        example_inputs=dict(batches[0]),
        importance=tp.importance.GroupTaylorImportance(),
        global_pruning=True,
        isomorphic=True,  # one ranking for heads and one for neurons
        pruning_ratio=1 - budget,
        head_pruning_ratio=1 - budget,
        prune_num_heads=True,
        prune_head_dims=False,
        num_heads=heads,
        ignored_layers=stays,
        output_transform=lambda output: output.logits,
    )
    whole = _matrices(base)
    for batch in batches:
        base(**batch).loss.backward()
    pruner.step()
    base.zero_grad()
    left = _matrices(base) / whole
    if left > budget + 0.01:
        raise BudgetMissed(f"Torch-Pruning keeps {left:.0%}, but the budget is {budget:.0%}.")
    return base


def lower_layers(base: nn.Module, budget: float) -> nn.Module:
    """Keeps only the lower layers: the simplest smaller student (Sajjad et al. 2023, arXiv 2004.03844), for a BERT.

    Raises:
        BudgetMissed: The budget is not a whole number of layers.
    """
    layers = base.base_model.encoder.layer
    count = budget * len(layers)
    if count != int(count):
        raise BudgetMissed(f"{budget:g} of {len(layers)} layers is not a whole number of layers.")
    base.base_model.encoder.layer = layers[: int(count)]
    base.config.num_hidden_layers = int(count)
    return base


def _matrices(base: nn.Module) -> int:
    return sum(p.numel() for p in base.base_model.encoder.parameters() if p.dim() > 1)
