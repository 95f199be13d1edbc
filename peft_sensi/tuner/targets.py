"""From a plan to what happens to each Linear, and what is trained beside the units."""

from __future__ import annotations

from typing import Literal

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

from ..anatomy.build import build_anatomy
from ..anatomy.linears import bias_of, features
from ..anatomy.modules import (
    base_of,
    embedding_of,
    input_embedding,
    is_base_parameter,
    is_shared,
    linear_of,
    task_head,
)
from ..anatomy.units import Anatomy
from ..planning.budget import allowance
from ..planning.plan import Plan
from ..utils.errors import SensiError
from .config import SensiConfig


LOW_RANK_SHARE = 0.02


def targets_of(model: nn.Module, config: SensiConfig) -> frozenset[str]:
    """Names of the modules that may be tuned: PEFT's own matching, adapter internals left out."""
    inside = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, BaseTunerLayer) and name)
    return frozenset(
        name
        for name, _ in model.named_modules()
        if name and not name.startswith(inside) and check_target_module_exists(config, name)
    )


def usually_also_trained(model: nn.Module, given: SensiConfig, blocks: Anatomy) -> list[str]:
    """What `also_train=None` means: something where nothing limits what is trained, and dense units are.

    Tokens only where somebody says which ones matter.
    """
    dense = given.tunes_units and given.retention is None
    if not dense or given.plan is not None or given.limits.trainable is not None or not blocks.groups:
        return []
    also = ["norms", "output_biases", "pooler"]
    table = input_embedding(model)
    ranks_tokens = given.update != "dense+low_rank" and given.granularity == "unit" and given.score != "movement"
    if table is None or not ranks_tokens or _is_saved_whole(table, given):
        return also
    known = given.calibration is not None if given.scores is None else f"{table}.tokens" in given.scores.values
    return [*also, "tokens"] if known else also


def _is_saved_whole(name: str, config: SensiConfig) -> bool:
    """Whether PEFT's `modules_to_save` names the module or one that it is in."""
    parts = name.split(".")
    paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(f".{path}".endswith(f".{saved}") for path in paths for saved in config.modules_to_save or ())


def check_tokens(config: SensiConfig, anatomy: Anatomy) -> None:
    """Raises `SensiError` where tokens cannot be trained in the way that the config asks for."""
    if any(g.kind == "token" for g in anatomy.groups) and not config.tunes_units:
        raise SensiError(
            f"`target_modules` has an embedding, whose tokens are tuned or not: update={config.update!r} cannot reach "
            f"them. Use update='dense', or leave it out."
        )


def refuse_tied(model: nn.Module, targets: frozenset[str]) -> None:
    """Raises `SensiError` when a target shares its weight with embeddings: tuning it would part the two."""
    embeddings = [m for m in map(base_of, model.modules()) if isinstance(m, nn.Embedding)]
    for name in sorted(targets):
        target = base_of(model.get_submodule(name))
        if isinstance(target, nn.Embedding):
            tied = is_shared(model, target)
        else:
            tied = any(table.weight is getattr(target, "weight", None) for table in embeddings)
        if tied:
            raise SensiError(
                f"The target {name!r} is tied to the embeddings and cannot be trained separately: leave it out of "
                f"`target_modules`."
            )


def name_targets(model: nn.Module, config: SensiConfig) -> frozenset[str]:
    """`targets_of`; regular expressions in the config become the names that they matched, which is what is saved.

    So does the `tokens` of `also_train`. Raises `SensiError` where names cannot say the same, or there are no tokens.
    """
    targets = targets_of(model, config)
    if isinstance(config.target_modules, str) or isinstance(config.exclude_modules, str):
        config.target_modules, config.exclude_modules = set(targets), None  # type: ignore[assignment]
        # A name also matches every path that ends with it.
        config.exclude_modules = set(targets_of(model, config) - targets) or None  # type: ignore[assignment]
        if targets_of(model, config) != targets:
            raise SensiError("The regular expression matches modules that lists of names cannot tell apart: give one.")
    if "tokens" in (config.also_train or ()) and config.plan is None:
        if (table := input_embedding(model)) is None:
            raise SensiError(
                "'tokens' in `also_train` needs input embeddings that no other module shares, and that look up rows "
                "and do nothing else: this model has none."
            )
        config.target_modules = {*(config.target_modules or ()), table}  # type: ignore[assignment]
        targets = targets_of(model, config)
    return targets


