"""The configuration of the method: PEFT's fields, and what one ranking and two cuts need."""

from __future__ import annotations

import copy
import enum
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import InitVar, dataclass, field
from typing import Any

from peft.config import PeftConfig
from peft.utils import CONFIG_NAME

from ..anatomy.layouts import BlockLayout
from ..layers.compression import KINDS
from ..planning.budget import Budget
from ..planning.packing import check_plan_dict
from ..planning.plan import Plan
from ..scoring.criteria import METHODS
from ..scoring.priming import OPTIMIZERS
from ..scoring.scores import Scores
from ..utils.checks import check_foreign, check_types, is_number, shown
from ..utils.errors import SensiError, SensiLoadError
from ..utils.files import find_weights, write_atomically
from .checkpoint import FORMAT_VERSION, check_values, config_mark, meaning
from .combinations import check_schedule, check_update


class SensiPeftType(enum.StrEnum):
    """PEFT's `PeftType` cannot be extended from outside; Transformers needs an enum member with `.value`."""

    SENSI = "SENSI"


ALSO_TRAIN = ("output_biases", "removed_biases", "biases", "norms", "pooler", "tokens", "embeddings")
GRANULARITIES = ("unit", "tensor", "weight")


class _NeverStored:
    """The types of what a `SensiConfig` holds while a model is wrapped; as fields they would be stored."""

    calibration: Iterable[Mapping[str, Any]] | None
    scores: Scores | None
    loss_fn: Any


