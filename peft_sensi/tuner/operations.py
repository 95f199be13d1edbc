"""What a user can do with an adapter beyond PEFT's methods: look at its plan, trim it, compress it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..anatomy.linears import check_weight, is_quantized, not_mergeable, quantized_later, unpack
from ..anatomy.units import Anatomy
from ..layers.layer import SensiLayer, base_is_dropped, layers_of
from ..layers.marks import EXTRA, check_marks, marks_are_written, marks_to_tensor, plan_mark
from ..layers.whole_modules import saved_modules
from ..planning.plan import Plan
from ..scoring.calibration import LossFn
from ..scoring.scores import Scores
from ..utils import distributed, replicas
from ..utils.errors import SensiError
from ..utils.undo import undone_on_error
from .combinations import compressed_kinds
from .config import RunInputs, SensiConfig
from .targets import described, targets_of
from .trim import trim_adapter
from .wrapping import check_unmerged


class AdapterOperations:
    """The part of `SensiModel` that is not PEFT's contract.

    A `PeftModel` passes these calls on, so `model.plan()` and `model.base_model.plan()` are the same. Where
    `adapter_name` is left out, the active adapter is meant; if none or several are active, this is a `SensiError`.
    """

    peft_config: dict[str, SensiConfig]
    model: nn.Module

    # PEFT's constructor injects the first adapter, so these have class-level defaults and are replaced, not changed.
    # The base at the time of each wrap: merging and `keep_base=False` change the shapes that can be seen later.
    _sensi_anatomies: dict[str, Anatomy] = {}
    # The plans that were made in this process, and the scores behind them; `None` if no units were ranked.
    _sensi_scores: dict[str, tuple[Any, Scores | None]] = {}

    def plan(self, adapter_name: str | None = None) -> Plan:
        """The plan of an adapter: the units' states and costs. Raises `SensiError` if there is no such adapter."""
        adapter_name = self._chosen(adapter_name)
        config, anatomy = self.peft_config[adapter_name], self._sensi_anatomies[adapter_name]
        return described(Plan.from_dict(config.plan, anatomy, targets_of(self.model, config)), config)

    def explain(self, adapter_name: str | None = None) -> str:
        """A table of the plan's groups, sorted by their scores. Raises `SensiError` if no scores are known."""
        adapter_name = self._chosen(adapter_name)
        scores = self.scores_of(adapter_name)
        if scores is None:
            raise SensiError(
                f"The scores of {adapter_name!r} are not known: they are not stored with an adapter or a checkpoint, "
                f"and there are none if no units were chosen (a low-rank update without limits that trim)."
            )
        values = {name: value.numpy() for name, value in scores.values.items()}
        return f"scored by {scores.method}\n{self.plan(adapter_name).explain(values)}"

    def scores_of(self, adapter_name: str) -> Scores | None:
        """The scores from which this process made the adapter's plan. A plan from a file or a checkpoint has none."""
        plan, scores = self._sensi_scores.get(adapter_name, (None, None))
        return scores if plan == self.peft_config[adapter_name].plan else None

    def note_scores(self, adapter_name: str, scores: Scores | None) -> None:
        """Keeps the scores from which the present plan of an adapter was made."""
        made = self.peft_config[adapter_name].plan, scores
        self._sensi_scores = {**self._sensi_scores, adapter_name: made}

    def trim(
        self,
        budget: float | int | Mapping[str, Any],
        calibration: Iterable[Mapping[str, Any]] | None = None,
        adapter_name: str | None = None,
        *,
        loss_fn: LossFn | None = None,
        score: str | None = None,
        refit: bool | None = None,
        latency: Any = None,
    ) -> Plan:
        """Trims an adapter that has been trained, and keeps what it has learned.

        Scores the units of the adapted model, plans under the budget, removes the trimmed units, and fits the kept
        ones to what the adapted model computed before: first the output projections, then all matrices of each layer.
        The kept units start from their trained values and keep their states, tuned or frozen. A budget far below what
        is there is reached in stages that each keep about half, because units may be needed once others are gone. In
        the end all layers are then fitted together, if there are at least 65,536 tokens.

        So one training with `SensiConfig(budget=1.0)` and several trims give a family of models, each of them an
        adapter of the same base. It can be trained on after each trim ("healing"). If the adapter meets the budget
        already, nothing changes, with a warning.

        The adapter's parameters are new objects afterwards. An optimizer, a `Trainer` or a DDP wrapper that was made
        before raises a `SensiError` at its next step: make a new one. With several processes all of them must call
        this, each with its own batches; all remove the same units.

        Args:
            budget: Limits on `params`, `flops`, `latency` or `decode_latency`, as in `SensiConfig`. Shares are of the
                base model's heads and neurons (or of its latency), so `trim(0.5)` and then `trim(0.25)` keeps a
                quarter of the base.
            calibration: Batches with labels. Three times the config's `calibration_steps` are scored, with labels
                drawn from the model's predictions (see `scoring.drawn_labels`; not with a `loss_fn`, nor for language
                models and answers). The fit reads these batches, and up to three times as many as long as all have at
                most 65,536 tokens; that of all layers together reads up to 24 times `calibration_steps`, as long as
                they have at most 131,072. Without batches the score falls back to magnitude with a warning, and
                nothing is fitted.
            adapter_name: The adapter, which must be the only active one. Default: the active one.
            loss_fn: A function of the model and a batch that returns the loss, for models whose output has none.
            score: `"fisher"`, `"taylor"`, `"magnitude"` or `"random"`. Default: the score of the adapter's config, or
                `"fisher"` if that one is learned while priming.
            refit: Whether the kept units are fitted. Default: as in `SensiConfig`.
            latency: The latency tables for such limits, as in `SensiConfig`. Default, and for limits without a table
                here: those that the adapter's config got in this process. Nothing is measured on the spot: a missing
                table is an error.

        Returns:
            The new plan.

        Raises:
            BudgetError: If the budget is malformed or cannot be met.
            AnatomyError: If the model has no heads or neurons to trim.
            SensiError: If the adapter does not exist, is inactive, merged, compressed or sharded, or has a schedule of
                cuts that is not finished or a mask that is not drawn yet; or if `refit=True` is not possible. A trim
                that fails leaves the model as it was.
        """
        with distributed.synchronized("trimming"):  # a wrong call in one process is an error in all of them
            adapter_name = self._chosen(adapter_name)
            before = self.plan(adapter_name)
            replicas.check_gathered(self.model, "trim the adapter")
            check_unmerged(self.model, "`trim()`")
            inputs = RunInputs(calibration, None, loss_fn)
            config = self.peft_config[adapter_name]
            trim = trim_adapter(self.model, config, adapter_name, before, budget, inputs, score, refit, latency)
        if trim is None:
            return self.plan(adapter_name)
        self.note_scores(adapter_name, trim.scores)
        return described(trim.plan, config)

    def compress(self, kind: str, adapter_name: str | None = None) -> None:
        """Replaces an adapter's trained values by a narrower form. It is used, saved and merged in this form.

        The adapter cannot be trained any more, so keep the checkpoint that you compress. Modules that PEFT saves whole
        (task head, norms, embeddings) stay as they are.

        Args:
            kind: `"bfloat16"` (2 bytes a value) or `"int8"` (a little more than 1 byte, because each tuned unit has
                a scale), which hold the differences from the base's values (see `layers.compression`); for
                `update="mask"`: `"bits"`, one bit for each weight.
            adapter_name: The adapter. Default: the active one.

        Raises:
            SensiError: If the adapter's update does not have this form, or if the adapter is compressed already, is
                merged, is sharded, or has lost its base to `keep_base=False`.
        """
        adapter_name = self._chosen(adapter_name)
        config, layers = self.peft_config[adapter_name], self._layers()
        possible = compressed_kinds(config.update)
        if kind not in possible:
            raise SensiError(
                f"compress({kind!r}) is not possible with update={config.update!r}: use {' or '.join(possible)} (only "
                f"masks have bits)."
            )
        if config.compressed is not None:
            raise SensiError(
                f"The adapter {adapter_name!r} is compressed already, to {config.compressed}. For another form, load "
                f"the checkpoint that was compressed."
            )
        if any(adapter_name in layer.merged_adapters for layer in layers):
            raise SensiError("The adapter is merged. Call `unmerge_adapter()` before it is compressed.")
        replicas.check_gathered(self.model, "compress the adapter")
        if kind != "bits":
            self._check_base("compress the adapter, which needs the differences from the base's values")
        with undone_on_error(self.model):
            for layer in layers:
                layer.compress(adapter_name, kind)
            config.compressed = kind

    def unmerge_adapter(self) -> None:
        with undone_on_error(self):  # type: ignore[arg-type]
            super().unmerge_adapter()  # type: ignore[misc]

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._check_combination(names)  # PEFT would activate what no layer has, which is the base
        with undone_on_error(self):  # type: ignore[arg-type]
            super().set_adapter(adapter_name, inference_mode=inference_mode)  # type: ignore[misc]

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self._check_name(name)
        super().set_requires_grad(adapter_names, requires_grad)  # type: ignore[misc]

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """PEFT's method for low-rank adapters. Raises `SensiError`: trained units of several plans have no mean."""
        raise SensiError(
            "Adapters of peft_sensi cannot be averaged into a new one: they train and keep different units. If no "
            "adapter trims, masks or saves modules whole (such as a task head), "
            "`model.base_model.set_adapter([...])` adds their changes."
        )

    def _chosen(self, adapter_name: str | None) -> str:
        """This adapter, or the active one. Raises `SensiError` if there is no such adapter, or not one."""
        if adapter_name is None:
            active = self.active_adapters  # type: ignore[attr-defined]
            if len(active) != 1:
                state = f"The adapters {active} are active" if active else "No adapter is active"
                raise SensiError(f"{state}: name one of {sorted(self.peft_config)} as `adapter_name`.")
            adapter_name = active[0]
        self._check_name(adapter_name)
        return adapter_name

    def _check_name(self, adapter_name: str) -> None:
        if adapter_name not in self.peft_config:
            raise SensiError(f"There is no adapter {adapter_name!r}; there are {sorted(self.peft_config)}.")

    def _check_combination(self, adapter_names: list[str]) -> None:
        """Raises `SensiError` if one of the adapters does not exist, or if they cannot be active at the same time."""
        for name in adapter_names:
            self._check_name(name)
        if len(adapter_names) > 1:
            for layer in self._layers():
                layer.check_combination(adapter_names)

    def _layers(self) -> list[SensiLayer]:
        return list(layers_of(self.model).values())

    def _check_merge(self, names: list[str]) -> None:
        """Raises `SensiError` if these adapters cannot be merged in place, or not while others are active."""
        self._check_combination(names)
        self._check_mergeable()
        active: list[str] = self.active_adapters  # type: ignore[attr-defined]
        if any(layer.disable_adapters for layer in self._layers()):
            raise SensiError(
                "The adapters are disabled, and a merge would use them: call `enable_adapter_layers()` first."
            )
        if set(names) == set(active):
            return
        if any(saved_modules(self.model, name) for name in names):
            raise SensiError(
                f"Merging {list(names)} while {active} is active would combine the Linears of the one with the task "
                f"head and the norms of the other. Call `set_adapter` first."
            )
        # The forward pass still applies the active adapters in layers that these do not have.
        others = [layer for layer in self._layers() if not {*names} & {*layer.sensi_slices}]
        if any({*active} & {*layer.sensi_slices} for layer in others):
            self._check_combination([*dict.fromkeys([*names, *active])])

    def _check_mergeable(self) -> None:
        replicas.check_gathered(self.model, "merge the adapter")
        for layer in self._layers():
            check_weight(layer.get_base_layer())
            if is_quantized(layer.get_base_layer()):
                raise not_mergeable() if layer.sensi_coded else quantized_later(layer.get_base_layer().weight)

    def _check_training(self) -> None:
        """Raises `SensiError` if an active adapter would not be trained as its config says."""
        for name in self.active_adapters:  # type: ignore[attr-defined]
            config = self.peft_config[name]
            if config.schedule is not None and name not in self.sensi_stepped:  # type: ignore[attr-defined]
                data = "calibration=batches" if config.phase == "cut" else ""
                raise SensiError(
                    f"The adapter {name!r} has a schedule, but nothing steps it, so it would be trained without it. "
                    f"Give `SensiCallback({data})` to `Trainer`, or call `Schedule.step` in your own loop."
                )
            if config.compressed is not None and any(p.requires_grad for p in self.model.parameters()):
                raise SensiError(
                    f"The values of the adapter {name!r} are compressed to {config.compressed}, so only its task head "
                    f"and norms would be trained. Train from the checkpoint that was compressed, or call "
                    f"`model.eval()` if this is no training."
                )

    def _check_base(self, action: str) -> None:
        if any(layer.sensi_base_dropped for layer in self._layers()):
            raise base_is_dropped(action)

    def marks(self) -> dict[str, bytes]:
        """The mark of each adapter's plan, for plain state dicts (see `layers.marks`)."""
        plans = {name: getattr(config, "plan", None) for name, config in self.peft_config.items()}
        return {name: plan_mark(plan) for name, plan in plans.items() if plan is not None}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for module in self.model.modules():  # also those that no adapter changes
            unpack(module)
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        if marks_are_written():
            destination[prefix + EXTRA] = marks_to_tensor(self.marks())

    def set_extra_state(self, state: Any) -> None:
        check_marks(state, self.marks(), EXTRA)