def anatomy_of(model: nn.Module, config: SensiConfig, targets: frozenset[str]) -> Anatomy:
    """The model's groups at the granularity of the config."""
    whole: Literal["", "sublayers", "tensors"] = ""
    if config.granularity == "tensor":
        whole = "sublayers" if config.limits.trims else "tensors"
    return build_anatomy(model, targets, config.layouts(), whole)


def plan_of(model: nn.Module, config: SensiConfig) -> Plan:
    """The plan that a config holds in packed form. Raises `SensiLoadError` when it does not fit this model."""
    targets = targets_of(model, config)
    return Plan.from_dict(config.plan, anatomy_of(model, config, targets), targets)


def also_saved(model: nn.Module, blocks: Anatomy, config: SensiConfig) -> list[str]:
    """Modules of the base that are trained whole beside the blocks, to be saved through PEFT's `modules_to_save`.

    Those inside a module that the user saves whole are saved with it: PEFT's wrappers must not be nested.
    """
    also_train = config.also_train or []
    head = tuple(f"{name}." for name in task_head(model))
    names = [
        name
        for name, _ in model.named_modules()
        if is_base_parameter(name) and "original_module" not in name.split(".") and not f"{name}.".startswith(head)
    ]
    modules = {name: base_of(model.get_submodule(name)) for name in names}
    found = []
    if "norms" in also_train and blocks.groups:
        found += [name for name, module in modules.items() if _is_norm(module)]
    if "pooler" in also_train and head:
        pooler = f"{model.base_model_prefix}.pooler"
        found += [name for name in names if name == pooler and any(True for _ in modules[name].parameters())]
    if "embeddings" in also_train:
        output = embedding_of(model, "output")
        embeddings = [name for name, module in modules.items() if isinstance(module, nn.Embedding)]
        if output is not None and any(modules[name].weight is output.weight for name in embeddings):
            raise SensiError("The embeddings are tied to the output layer and cannot be trained separately.")
        if len({id(modules[name].weight) for name in embeddings}) < len(embeddings):
            raise SensiError("The embeddings of both stacks are tied to each other and cannot be trained separately.")
        found += embeddings
    return [name for name in dict.fromkeys(found) if not _is_saved_whole(name.rpartition(".")[0], config)]


def values_of(model: nn.Module, saved: list[str]) -> int:
    """Number of values of base modules that are trained whole."""
    return sum(p.numel() for name in saved for p in base_of(model.get_submodule(name)).parameters())


def bias_values(model: nn.Module, config: SensiConfig, targets: frozenset[str]) -> int:
    """Number of values in the biases of all targeted Linears, where `also_train` asks for them; 0 elsewhere."""
    biases = [bias_of(linear_of(model, name)) for name in targets] if "biases" in (config.also_train or ()) else []
    return sum(bias.numel() for bias in biases if bias is not None)


def usual_update(
    model: nn.Module, config: SensiConfig, anatomy: Anatomy, targets: frozenset[str], always_trained: int
) -> str:
    """What `update=None` means: `dense`; `low_rank` under a `trainable` limit of at most 2 % that has room for it.

    So few dense units reach few places of the model, while a low-rank term reaches all of them
    (`examples/benchmarks/quality.py` has what that gains). Who asks for units (another score than the default,
    `tuned_layers`) gets them.
    """
    limit = config.limits.trainable
    score = config.score if config.scores is None else config.scores.method
    asks = config.plan, config.tuned_layers, config.schedule, config.sparsity
    if any(group.kind == "token" for group in anatomy.groups):
        return "dense"
    if limit is None or any(a is not None for a in asks) or score != "fisher" or config.granularity != "unit":
        return "dense"
    allowed = allowance(limit, anatomy.total_params)
    rank_1 = sum(sum(features(linear_of(model, name))) for name in targets)
    has_room = always_trained + bias_values(model, config, targets) + rank_1 <= allowed
    return "low_rank" if has_room and allowed <= LOW_RANK_SHARE * anatomy.total_params else "dense"


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and any(True for _ in module.parameters(recurse=False))
