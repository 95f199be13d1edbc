"""Which modules an adapter tunes, which it saves whole, and the defaults of `also_train` and `update`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Literal

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..anatomy.build import build_anatomy
from ..anatomy.linears import bias_of, features
from ..anatomy.modules import (
    base_of,
    embedding_of,
    input_embedding,
    is_base_parameter,
    is_norm,
    linear_of,
    name_in_base,
)
from ..anatomy.task_heads import task_head, transformers_in
from ..anatomy.units import Anatomy
from ..planning.budget import allowance
from ..planning.plan import Plan
from ..utils.errors import SensiError
from .config import RunInputs, SensiConfig


# The largest `trainable` limit for which `update=None` means "low_rank", as a share of the values of the targeted
# weights. With more values, the gradients of the low-rank factors cost more than those of the whole weights.
LOW_RANK_SHARE = 0.5
# The same for a limit beside others that trim, as a share of the base's parameters.
LOW_RANK_SHARE_TRIMMED = 0.02


def targets_of(model: nn.Module, config: SensiConfig) -> frozenset[str]:
    """Names of the modules that may be tuned, by PEFT's own matching.

    Modules inside adapter layers do not count, nor those inside modules that another adapter saves whole.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    inside = tuple(f"{n}." for n, m in modules.items() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper))
    return frozenset(_matching(model, config, (name for name in modules if not name.startswith(inside))))


def _matching(model: nn.Module, config: SensiConfig, names: Iterable[str]) -> Iterator[str]:
    """Those of the `names` that PEFT matches with the targets, and that the adapter does not save whole."""
    saved, matching = saved_whole(model, config), copy.copy(config)
    matching.modules_to_save = None
    return (name for name in names if check_target_module_exists(matching, name) and not saved(name))


def name_targets(model: nn.Module, config: SensiConfig) -> frozenset[str]:
    """`targets_of`, after the config's regular expressions are replaced by the names that they match.

    Names are what an adapter saves. `also_train=["tokens"]` adds the name of the input embeddings, and a
    user's plan those of the embeddings whose tokens it has.
    """
    targets = targets_of(model, config)
    if isinstance(config.target_modules, str) or isinstance(config.exclude_modules, str):
        config.target_modules, config.exclude_modules = set(targets), None  # type: ignore[assignment]
        # A name also matches every path that ends with it.
        config.exclude_modules = set(targets_of(model, config) - targets) or None  # type: ignore[assignment]
        if targets_of(model, config) != targets:
            raise SensiError(
                "The regular expression chooses between modules that PEFT cannot tell apart by name, so the adapter "
                "could not be saved: give a list of names instead."
            )
    tables = set[str]()
    if config.plan is not None and not config.from_file:  # a file lists its targets
        tables = {name.removesuffix(".tokens") for name in config.plan["groups"] if name.endswith(".tokens")}
    elif config.plan is None and "tokens" in (config.also_train or ()):
        if (table := input_embedding(model)) is None:
            raise SensiError(
                "'tokens' in `also_train` needs input embeddings that no other module shares and that only look up "
                "rows, but this model has none: leave 'tokens' out."
            )
        tables = {name_in_base(table)}
    if tables:
        config.target_modules = {*(config.target_modules or ()), *tables}  # type: ignore[assignment]
        targets = targets_of(model, config)
    return targets


def anatomy_of(model: nn.Module, config: SensiConfig, targets: frozenset[str]) -> Anatomy:
    """The model's groups at the granularity of the config."""
    whole: Literal["", "sublayers", "tensors"] = ""
    if config.granularity == "tensor":
        whole = "sublayers" if config.limits.trims else "tensors"
    return build_anatomy(model, targets, config.layouts(), whole)


def plan_of(model: nn.Module, config: SensiConfig) -> Plan:
    """The plan that a config holds in packed form. Raises `SensiLoadError` if it does not fit this model."""
    targets = targets_of(model, config)
    return described(Plan.from_dict(config.plan, anatomy_of(model, config, targets), targets), config)


def described(plan: Plan, config: SensiConfig) -> Plan:
    """The plan with what only the config knows: predicted latencies, and the update beside tuned units in words."""
    names = {"low_rank": "low-rank", "sparse": "sparse", "mask": "binary mask"}
    parts = [part for part in config.parts if part in names]
    sizes = {
        "low_rank": f"rank {config.rank}",
        "sparse": f"{config.sparse} values each",
        "mask": f"{100 * (config.sparsity or 0):.3g}% of the weights removed",
    }
    words = ", ".join([" + ".join(names[part] for part in parts), *(sizes[part] for part in parts)])
    return replace(plan, latency=config.latency or {}, update=words)


