"""`SensiConfig`, the configuration of an adapter, and `RunInputs`, the data that no config keeps."""

from __future__ import annotations

import copy
import enum
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import InitVar, dataclass, field, fields
from typing import Any

from peft.config import PeftConfig
from peft.utils import CONFIG_NAME

from ..anatomy.layouts import BlockLayout
from ..planning.budget import Budget, as_plain
from ..planning.packing import check_plan_dict
from ..planning.plan import Plan
from ..scoring.calibration import LossFn, ScoringOptions
from ..scoring.scores import Scores
from ..utils import distributed
from ..utils.checks import check_foreign, check_paths, check_types
from ..utils.errors import NoTokenIndicesError, SensiError, SensiLoadError, how_to_install
from ..utils.files import find_weights, write_atomically
from ..utils.formatting import short_repr
from .checkpoint import FORMAT_VERSION, check_config_file, check_values, config_mark, meaning
from .combinations import check_config
from .latencies import read_latency


class SensiPeftType(enum.StrEnum):
    """The type of the method. PEFT's own `PeftType` cannot be extended, and Transformers reads `.value`."""

    SENSI = "SENSI"

    def __str__(self) -> str:
        return f"PeftType.{self.name}"  # as PEFT's own; `get_model_status` takes the part after the dot


@dataclass(frozen=True)
class RunInputs:
    """The data of one wrap, as in `SensiConfig`. A model's config does not keep them, and no file holds them."""

    calibration: Iterable[Mapping[str, Any]] | None = None
    scores: Scores | None = None
    loss_fn: LossFn | None = None


# A config holds the inputs as plain attributes: `asdict` would deep-copy the value of a field.
_INPUTS = tuple(field.name for field in fields(RunInputs))


class _InputAttributes:  # for type checkers; in `SensiConfig` itself these would become fields
    calibration: Iterable[Mapping[str, Any]] | None
    scores: Scores | None
    loss_fn: LossFn | None


