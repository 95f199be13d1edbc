"""What a base model must be like, so that an adapter can be added; checked before anything is scored or changed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from difflib import get_close_matches

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from ..anatomy.linears import LINEARS, computed_by_hooks, is_plain, is_plain_embedding, is_quantized, obstacle
from ..anatomy.modules import base_of, embedding_of, in_several_places, is_base_parameter, name_in_base, not_linear
from ..anatomy.task_heads import HEAD_NAMES, head_parameters_outside_modules, is_bare, task_head
from ..anatomy.units import Anatomy, Group
from ..layers.layer import SensiLayer, base_is_dropped, layers_of
from ..layers.marks import LAYER_MARK
from ..utils import replicas
from ..utils.errors import SensiError
from .checkpoint import PLAN_KEY
from .config import SensiConfig
from .targets import saved_whole
from .wrapping import check_unmerged


# Parts of the names that adapted models have in their state dicts, beside those of the base.
_OUR_NAMES = (
    f"base_model.model.{PLAN_KEY}",
    LAYER_MARK,
    "base_layer.modules_to_save.original_module",
    *SensiLayer.tensor_names,
)


def check_addition(model: nn.Module, adapter_name: str, config: SensiConfig) -> None:
    """Raises `SensiError` if the model, as it is now, cannot take this adapter."""
    layers = layers_of(model).values()
    saved = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    present = {name for layer in layers for name in layer.sensi_slices}
    others = sorted(present - {adapter_name})
    if not adapter_name or "." in adapter_name or hasattr(nn.ModuleDict(), adapter_name):
        raise SensiError(
            f"An adapter cannot be called {adapter_name!r}: torch stores its parameters under this name, so the "
            f"name must not be empty, contain a dot, or be the name of an attribute of modules."
        )
    if isinstance(model, PeftModel):
        advice = "use `model.add_adapter(name, config)`" if others else "call `merge_and_unload()` or `unload()` first"
        raise SensiError(f"The model is wrapped by PEFT already: {advice}.")
    foreign = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and not isinstance(m, SensiLayer)]
    if foreign:
        raise SensiError(
            f"The model has an adapter of another PEFT method ({type(foreign[0]).__module__}). Merge or remove it "
            f"first: `merge_and_unload()` or `unload()`, and `delete_adapter` for adapters of Transformers."
        )
    if adapter_name in present or any(adapter_name in module.modules_to_save for module in saved):
        raise SensiError(
            f"The base holds an adapter called {adapter_name!r} already, from an earlier `get_peft_model` or "
            f"`from_pretrained`. Call `unload()` on that model first, load a fresh base, or give another "
            f"`adapter_name`."
        )
    _check_adapter_name(model, adapter_name, others)
    if any(layer.sensi_base_dropped for layer in layers):
        raise base_is_dropped("add another adapter")
    if not config.keep_base and others:
        raise SensiError(
            f"`keep_base=False` would drop the base values that the adapters {others} need: delete these "
            f"adapters, or keep the base."
        )
    if config.compressed is not None and not config.inference_mode:
        raise SensiError(
            f"The adapter's values are compressed to {config.compressed}, so it can be used but not trained: load "
            f"it without `is_trainable`, or train from the checkpoint that was compressed."
        )
    if lazy := [name for name, parameter in model.named_parameters() if is_lazy(parameter)]:
        raise SensiError(f"{lazy[0]!r} has no values yet. Run a forward pass first, which gives it a shape.")
    check_unmerged(model, "another one is added")
    replicas.check_whole(model)


def _check_adapter_name(model: nn.Module, adapter_name: str, others: list[str]) -> None:
    """Raises `SensiError` if PEFT could not tell an adapter's name from a part of a tensor's name.

    PEFT takes adapters' names out of the names of tensors when it saves, and leaves out what has another's name. So an
    adapter may be called like a module only if it is alone.
    """
    paths = [name for name, _ in (*model.named_parameters(), *model.named_buffers()) if is_base_parameter(name)]
    for name in (adapter_name, *others):
        if path := next((path for path in [*_OUR_NAMES, *(paths if others else ())] if name in path.split(".")), None):
            raise SensiError(
                f"An adapter cannot be called {name!r} here, because it is a part of the name {path!r}: PEFT could "
                f"not tell them apart, and would save this adapter, or others beside it, without some of their "
                f"values. Choose another name."
            )


def check_adapter_name_in_saved(model: nn.Module, config: SensiConfig, adapter_name: str) -> None:
    """Raises `SensiError` if PEFT could not tell the adapter's name from names in a module that is saved whole.

    PEFT takes the adapter's name out of a parameter's name when it saves, and puts it in when it loads.
    """
    saved = saved_whole(model, config)
    for path, module in model.named_modules():
        if saved(path) and not saved(path.rpartition(".")[0]):
            inside = {part for name, _ in base_of(module).named_parameters() for part in name.split(".")}
            if adapter_name in {path.rpartition(".")[2], *inside}:
                raise SensiError(
                    f"An adapter cannot be called {adapter_name!r} here: {path!r}, which it saves whole, has this "
                    f"name or has it inside, and PEFT could not load what it saves. Choose another name."
                )


def check_plain(model: nn.Module, names: Iterable[str]) -> None:
    """Raises an error if one of these Linears or embeddings is more than a weight and a bias.

    Warns if two of them share a weight.
    """
    shared, owners = in_several_places(model), dict[int, str]()
    for name in sorted(names):
        module = base_of(model.get_submodule(name))
        if id(module) in shared:
            raise held_twice(name)
        if (reason := obstacle(module)) is not None:
            if isinstance(module, nn.Embedding):
                way = f"leave it out, with exclude_modules=[{name.rpartition('.')[2]!r}]"
            else:
                way = (
                    "leave its attention or FFN out as a whole, with `exclude_modules` and a budget that trims "
                    "nothing, such as {'trainable': 0.01}"
                )
            raise SensiError(f"{name!r} cannot be adapted, because {reason}. Or {way}.")
        if not (is_plain(module) or is_plain_embedding(module)):
            raise not_linear(name, module)
        if (other := owners.setdefault(id(module._parameters["weight"]), name)) != name:
            warnings.warn(
                f"{other!r} and {name!r} are one parameter in the base. The adapter changes each of them on its own, "
                f"so they become different, and the merged model is larger than the base's number of parameters says.",
                stacklevel=2,
            )


def check_saved(model: nn.Module, config: SensiConfig) -> None:
    """Raises `SensiError` if a module that is to be saved whole cannot be copied. Warns of weights that it shares."""
    saved, shared = saved_whole(model, config), in_several_places(model)

    def whole_of(path: str) -> str:
        """The module that is saved whole and contains `path`; empty if there is none."""
        parts = path.split(".")
        return next(filter(saved, (".".join(parts[:i]) for i in range(1, len(parts) + 1))), "")

    for name, module in model.named_modules(remove_duplicate=False):
        if not saved(name):
            continue
        if id(module) in shared:
            raise held_twice(name)
        if isinstance(module, SensiLayer):
            raise SensiError(
                f"{whole_of(name)!r} cannot be trained and saved whole, because another adapter of this model changes "
                f"{name!r}: leave it out of `modules_to_save` and `also_train`, or add this adapter to a base of its "
                f"own."
            )
        if (reason := computed_by_hooks(module)) is not None:
            raise SensiError(f"{name!r} cannot be trained and saved whole, because {reason}.")
        if is_quantized(base_of(module)):
            raise SensiError(
                f"{name!r} is quantized, so it cannot be trained and saved whole. Load the base model without "
                f"quantizing it: `BitsAndBytesConfig(..., llm_int8_skip_modules=[{whole_of(name)!r}])` or "
                f"`TorchAoConfig(..., modules_to_not_convert=[{whole_of(name)!r}])`."
            )
    wholes: dict[int, dict[str, str]] = {}  # for each parameter, its name in each module that is saved whole
    for path, module in model.named_modules():
        whole = whole_of(path)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                wholes.setdefault(id(parameter), {}).setdefault(whole, f"{path}.{name}")
    for names in wholes.values():
        if len(names) > 1:
            one, other = list(names.values())[:2]
            warnings.warn(
                f"{one!r} and {other!r} are one parameter in the base. The adapter trains a copy of each module that "
                f"it saves whole, so they become different. To keep them equal, leave these modules out of "
                f"`modules_to_save`, or put them into one module.",
                stacklevel=2,
            )
            return


def check_saved_whole(model: nn.Module, config: SensiConfig, trimmed: list[Group]) -> None:
    """Raises `SensiError` if a module is to be saved whole whose units may be trimmed: one of these groups."""
    saved = saved_whole(model, config)
    if both := [name for group in trimmed for name in group.modules if saved(name)]:
        raise SensiError(
            f"`modules_to_save` has {both[0]!r}, whose units the budget may trim. A module that is saved whole keeps "
            f"its shape: leave it out of `modules_to_save`, or set a budget that trims nothing, such as "
            f"{{'trainable': 0.01}}."
        )


def warn_of_unknown_names(model: nn.Module, config: SensiConfig) -> None:
    """Warns of names that fit no module beside others that fit.

    That are all such names in `modules_to_save` and `exclude_modules`, and in `target_modules` those that are nearly
    the name of a module.
    """
    paths = [f".{name_in_base(name)}" for name, _ in model.named_modules() if name]
    for field in ("target_modules", "exclude_modules", "modules_to_save"):
        names = getattr(config, field) or ()
        # PEFT adds the usual names of heads, of which a model has one.
        wanted = () if isinstance(names, str) else set(names) - set(HEAD_NAMES)
        unknown = sorted(name for name in wanted if not any(path.endswith(f".{name}") for path in paths))
        if field == "target_modules":  # a list may have the names of several architectures, as those of our recipes
            unknown = [name for name in unknown if _nearly_in(name, paths)]
        if unknown:
            warnings.warn(
                f"`{field}` names {unknown[0]!r}, but no module of the model has this name, so it has no effect: is "
                f"it misspelled?",
                stacklevel=2,
            )


def _nearly_in(name: str, paths: list[str]) -> bool:
    """Whether a name differs by a letter or two from the end of a path."""
    parts = name.count(".") + 1
    return bool(get_close_matches(name, {".".join(path.split(".")[-parts:]) for path in paths}, n=1, cutoff=0.88))


def held_twice(name: str) -> SensiError:
    return SensiError(
        f"{name!r} is one module in several places of the model, and an adapter would replace it in one of them only. "
        f"Give each place a module of its own (`copy.deepcopy`), or leave it out: with `modules_to_save` and "
        f"`also_train`, or with `exclude_modules` and a budget that trims nothing, such as {{'trainable': 0.01}}."
    )


def check_quantized(linears: Iterable[nn.Module], config: SensiConfig) -> None:
    """Raises `SensiError` if one of the Linears is quantized and a setting would change its weights."""
    problem = "" if config.keep_base else "`keep_base=False` would have to cut its quantized weights"
    if config.phase == "cut":
        problem = "its units cannot be scored and masked for the cuts of `schedule`"
    if config.update == "mask" or config.sparsity is not None:
        problem = "its weights cannot be masked"
    if problem and any(is_quantized(linear) for linear in linears):
        raise SensiError(f"The base model is quantized: {problem}. Load the base model without quantization for that.")


def leave_frozen(model: nn.Module, names: set[str], chosen: bool) -> set[str]:
    """The Linears of `names` that the user has not frozen, if some are frozen and others are not.

    Names that the user has `chosen` all stay. A base that is frozen as a whole is only a base for adapters: other
    methods of PEFT expect it like that, and leave it like that.
    """
    trained = {name for name in names if _requires_grad(base_of(model.get_submodule(name)))}
    frozen = sorted(names - trained)
    if partly := sorted(name for name in trained if _has_frozen_part(base_of(model.get_submodule(name)))):
        warnings.warn(
            f"The weight or the bias of {len(partly)} modules was frozen before the wrap, such as in {partly[0]!r}. "
            f"They are trained all the same: units have both. Freeze a module as a whole to leave it out.",
            stacklevel=2,
        )
    if not trained or not frozen:
        return names
    what = f"{len(frozen)} modules were frozen before the wrap, such as {frozen[0]!r},"
    if chosen:
        warnings.warn(f"{what} but `target_modules` names them, so they are trained.", stacklevel=2)
        return names
    warnings.warn(f"{what} and stay frozen. To train them, name them in `target_modules`.", stacklevel=2)
    return trained


def is_partly_frozen(model: nn.Module, targets: Iterable[str]) -> bool:
    """Whether a Linear that is to be tuned requires gradients: then what does not was frozen by the user."""
    modules = [base_of(model.get_submodule(name)) for name in targets]
    return any(_requires_grad(module) for module in modules if not is_quantized(module))


def _has_frozen_part(module: nn.Module) -> bool:
    """Whether the weight requires gradients and the bias does not, or the other way round."""
    return not is_quantized(module) and len({parameter.requires_grad for parameter in module.parameters()}) > 1


def _requires_grad(module: nn.Module) -> bool:
    return is_quantized(module) or any(parameter.requires_grad for parameter in module.parameters())


def warn_of_frozen_linears(model: nn.Module, blocks: Anatomy, targets: Iterable[str], config: SensiConfig) -> None:
    """Warns about Linears outside of the blocks that are not trained, if nothing in the model looks like its head."""
    if not blocks.groups or task_head(model) or is_bare(model) or embedding_of(model, "output") is not None:
        return
    known = {*targets, *(name for group in blocks.groups for name in group.modules)}
    linears = [name for name, module in model.named_modules() if isinstance(base_of(module), LINEARS)]
    linears = [n for n in linears if not {"base_layer", "original_module", "modules_to_save"} & set(n.split("."))]
    saved = saved_whole(model, config)
    if left := [name for name in linears if name not in known and not saved(name)]:
        warnings.warn(
            f"The Linears outside of the blocks stay frozen, such as {left[0]!r}. If one is a new task head, name it "
            f"in `modules_to_save`.",
            stacklevel=2,
        )


def warn_of_statistics(model: nn.Module, config: SensiConfig) -> None:
    """Warns about batch norms that are not saved whole: the training changes their statistics all the same."""
    saved = saved_whole(model, config)
    norms = [
        name_in_base(path)
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats and is_base_parameter(path)
    ]
    if lost := [name for name in norms if not saved(name)]:
        warnings.warn(
            f"{lost[0]!r} is a batch norm ({len(lost)} of them in the base). In training mode, each forward pass "
            f"changes its statistics, but the adapter does not save them, so on a fresh base it computes something "
            f"else. Name it in `modules_to_save`, or keep it in evaluation mode while you train.",
            stacklevel=2,
        )


def head_to_save(model: nn.Module) -> list[str]:
    """The modules of the task head. Warns about parameters that look like a part of it and cannot be saved whole."""
    heads = task_head(model)
    if frozen := head_parameters_outside_modules(model):
        warnings.warn(
            f"{', '.join(map(repr, frozen[:3]))} {'are' if len(frozen) > 1 else 'is'} outside of the transformer and "
            f"stays frozen: PEFT trains and saves whole modules, and no module of the task head holds it. If it is "
            f"new, put it into a module of its own.",
            stacklevel=2,
        )
    fixed = [head for head in heads if not any(p.requires_grad for p in model.get_submodule(head).parameters())]
    if fixed and any(parameter.requires_grad for parameter in model.parameters()):
        warnings.warn(
            f"The task head {fixed[0]!r} was frozen before the wrap. An adapter trains the task head all the same.",
            stacklevel=2,
        )
    return heads