def check_targets(model: nn.Module, config: SensiConfig, targets: frozenset[str], anatomy: Anatomy) -> None:
    """Raises `SensiError` if a target shares its weight with embeddings, or is one that the adapter cannot reach."""
    if taken := sorted(_matching(model, config, _inside_saved(model))):
        raise SensiError(
            f"The target {taken[0]!r} is a module, or inside one, that another adapter of this model saves whole, so "
            f"this one cannot change it: name it in `exclude_modules` (if it holds the input embeddings, leave "
            f'"tokens" out of `also_train`), or add this adapter to a base of its own.'
        )
    if tied := tied_to_embeddings(model, targets):
        raise SensiError(
            f"The target {tied[0]!r} is tied to the embeddings and cannot be trained separately: leave it out of "
            f"`target_modules`."
        )
    if any(g.kind == "token" for g in anatomy.groups) and not config.tunes_units:
        raise SensiError(
            f"`target_modules` has an embedding. Its tokens are units of a dense update, so update={config.update!r} "
            f"cannot reach them: use update='dense', or leave the embedding out."
        )


def tied_to_embeddings(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of these modules that share their weight with an embedding; of embeddings, with any other module."""
    modules = {id(m): m for m in map(base_of, model.modules())}.values()
    tied = []
    for name in sorted(names):
        target = base_of(model.get_submodule(name))
        in_table = isinstance(target, nn.Embedding)
        others = [m for m in modules if m is not target and (in_table or isinstance(m, nn.Embedding))]
        weight = getattr(target, "weight", None)
        if weight is not None and any(getattr(other, "weight", None) is weight for other in others):
            tied.append(name)
    return tied


def _inside_saved(model: nn.Module) -> set[str]:
    """Names in the base model of the modules with weights that adapters save whole, or that are inside of such."""
    modules = dict(model.named_modules())
    inside = tuple(f"{name}." for name, module in modules.items() if isinstance(module, AuxiliaryTrainingWrapper))
    with_weights = (name for name in modules if name.startswith(inside) and modules[name]._parameters)
    return set(map(name_in_base, with_weights))


def also_saved(model: nn.Module, blocks: Anatomy, config: SensiConfig, but_frozen: bool) -> list[str]:
    """Names of the base modules outside the blocks that `also_train` trains, for PEFT's `modules_to_save`.

    With `but_frozen`, modules that require no gradients are left out, because the user has frozen them.
    Modules inside one that is saved whole, such as the norm of a pooler, are left out: PEFT's wrappers must not be
    nested.
    """
    also_train = config.also_train or []
    head = tuple(f"{name}." for name in task_head(model))
    modules = {
        name: base_of(module)
        for name, module in model.named_modules()
        if is_base_parameter(name)
        and not {"original_module", "base_layer"} & set(name.split("."))
        and not f"{name}.".startswith(head)
    }
    found = []
    if "norms" in also_train and blocks.groups:
        found += [name for name, module in modules.items() if is_norm(module)]
    if "pooler" in also_train and head:
        bases = [getattr(model, "base_model_prefix", ""), *transformers_in(model)]
        poolers = [path for base in dict.fromkeys(bases) if (path := f"{base}.pooler") in modules]
        found += [path for path in poolers if any(True for _ in modules[path].parameters())]
    if "embeddings" in also_train:
        output = embedding_of(model, "output")
        embeddings = [name for name, module in modules.items() if isinstance(module, nn.Embedding)]
        weights = {id(modules[name].weight) for name in embeddings}
        if len(weights) < len(embeddings) or (output is not None and id(output.weight) in weights):
            raise SensiError(
                "The embeddings are tied to the output layer or to each other and cannot be trained separately: leave "
                '"embeddings" out of `also_train`.'
            )
        found += embeddings
    if but_frozen:
        found = [name for name in found if any(p.requires_grad for p in modules[name].parameters())]
    saved, inside = saved_whole(model, config), tuple(f"{name}." for name in found)
    return [n for n in dict.fromkeys(found) if not saved(n.rpartition(".")[0]) and not n.startswith(inside)]


def add_modules_to_save(config: SensiConfig, names: list[str]) -> None:
    config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *names])) or None


def name_saved_modules(model: nn.Module, config: SensiConfig) -> None:
    """Replaces names in `modules_to_save` by paths, where PEFT would wrap a module inside another that it wraps.

    PEFT matches the ends of paths, also within a name: "embeddings" fits BERT's `embeddings` and the
    `word_embeddings` inside of it. A file with both could not be loaded.
    """
    heads = task_head(model)  # which is always saved whole
    paths = dict.fromkeys(name_in_base(name) for name, _ in model.named_modules() if name)
    names = config.modules_to_save or []
    fits = {name: [] if name in heads else [path for path in paths if path.endswith(name)] for name in names}
    wholes = tuple(f"{path}." for path in (*heads, *(path for found in fits.values() for path in found)))
    named: list[str] = []
    for name, found in fits.items():
        outermost = [path for path in found if not path.startswith(wholes)]
        exact = all(f".{path}".endswith(f".{name}") for path in found)
        named += [name] if exact and outermost == found else outermost
    config.modules_to_save = list(dict.fromkeys(named)) or None


def saved_whole(model: nn.Module, config: SensiConfig) -> Callable[[str], bool]:
    """A function of a module's path: whether `modules_to_save` names this module or one that contains it.

    PEFT matches names with every part of a path. Only the task head is matched as a whole path, because it can have
    any name: in a `torch.nn.Sequential` it is a number, like the layers of the transformer.
    """
    names, heads = config.modules_to_save or [], set(task_head(model))
    exact = tuple(f"{name}." for name in names if name in heads)
    others = [name for name in names if name not in heads]
    return lambda path: f"{path}.".startswith(exact) or any(f".{name}." in f".{path}." for name in others)


def bias_values(model: nn.Module, config: SensiConfig, targets: Iterable[str]) -> int:
    """Number of values in the biases of the targeted Linears if `also_train` has "biases", otherwise 0."""
    biases = [bias_of(linear_of(model, name)) for name in targets] if "biases" in (config.also_train or ()) else []
    return sum(bias.numel() for bias in biases if bias is not None)


def low_rank_values(model: nn.Module, config: SensiConfig, targets: Iterable[str]) -> int:
    """The most values that a low-rank term beside dense units can have: those of the whole Linears. Otherwise 0."""
    if config.rank is None or not (config.tunes_units and "low_rank" in config.parts):
        return 0
    return config.rank * sum(sum(features(linear_of(model, name))) for name in targets)


def default_also_train(
    model: nn.Module, config: SensiConfig, inputs: RunInputs, blocks: Anatomy, partly_frozen: bool
) -> list[str]:
    """What `also_train=None` stands for. The list is empty unless dense units are tuned without a `trainable` limit.

    It has "tokens" only if the run's inputs show which tokens matter, and if the user has not frozen the embeddings of
    a model that is `partly_frozen`, and if no other adapter saves them whole.
    """
    dense = config.tunes_units and config.retention is None
    if not dense or config.plan is not None or config.limits.trainable is not None or not blocks.groups:
        return []
    also = ["norms", "output_biases", "pooler"]
    table = input_embedding(model)
    ranks_tokens = config.update != "dense+low_rank" and config.granularity == "unit" and config.score != "movement"
    if table is None or not ranks_tokens or saved_whole(model, config)(table):
        return also
    if name_in_base(table) in _inside_saved(model):  # by another adapter
        return also
    if partly_frozen and not any(p.requires_grad for p in base_of(model.get_submodule(table)).parameters()):
        return also
    known = inputs.calibration is not None if inputs.scores is None else f"{table}.tokens" in inputs.scores.values
    return [*also, "tokens"] if known else also


def default_update(
    model: nn.Module, config: SensiConfig, inputs: RunInputs, anatomy: Anatomy, targets: frozenset[str], saved: int
) -> str:
    """The value of `update=None`: `dense`, or `low_rank` under most `trainable` limits (see `LOW_RANK_SHARE`).

    Dense units change some places of the model, while low-rank terms of as many values change all of them
    (`examples/benchmarks/quality.py` measures the gain). Every field that asks for units gives `dense`: another score
    than the default, `tuned_layers`, tokens and others; so does a limit without room for rank 1. `saved` is the number
    of values of base modules that are trained whole.
    """
    limit = config.limits.trainable
    score = config.score if inputs.scores is None else inputs.scores.method
    asks = config.plan, config.tuned_layers, config.schedule, config.sparsity
    if any(group.kind == "token" for group in anatomy.groups):
        return "dense"
    if limit is None or any(a is not None for a in asks) or score != "fisher" or config.granularity != "unit":
        return "dense"
    allowed = allowance(limit, anatomy.total_params)
    shapes = [features(linear_of(model, name)) for name in targets]
    has_room = saved + bias_values(model, config, targets) + sum(map(sum, shapes)) <= allowed
    most = LOW_RANK_SHARE * sum(map(math.prod, shapes))
    if config.limits.trims:
        most = LOW_RANK_SHARE_TRIMMED * anatomy.total_params
    return "low_rank" if has_room and allowed <= most else "dense"