@dataclass
class SensiConfig(_InputAttributes, PeftConfig):
    """Configuration of a [`SensiModel`]: what is tuned, what stays frozen and what is trimmed.

    Every argument has a default, so `SensiConfig()` works. Arguments that have no effect together raise an error.

    Args:
        budget: How much is kept and tuned. A float in (0, 1] is a share and an int above 1 a count of the parameters
            of all heads and neurons. A dict sets several limits at once: `params`, `flops`, `latency`,
            `decode_latency` (these trim) and `trainable` (trained values; its shares are of the base's parameters
            without the task head). A latency is a share of the untrimmed model's, or a time such as `"12ms"`. `None`:
            0.5 if the model has heads or neurons to trim; otherwise all targeted modules are tuned.
        score: How the units are ranked: `"fisher"`, `"taylor"`, `"mask"`, `"movement"`, `"magnitude"` or `"random"`.
            The first four need `calibration`; without it they fall back to `"magnitude"` with a warning.
        granularity: What is ranked. `"unit"`: heads, neurons and rows. `"tensor"`: whole sublayers under a limit on
            `params`, `flops` or a latency, whole Linears under a `trainable` limit. `"weight"`: single weights, for
            `update="sparse"` and `update="mask"`.
        update: How the tuned part is parametrized: `"dense"` (its own values), `"low_rank"`, `"sparse"` (single
            values), `"low_rank+sparse"`, `"dense+low_rank"` or `"mask"` (a learned binary mask). `None`: `"dense"`,
            or `"low_rank"` under a `trainable` limit of at most half of the values of the targeted weights; beside
            limits that trim, of at most 2 % of the base's parameters. A low-rank update needs learning rates of 1e-3
            to 3e-3.
        rank: Rank of a low-rank update. `None`: the largest rank that the `trainable` limit allows.
        scale: Factor of the low-rank term, like `lora_alpha / r` in LoRA. `None`: `1 / rank` with
            `update="low_rank"`, so that one range of learning rates suits every rank; otherwise 1.
        sparse: Number of trained values in each targeted matrix, for updates with `"sparse"`.
        support: Positions of these values: `"magnitude"` (the largest weights; also `None`), `"random"` or
            `"decomposition"` (the sparse part of a low-rank plus sparse decomposition of the weight).
        sparsity: Share in [0, 1) of each matrix's weights that are masked to zero. `None`: no mask.
        retention: Share in [0, 1) of each feed-forward layer's neurons that are tuned; attention is then tuned whole.
            `None`: all kept units are tuned, or as many as the `trainable` limit allows.
        tuned_layers: Number of layers in which units are tuned: those with the best scores per trained value. `None`:
            all layers.
        schedule: One phase of the training as a dict, such as `{"phase": "cut", "start": 0.1, "end": 0.5, "cuts": 4}`
            (see [`Schedule`]). Give [`SensiCallback`] to `Trainer`, or call `Schedule.step` in your own loop.
        compressed: How the finished adapter is stored: `None` (float32), `"bfloat16"`, `"int8"` or `"bits"`. Call
            `model.compress(...)` instead of setting it.
        target_modules: Modules that may be tuned: a list of names, a regular expression or `"all-linear"`, as in PEFT.
            `None`: the Linears of all known blocks, or all Linears of an unknown model.
        exclude_modules: Modules that may not be tuned: a list of names or a regular expression.
        modules_to_save: Modules that are trained and saved whole. The head of a classification-like task is added.
        also_train: Other parameters of the base that are trained. A list of `"norms"`, `"pooler"`, `"biases"` (of all
            targeted Linears), `"output_biases"` (of blocks whose kept units are all tuned), `"removed_biases"` (of
            blocks without any kept unit; added by the phase `"cut"`), `"tokens"` (embeddings of the calibration
            data's tokens; under a `trainable` limit the most sensitive of them) and `"embeddings"` (all of them,
            saved whole). `None`: norms, pooler, output biases and, with calibration data, tokens, if dense units are
            tuned without a `plan`, a `trainable` limit or `retention`; otherwise nothing.
        calibration_steps: Number of calibration batches that are used for scores. The refit uses 1.8 times as many.
        priming_steps: Steps of a short fine-tuning before the scores are taken, each on 6 examples of a batch; 0
            switches it off. Its changes are undone, except that the task head starts from what it learned.
        priming_lr: Learning rate of these steps; further ones may follow (see `compute_scores`).
        priming_optimizer: Optimizer of these steps: `"adamw"`, or `"sign"`, which has no optimizer state.
        refit: Whether the output projections of trimmed blocks are fitted by least squares to the untrimmed model's
            activations. `None`: yes, if there is calibration data, no `trainable` limit, and the output biases are
            trained or the model has none.
        sequence_length: Number of tokens at which FLOPs are counted. `None`: the mean length of the calibration
            batches (for images and sounds, inside of the model), or 128.
        latency: The [`LatencyTable`] of the device that will run the model, or its path, for the limits `latency` and
            `decode_latency`; a list of two for both. `None`: if there is such a limit, PyTorch on this machine is
            measured at the wrap, with one sequence of `sequence_length` tokens. A saved adapter has records of the
            tables' fingerprints and figures instead.
        multiple_of: The number of kept neurons in each block is a multiple of this.
        min_units: Number of heads and of neurons that each block keeps at least; 0 allows that whole sublayers are
            removed.
        widths: `"free"`, or `"uniform"`: all blocks keep the same number of heads and the same number of neurons, so
            that the merged model may fit the stock class of its family.
        blocks: [`BlockLayout`] objects, or their dicts, for architectures that the library does not know.
        keep_base: Whether the base model stays complete in memory. `False` saves memory, but the adapter can then not
            be disabled, deleted or unloaded.
        seed: Seed of random scores, of dropout during priming and of random supports.
        init_weights: `False` starts from perturbed values, for tests.
        plan: A finished [`Plan`], or its dict, which replaces budget and scores: nothing is scored or refitted. It is
            filled in at the wrap.
        fingerprint: Statistics of the base's weights, which are compared when the adapter is loaded. It is filled in
            at the wrap; `None` switches the comparison off.
        head_settings: What the task head needs of the base's own config: names of the labels, problem type, pad token.
            It is filled in when the adapter is saved, for loaders that start from the adapter alone.
        format_version: Version of the adapter's file format. Do not set it.
        calibration: Batches that `model(**batch)` turns into a loss: any iterable, such as a `DataLoader`. It is used
            at the wrap and never saved.
        scores: [`Scores`] from `compute_scores`, which replace scoring at the wrap. They are never saved.
        loss_fn: A function of the model and a batch that returns the loss, for models whose output has none. It is
            never saved.

    Raises:
        SensiError: If a value is not allowed, or arguments cannot be combined. The message gives the reason.
    """

    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    budget: float | dict[str, Any] | None = field(default=None)
    score: str = field(default="fisher")
    granularity: str = field(default="unit")
    update: str | None = field(default=None)
    rank: int | None = field(default=None)
    scale: float | None = field(default=None)
    sparse: int | None = field(default=None)
    support: str | None = field(default=None)
    sparsity: float | None = field(default=None)
    retention: float | None = field(default=None)
    tuned_layers: int | None = field(default=None)
    schedule: dict[str, Any] | None = field(default=None)
    compressed: str | None = field(default=None)
    also_train: list[str] | None = field(default=None)
    calibration_steps: int = field(default=8)
    priming_steps: int = field(default=48)
    priming_lr: float = field(default=1e-4)
    priming_optimizer: str = field(default="adamw")
    refit: bool | None = field(default=None)
    sequence_length: int | None = field(default=None)
    latency: Any = field(default=None)
    multiple_of: int = field(default=8)
    min_units: int = field(default=1)
    widths: str = field(default="free")
    blocks: list[Any] | None = field(default=None)
    keep_base: bool = field(default=True)
    seed: int = field(default=0)
    init_weights: bool = field(default=True)
    plan: Any = field(default=None)
    fingerprint: dict[str, Any] | None = field(default=None)
    head_settings: dict[str, Any] | None = field(default=None)
    format_version: int = field(default=FORMAT_VERSION)
    calibration: InitVar[Iterable[Mapping[str, Any]] | None] = None
    scores: InitVar[Scores | None] = None
    loss_fn: InitVar[Any] = None

    __repr__ = short_repr  # a plan and a fingerprint have thousands of characters

    def __post_init__(self, calibration: Any, scores: Scores | None, loss_fn: Any) -> None:
        # PEFT's loaders pass the string from the file. Everybody else leaves `peft_type` alone.
        self.from_file = type(self.peft_type) is str
        self.calibration, self.scores, self.loss_fn = calibration, scores, loss_fn
        # The schedule of cuts, from the cut that removed the last units until the training is finished: the training
        # may go back to a checkpoint from before that cut.
        self.past_cuts: dict[str, Any] | None = None
        try:
            check_types(vars(self))
            if self.from_file:
                check_foreign(vars(self))
            super().__post_init__()
            self._check_and_normalize()
        except ValueError as error:
            if self.from_file:
                raise SensiLoadError(f"{CONFIG_NAME}: {error}") from error
            raise
        if self.from_file:
            self.file_mark, self.file_meaning = config_mark(self), meaning(self)

    def _check_and_normalize(self) -> None:
        if self.format_version != FORMAT_VERSION or isinstance(self.format_version, bool):
            raise SensiLoadError(
                f"The adapter's format_version is {self.format_version!r}; this version of peft_sensi reads "
                f"{FORMAT_VERSION}. Upgrade: {how_to_install(options='-U')}"
            )
        check_config(self)
        self.peft_type = SensiPeftType.SENSI  # type: ignore[assignment]
        for name in ("target_modules", "exclude_modules"):
            if isinstance(names := getattr(self, name), (list, tuple, frozenset)):
                setattr(self, name, set(names))
        self.budget, self.schedule = as_plain(self.budget), as_plain(self.schedule)
        if self.also_train is not None:
            self.also_train = sorted(self.also_train)
        self.plan = self.plan.to_dict() if isinstance(self.plan, Plan) else self.plan
        if self.plan is not None:
            check_plan_dict(self.plan)
            self.update = self.update or "dense"  # the plan was made for units
        read_latency(self)
        self.layouts()
        check_paths(self.blocks or ())  # also in code: otherwise a saved adapter could not be loaded

    @property
    def inputs(self) -> RunInputs:
        """The data of one wrap, which no file holds."""
        return RunInputs(**{name: getattr(self, name) for name in _INPUTS})

    @property
    def limits(self) -> Budget:
        """`budget` as limits; no limits for `None`."""
        return Budget() if self.budget is None else Budget.parse(self.budget)

    @property
    def parts(self) -> list[str]:
        """The parts of the update, such as `["low_rank", "sparse"]`."""
        return (self.update or "dense").split("+")

    @property
    def tunes_units(self) -> bool:
        """Whether the update has a dense part."""
        return "dense" in self.parts

    @property
    def phase(self) -> str | None:
        """The phase of the schedule, if there is one."""
        return None if self.schedule is None else self.schedule["phase"]

    @property
    def chooses_nothing(self) -> bool:
        """Whether no field says what is tuned or trimmed, so that the default budget applies."""
        others = self.retention, self.sparsity, self.tuned_layers
        return self.budget is None and self.update in (None, "dense") and all(choice is None for choice in others)

    @property
    def width_options(self) -> dict[str, Any]:
        """The arguments of `make_plan` about the widths of blocks."""
        stay = self.min_units if self.granularity != "tensor" else 0
        return {"multiple_of": self.multiple_of, "min_units": stay, "uniform": self.widths == "uniform"}

    def layouts(self) -> tuple[BlockLayout, ...] | None:
        """`blocks` as layouts. The field itself holds dicts, because these survive JSON."""
        if self.blocks is None:
            return None
        if not self.blocks or not all(isinstance(b, (BlockLayout, Mapping)) for b in self.blocks):
            raise SensiError(f"`blocks` must be a list of BlockLayout objects or their dicts, got {self.blocks!r}.")
        self.blocks = [b.to_dict() if isinstance(b, BlockLayout) else b for b in self.blocks]
        return tuple(BlockLayout.from_dict(b) for b in self.blocks)

    def scoring_options(self, loss_fn: LossFn | None, **changes: Any) -> ScoringOptions:
        """How this config scores; `changes` replace single options. Only process 0 shows a progress bar."""
        names = ("score", "calibration_steps", "priming_steps", "priming_lr", "priming_optimizer", "seed")
        own = {name: getattr(self, name) for name in names} | {"progress": distributed.rank() == 0}
        return ScoringOptions(loss_fn=loss_fn, **(own | changes))

    def own_copy(self) -> SensiConfig:
        """A copy for one model, without the run inputs. The user's object can then wrap another model."""
        mine = copy.deepcopy(self)
        vars(mine).update(dict.fromkeys(_INPUTS))
        mine.adapter_id = uuid.uuid4().hex
        return mine

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        check_config_file(path_json_file, _INPUTS)
        return super().from_json_file(path_json_file, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Loads a config. If the weights file is beside it, checks this file, and that both were saved together.

        Raises:
            SensiLoadError: Names the file, the key, what was expected and what was found.
        """
        place = os.path.join(pretrained_model_name_or_path, subfolder or "")
        try:
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except SensiLoadError as error:
            raise SensiLoadError(os.path.join(place, str(error))) from error  # the message begins with the file name
        config.file_name = os.path.join(place, CONFIG_NAME)
        if isinstance(config, cls) and not kwargs.get("ignore_mismatched_sizes"):
            hub = cls._split_kwargs(kwargs)[0]
            config.weights_file = find_weights(pretrained_model_name_or_path, subfolder, hub)
            if config.weights_file is not None:
                check_values(config.weights_file, config)
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Saves as PEFT does, but atomically: an interrupted save leaves the old file or the new one."""
        if os.path.isfile(save_directory):
            raise AssertionError(f"Provided path ({save_directory}) should be a directory, not a file")
        os.makedirs(save_directory, exist_ok=True)
        save = super().save_pretrained

        def write(name: str) -> None:
            with tempfile.TemporaryDirectory() as folder:
                save(folder, **kwargs)
                shutil.copyfile(os.path.join(folder, CONFIG_NAME), name)

        write_atomically(os.path.join(save_directory, CONFIG_NAME), write)

    # No annotations, so these are no fields. `from_file`: the values beside the config must match its plan, which a
    # checkpoint may replace otherwise. `file_mark`, `file_meaning`: `config_mark` and `meaning` of the file.
    from_file = False
    file_name = CONFIG_NAME
    file_mark = file_meaning = weights_file = None  # type: Any
    tables = {}  # type: Any  # the latency tables by the limit's name, in a process that has them
    adapter_id = None  # type: Any  # the same in copies of the config; `None` before the wrap

    def __getattr__(self, name: str) -> Any:
        if name == "trainable_token_indices":  # TRL sets it for the new tokens of a `chat_template_path`
            raise NoTokenIndicesError()
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __deepcopy__(self, memo: dict[int, Any]) -> SensiConfig:
        # Generators and data loaders with workers cannot be copied, so the copy shares them.
        mine = copy.copy(self)
        memo[id(self)] = mine
        for name, value in self.__dict__.items():
            setattr(mine, name, value if name in _INPUTS else copy.deepcopy(value, memo))
        return mine