@dataclass
class SensiConfig(_NeverStored, PeftConfig):
    """Configuration of [`SensiModel`]; every field has a default.

    Args:
        budget: A share in (0, 1] or a count of the prunable parameters, or a dict of limits on `params`, `flops` and
            `trainable` that all hold. `None` is 0.5 where the model has something to trim, otherwise everything
            targeted is tuned.
        score: `fisher`, `taylor`, `mask`, `movement`, `magnitude` or `random`.
        granularity: `unit` (heads, neurons, rows), `tensor` (a limit on parameters or FLOPs removes whole sublayers,
            one on trained values tunes whole Linears) or `weight` (only with an update of single weights).
        update: How the tuned part is parametrized: `dense` slices, `low_rank`, `sparse`, `low_rank+sparse`,
            `dense+low_rank`, or `mask` (see `updates`). `None` is `dense`, or `low_rank` where a `trainable` limit is
            small (see `slices.usual_update`), which wants LoRA's learning rates.
        rank: Of a low-rank update; by default the largest that a `trainable` limit allows.
        sparse: Number of trained values in each matrix.
        support: Where they are: `magnitude`, `random` or `decomposition`.
        sparsity: Share of the weights of each matrix that a mask removes.
        retention: Share of each FFN's neurons that are tuned; attention is then tuned whole.
        tuned_layers: Number of layers in which something is tuned: those with the best scores for their cost.
        compressed: How trained values are stored: `None` as they are, `"bits"` one bit for each masked weight,
            `"bfloat16"` or `"int8"` as differences from the base (see `compression`). Set by `SensiModel.compress`.
        schedule: What changes during training (see `schedule`); somebody must then step it.
        target_modules: What may be tuned, as in PEFT: names, a regular expression or `"all-linear"`. By default the
            Linears of all known blocks, or all Linears of an unknown model.
        exclude_modules: What may not be tuned.
        modules_to_save: Modules that are trained and saved whole. The task head of a classification-like task is
        added.
        also_train: What else of the base is trained: `output_biases` (of blocks whose kept units are all tuned),
            `removed_biases` (of those that have no unit left; cuts during training add it where it is needed),
            `biases` (all of targeted Linears), `norms`, `pooler`, `tokens` (the input embeddings of those that the
            calibration data has; under a `trainable` limit the most sensitive ones), `embeddings` (all, saved whole).
            By default output biases, norms, pooler and, with calibration data, tokens where dense units are tuned
            without a `trainable` limit, else nothing.
        calibration_steps: Batches that are scored, and that the refit uses.
        priming_steps: Steps of the short fine-tuning before gradients are taken. It is undone afterwards but for the
            task head, which starts from there, whatever the score; 0 for none.
        priming_lr: Learning rate in these steps.
        priming_optimizer: `adamw`, or `sign`, which needs no memory beside the weights (see `priming`).
        refit: Whether the survivors' output projections are refitted; `None` is yes where calibration data is given
            and everything that is kept is tuned.
        sequence_length: Tokens at which FLOPs are counted; by default the calibration batches' mean, else 128.
        multiple_of: Neurons are kept in steps of so many.
        min_units: Heads and neurons that stay in each block; 0 lets whole sublayers go.
        widths: `"free"`, or `"uniform"`: all blocks keep the same number of heads, and of neurons, so that a family's
            own config may be able to describe the merged model (see `save_merged`).
        blocks: Layouts of blocks that the library does not know ([`BlockLayout`] or dicts).
        keep_base: Whether the base stays whole inside; `False` keeps only what the adapter needs.
        seed: Of random scores, of dropout while priming and of random supports.
        init_weights: `False` starts from perturbed values (for tests).
        plan: A finished plan, which replaces budget and scores. Filled in when the model is wrapped.
        fingerprint: Statistics of the base, checked on load; `None` skips the check. Filled in as well.
        format_version: Of the adapter's files.
        calibration: Batches that `model(**batch)` turns into a loss (any iterable). Used once and never serialized.
        scores: [`Scores`] from `compute_scores`, instead of scoring again. Never serialized.
        loss_fn: Function of the model and a batch, for models whose output has no loss. Never serialized.

    Raises:
        SensiError: A field is malformed, or has no effect in this combination.
    """

    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    budget: float | dict[str, float] | None = field(default=None)
    score: str = field(default="fisher")
    granularity: str = field(default="unit")
    update: str | None = field(default=None)
    rank: int | None = field(default=None)
    sparse: int | None = field(default=None)
    support: str | None = field(default=None)
    sparsity: float | None = field(default=None)
    retention: float | None = field(default=None)
    tuned_layers: int | None = field(default=None)
    schedule: dict[str, Any] | None = field(default=None)
    compressed: str | None = field(default=None)
    also_train: list[str] | None = field(default=None)
    calibration_steps: int = field(default=24)
    priming_steps: int = field(default=40)
    priming_lr: float = field(default=1e-4)
    priming_optimizer: str = field(default="adamw")
    refit: bool | None = field(default=None)
    sequence_length: int | None = field(default=None)
    multiple_of: int = field(default=8)
    min_units: int = field(default=1)
    widths: str = field(default="free")
    blocks: list[Any] | None = field(default=None)
    keep_base: bool = field(default=True)
    seed: int = field(default=0)
    init_weights: bool = field(default=True)
    plan: Any = field(default=None)
    fingerprint: dict[str, Any] | None = field(default=None)
    format_version: int = field(default=FORMAT_VERSION)
    calibration: InitVar[Iterable[Mapping[str, Any]] | None] = None
    scores: InitVar[Scores | None] = None
    loss_fn: InitVar[Any] = None

    def __post_init__(self, calibration: Any, scores: Scores | None, loss_fn: Any) -> None:
        # PEFT's loaders pass on the file's own string, whichever class they are called on; nobody else gives one.
        self.from_file = type(self.peft_type) is str
        # Plain attributes and not fields: `asdict` would deep-copy a data loader, and JSON cannot hold one.
        self.calibration, self.scores, self.loss_fn = calibration, scores, loss_fn
        try:
            check_types(vars(self))
            if self.from_file:
                check_foreign(vars(self))
            super().__post_init__()
            self.peft_type = SensiPeftType.SENSI  # type: ignore[assignment]
            if isinstance(self.target_modules, list):
                self.target_modules = set(self.target_modules)  # type: ignore[assignment]
            if isinstance(self.exclude_modules, list):
                self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
            self._check()
        except ValueError as error:
            if self.from_file:
                raise SensiLoadError(f"{CONFIG_NAME}: {error}") from error
            raise
        if self.from_file:
            self.file_mark, self.file_meaning = config_mark(self), meaning(self)

    def _check(self) -> None:
        if self.format_version != FORMAT_VERSION or isinstance(self.format_version, bool):
            raise SensiLoadError(
                f"The adapter's format_version is {self.format_version!r}; this version of peft_sensi reads "
                f"{FORMAT_VERSION}. Upgrade with `pip install -U peft-sensi`."
            )
        if self.budget is not None:
            Budget.parse(self.budget)
        if self.score not in METHODS:
            raise SensiError(f"`score` must be one of {', '.join(METHODS)}, got {self.score!r}.")
        for name, least in _COUNTS.items():
            value = getattr(self, name)
            if value is None and name in ("sequence_length", "rank", "sparse", "tuned_layers"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
                raise SensiError(f"`{name}` must be a whole number of at least {least}, got {shown(value)}.")
        for name in ("sparsity", "retention"):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and 0 <= value < 1):
                raise SensiError(f"`{name}` must be a share in [0, 1), got {shown(value)}.")
        check_update(
            self.update or "dense",
            rank_follows=self.limits.trainable is not None and self.plan is None,
            rank=self.rank,
            sparse=self.sparse,
            support=self.support,
            sparsity=self.sparsity,
        )
        self._check_combination()
        possible = ("bits",) if self.update == "mask" else tuple(KINDS)
        if self.compressed is not None and self.compressed not in possible:
            raise SensiError(
                f"`compressed` must be None or one of {', '.join(possible)} with update={self.update!r}, got "
                f"{self.compressed!r}."
            )
        if self.compressed is not None and self.plan is None:
            raise SensiError(
                "`compressed` describes a finished adapter: call `model.base_model.compress(...)` instead."
            )
        if self.priming_lr <= 0:
            raise SensiError(f"`priming_lr` must be positive, got {self.priming_lr!r}.")
        if self.priming_optimizer not in OPTIMIZERS:
            raise SensiError(
                f"`priming_optimizer` must be one of {', '.join(OPTIMIZERS)}, got {self.priming_optimizer!r}."
            )
        if self.also_train is not None:
            if any(name not in ALSO_TRAIN for name in self.also_train):
                raise SensiError(f"`also_train` must be a list of {', '.join(ALSO_TRAIN)}, got {self.also_train!r}.")
            self.also_train = sorted(self.also_train)
            self._check_tokens()
        if self.scores is not None and not isinstance(self.scores, Scores):
            raise SensiError(
                f"`scores` must be a `Scores`, as `compute_scores` returns, got {type(self.scores).__name__}."
            )
        if self.loss_fn is not None and self.calibration is None:
            raise SensiError("`loss_fn` has no effect without `calibration`.")
        if self.refit and self.calibration is None and self.plan is None:
            raise SensiError("`refit=True` needs `calibration`: the survivors are fitted to activations.")
        if self.refit and self.limits.trainable is not None:
            raise SensiError("`refit=True` changes values that a `trainable` limit may freeze; drop one of the two.")
        if self.plan is not None and self.update is None:
            self.update = "dense"  # the plan was made for units
        if isinstance(self.plan, Plan):
            self.plan = self.plan.to_dict()
        if self.plan is not None:
            check_plan_dict(self.plan)
        self.layouts()

    def _check_tokens(self) -> None:
        if "tokens" not in (self.also_train or ()):
            return
        if "embeddings" in (self.also_train or ()):
            raise SensiError("`also_train` has 'tokens', some rows of the embeddings, and 'embeddings', all of them.")
        if not self.tunes_units or self.granularity != "unit":
            raise SensiError(
                "'tokens' in `also_train` are units of a dense update: use update='dense' and granularity='unit'."
            )
        if self.score == "movement":
            raise SensiError(
                "score='movement' is measured while priming, which leaves embeddings alone: it cannot rank 'tokens'."
            )

    def _check_combination(self) -> None:
        """Refuses what cannot be combined, and says why."""
        limits, update, dense = self.limits, self.update or "dense", self.tunes_units
        if self.granularity not in GRANULARITIES:
            raise SensiError(f"`granularity` must be one of {', '.join(GRANULARITIES)}, got {self.granularity!r}.")
        if self.granularity == "weight" and (dense or update == "low_rank"):
            raise SensiError(
                f"Single weights cannot be updated by {update!r}: use update='sparse' to tune some of them, or "
                f"update='mask' to remove some."
            )
        if self.granularity == "tensor" and limits.trims and limits.trainable is not None:
            raise SensiError("granularity='tensor' either removes sublayers or tunes Linears: give one kind of limit.")
        if self.granularity == "tensor" and not dense:
            raise SensiError(
                f"granularity='tensor' chooses what is tuned whole; update={update!r} tunes nothing whole."
            )
        if limits.trainable is not None and not dense and update != "low_rank":
            raise SensiError(
                f"A `trainable` limit chooses units to tune, or a rank; the size of a {update!r} update follows from "
                f"`rank`, `sparse` or the mask."
            )
        if limits.trainable is not None and update == "low_rank" and self.rank is not None and self.plan is None:
            raise SensiError("Give a `rank` or a `trainable` limit, from which the rank follows, but not both.")
        if self.retention is not None and (limits.trainable is not None or not dense):
            raise SensiError(
                "`retention` chooses the neurons of a dense update, and does the work of a `trainable` limit."
            )
        if self.widths not in ("free", "uniform"):
            raise SensiError(f"`widths` must be 'free' or 'uniform', got {self.widths!r}.")
        if self.widths == "uniform" and self.granularity == "tensor":
            raise SensiError("granularity='tensor' removes whole sublayers, and cannot keep the same number in each.")
        if self.widths == "uniform" and not (limits.trims or self.chooses_nothing or self.plan is not None):
            raise SensiError(
                "widths='uniform' has no effect without a limit on `params` or `flops`: nothing is trimmed."
            )
        if self.tuned_layers is not None and not dense:
            raise SensiError(
                f"`tuned_layers` chooses where dense values are tuned; update={update!r} has none of them."
            )
        if self.schedule is not None:
            check_schedule(self.schedule, update, self.sparsity)
            if self.schedule["phase"] == "cut" and (
                not limits.trims or limits.trainable is not None or not self.keep_base
            ):
                raise SensiError(
                    "The phase 'cut' trims to a limit on `params` or `flops` during training, and needs the whole "
                    "base: give such a limit, no `trainable` one, and `keep_base=True`."
                )
            if self.schedule["phase"] == "cut" and self.score == "mask":
                raise SensiError("score='mask' is learned by priming and cannot rank units during training.")
            if self.schedule["phase"] == "cut" and self.sparsity is not None:
                raise SensiError("Units are cut during training, or weights masked by `sparsity`, but not both.")
        if limits.trainable is not None and {"output_biases", "removed_biases"} & set(self.also_train or ()):
            raise SensiError(
                "Under a `trainable` limit only all `biases` can be trained, not those of finished blocks."
            )

    @property
    def tunes_units(self) -> bool:
        """The update has a dense part, or none was named."""
        return "dense" in (self.update or "dense").split("+")

    @property
    def chooses_nothing(self) -> bool:
        """No field says what is tuned or trimmed, so that the default budget comes in."""
        others = self.retention, self.sparsity, self.tuned_layers
        return self.budget is None and self.update in (None, "dense") and all(choice is None for choice in others)

    @property
    def units_to_stay(self) -> int:
        """Heads and neurons that stay in each block, where units and not whole sublayers are trimmed."""
        return self.min_units if self.granularity != "tensor" else 0

    @property
    def limits(self) -> Budget:
        return Budget() if self.budget is None else Budget.parse(self.budget)

    def layouts(self) -> tuple[BlockLayout, ...] | None:
        """`blocks` as layouts; they are kept as dicts, which is what JSON gives back."""
        if self.blocks is None:
            return None
        if not isinstance(self.blocks, (list, tuple)) or not self.blocks:
            raise SensiError(f"`blocks` must be a list of BlockLayout, got {self.blocks!r}.")
        self.blocks = [b.to_dict() if isinstance(b, BlockLayout) else b for b in self.blocks]
        if not all(isinstance(b, Mapping) for b in self.blocks):
            raise SensiError("`blocks` must hold BlockLayout objects or their dicts.")
        return tuple(BlockLayout.from_dict(b) for b in self.blocks)

    def own_copy(self) -> SensiConfig:
        """A copy for one model: the user's object can wrap another one, and keeps the data that we drop here."""
        mine = copy.copy(self)
        mine.calibration = mine.scores = mine.loss_fn = None
        for name in ("target_modules", "exclude_modules", "modules_to_save", "also_train", "blocks", "schedule"):
            setattr(mine, name, copy.copy(getattr(mine, name)))
        return mine

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        values = super().from_json_file(path_json_file, **kwargs)
        for name in _NeverStored.__annotations__:
            if name in values:
                raise SensiLoadError(f"{CONFIG_NAME}: `{name}` exists at run time only and cannot come from a file.")
        return values

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Loads a config; if its values lie beside it, checks that they can be believed and belong to it.

        Raises:
            SensiLoadError: Names the file, the key, what was expected and what was found.
        """
        place = os.path.join(pretrained_model_name_or_path, subfolder or "")
        try:
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except SensiLoadError as error:
            raise SensiLoadError(os.path.join(place, str(error))) from error  # which begins with the file's name
        config.file_name = os.path.join(place, CONFIG_NAME)
        if isinstance(config, cls) and not kwargs.get("ignore_mismatched_sizes"):
            hub = cls._split_kwargs(kwargs)[0]
            config.weights_file = find_weights(pretrained_model_name_or_path, subfolder, hub)
            if config.weights_file is not None:
                check_values(config.weights_file, config)
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As in PEFT; but a reader, or a kill, sees the old file or the new one, never half of it."""
        if os.path.isfile(save_directory):
            raise AssertionError(f"Provided path ({save_directory}) should be a directory, not a file")
        os.makedirs(save_directory, exist_ok=True)
        save = super().save_pretrained

        def write(name: str) -> None:
            with tempfile.TemporaryDirectory() as folder:
                save(folder, **kwargs)
                shutil.copyfile(os.path.join(folder, CONFIG_NAME), name)

        write_atomically(os.path.join(save_directory, CONFIG_NAME), write)

    # Not annotated, so not fields. A plan from a file must match the values beside it, while one made in this process
    # may be replaced by a checkpoint's. The rest is `checkpoint.config_mark` and `meaning` of what the file said, and
    # the path of the values beside it.
    from_file = False
    file_name = CONFIG_NAME
    file_mark = file_meaning = weights_file = None  # type: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> SensiConfig:
        # A generator or a data loader with workers cannot be copied, and a copied model does not need one.
        mine = copy.copy(self)
        memo[id(self)] = mine
        for name, value in self.__dict__.items():
            setattr(mine, name, value if name in _NeverStored.__annotations__ else copy.deepcopy(value, memo))
        return mine


_COUNTS = {
    "calibration_steps": 1,
    "priming_steps": 0,
    "sequence_length": 1,
    "multiple_of": 1,
    "min_units": 0,
    "seed": 0,
    "rank": 1,
    "sparse": 1,
    "tuned_layers": 1,
}
