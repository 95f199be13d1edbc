"""A wrap or a load that fails, or that the user interrupts anywhere, leaves the model exactly as it was."""

from __future__ import annotations

import copy
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers.integrations.peft as transformers_peft
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from tiny import (
    TRIM,
    assert_same_tensors,
    logits,
    only_slow,
    snapshot,
    some_slow,
    tiny_batches,
    tiny_model,
    train,
    trained,
    wrap,
)

import peft_sensi
from peft_sensi import AnatomyError, SensiConfig, SensiError, SensiLoadError, compute_scores, load_merged, save_merged
from peft_sensi.layers.layer import SensiLayer
from peft_sensi.tuner import stale


NAME = "base_model.model.bert.encoder.layer.0.attention.self.query.sensi_weight.default"
OPTIONS: dict[str, Any] = {"score": "taylor", "priming_steps": 1, "calibration_steps": 1, "task_type": "SEQ_CLS"}
# The files whose lines are interrupted: everything that adds an adapter, ours and theirs.
FOLDERS = tuple(str(Path(module.__file__).parent) for module in (peft, peft_sensi))


def config(**changes) -> SensiConfig:
    return SensiConfig(**{**OPTIONS, "calibration": tiny_batches(1), **TRIM, **changes})


def contents(value: Any) -> Any:
    """What an attribute is: its value if it is simple, its parts if it is a container, otherwise its identity."""
    if isinstance(value, dict):
        return [(key, contents(part)) for key, part in value.items()]
    if isinstance(value, (list, tuple)):
        return [contents(part) for part in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else id(value)


def state(model: torch.nn.Module) -> dict[str, Any]:
    """All attributes of all modules and of the config, hooks included, and the flags of all parameters."""
    found = {f"{name}.{k}": contents(v) for name, m in model.named_modules() for k, v in vars(m).items()}
    found |= {f"config.{k}": contents(v) for k, v in vars(model.config).items()}
    return found | {f"{n} flag": (p.requires_grad, id(p.grad)) for n, p in model.named_parameters()}


class Interrupt:
    """Raises `KeyboardInterrupt` when the `at`-th line of the files above is about to run, and counts the lines."""

    def __init__(self, at: int = -1) -> None:
        self.at, self.lines = at, 0

    def __enter__(self) -> Interrupt:
        sys.settrace(self._call)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(None)

    def _call(self, frame: Any, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        return self._line if name.startswith(FOLDERS) or name == transformers_peft.__file__ else None

    def _line(self, frame: Any, event: str, argument: Any) -> Any:
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                raise KeyboardInterrupt
        return self._line


def peft_constructor(base, folder):
    get_peft_model(base, config())


def peft_loader(base, folder):
    PeftModel.from_pretrained(base, folder)


def transformers_adder(base, folder):
    base.add_adapter(config())


def transformers_loader(base, folder):
    base.load_adapter(str(folder))


def injection(base, folder):
    inject_adapter_in_model(config(), base)


ENTRANCES = [peft_constructor, peft_loader, transformers_adder, transformers_loader, injection]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter")
    trained(**TRIM).save_pretrained(path)
    return path


def partly_frozen() -> torch.nn.Module:
    base = tiny_model()
    base.bert.embeddings.requires_grad_(False)
    return base


def interrupt_everywhere(enter, folder, points: int) -> int:
    """Interrupts one entrance at evenly spread lines, and at the last lines. Returns how often it was interrupted."""
    for _ in range(2):  # the first call runs lines that no later call runs
        with Interrupt() as whole:
            enter(partly_frozen(), folder)
    base = partly_frozen()
    before, tensors = state(base), snapshot(base)
    lines = whole.lines - 2 * (enter is injection)  # this function of PEFT cannot be hooked: it is imported by name
    step, interrupts = max(1, lines // points), 0
    for at in sorted({*range(1, lines, step), *range(lines - points // 4, lines)}):
        with pytest.raises(KeyboardInterrupt), Interrupt(at):
            enter(base, folder)
        interrupts += 1
        assert state(base) == before, f"line {at} of {lines}"
    assert_same_tensors(snapshot(base), tensors)
    enter(base, folder)  # and it can be wrapped after all
    return interrupts


@pytest.mark.parametrize("enter", [*ENTRANCES[:-2], *only_slow(*ENTRANCES[-2:])], ids=lambda enter: enter.__name__)
def test_an_interrupt_leaves_the_model_as_it_was(enter, folder):
    assert interrupt_everywhere(enter, folder, 8) > 8


@pytest.mark.slow
@pytest.mark.parametrize("enter", ENTRANCES, ids=lambda enter: enter.__name__)
def test_many_interrupts(enter, folder):
    print(interrupt_everywhere(enter, folder, 120), "interrupts")


@pytest.mark.parametrize("enter", [peft_constructor, transformers_adder, injection], ids=lambda enter: enter.__name__)
def test_an_error_leaves_the_model_as_it_was(enter, monkeypatch):
    """The error comes after everything is wrapped, in the last step of the injection."""
    base = tiny_model()
    base.config.problem_type = None
    before = state(base)
    monkeypatch.setattr("peft_sensi.tuner.model.set_head", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        enter(base, None)
    assert state(base) == before
    with pytest.raises(ValueError, match="No adapter loaded"):
        base.active_adapters()


def test_an_interrupted_second_adapter_leaves_the_first_as_it_was():
    for _ in range(2):
        model = trained(**TRIM)
        with Interrupt() as whole:
            model.add_adapter("second", config())
    model = trained(**TRIM)
    before, outputs = state(model), logits(model)
    for at in range(1, whole.lines, whole.lines // 8):
        with pytest.raises(KeyboardInterrupt), Interrupt(at):
            model.add_adapter("second", config())
        assert state(model) == before, at
    assert torch.equal(logits(model), outputs)


def save_merged_of(model, folder):
    save_merged(model, folder / "merged")


# For each operation on a wrapped model: what prepares the model, and the operation.
OPERATIONS: dict[str, tuple[Any, Any]] = {
    "merge": (None, lambda model, folder: model.merge_adapter()),
    "unmerge": (lambda model: model.merge_adapter(), lambda model, folder: model.unmerge_adapter()),
    "merge and unload": (None, lambda model, folder: model.merge_and_unload()),
    "unload": (None, lambda model, folder: model.unload()),
    "delete": (None, lambda model, folder: model.delete_adapter("default")),
    "activate": (None, lambda model, folder: model.set_adapter("second")),
    "compress": (None, lambda model, folder: model.base_model.compress("int8")),
    "trim": (None, lambda model, folder: model.base_model.trim(0.3, calibration=tiny_batches(1), refit=True)),
    "save": (None, lambda model, folder: model.save_pretrained(folder / "saved")),
    "save merged": (None, save_merged_of),
    "load a third": (None, lambda model, folder: model.load_adapter(folder, "third")),
}


def interrupt_operation(name: str, folder: Path, points: int) -> int:
    """Interrupts an operation at evenly spread lines, and at the last ones. Returns how often it was interrupted."""
    prepare, operate = OPERATIONS[name]

    model = trained(**TRIM)
    model.add_adapter("second", SensiConfig(budget=0.3, score="magnitude", task_type="SEQ_CLS"))
    model.bfloat16()  # so that parts that are saved whole are rounded when they are merged
    if prepare is not None:
        prepare(model)
    for other in (copy.deepcopy(model), copy.deepcopy(model)):  # the first call runs lines that no later call runs
        logits(other)
        stale._stale.clear()
        with Interrupt() as whole:
            operate(other, folder)
    done = snapshot(other)
    outputs, complete = logits(model), copy.deepcopy(model)
    before, tensors, configs = state(model), snapshot(model), copy.deepcopy(vars(model.peft_config["default"]))
    configs.pop("head_settings")
    interrupts = 0
    for at in sorted({*range(1, whole.lines, max(1, whole.lines // points)), *range(whole.lines - 3, whole.lines)}):
        stale._stale.clear()  # a trim looks through it, and other tests and models leave different numbers of tensors
        with suppress(KeyboardInterrupt), Interrupt(at) as run:
            operate(model, folder)
        if run.lines < at:  # it ran fewer lines than the first time, so it has ended
            break
        interrupts += 1
        if name == "merge and unload" and state(model) != before:
            # It is completed instead, because its memory is small: the base's weights are not kept.
            merged = model.base_model.model
            assert not any(isinstance(module, SensiLayer) for module in merged.modules())
            assert torch.equal(logits(merged), outputs)
            merged.save_pretrained(folder / f"merged{at}")
            assert torch.equal(logits(load_merged(folder / f"merged{at}")), outputs)
            model = copy.deepcopy(complete)
            before, tensors = state(model), snapshot(model)
        elif state(model) != before:
            # It has ended, and only what it returns is missing.
            last = {"trim": 30, "load a third": 10}
            assert name in last and at > whole.lines - last[name], f"line {at} of {whole.lines}"
            assert_same_tensors(snapshot(model), done)
            break
        now = vars(model.peft_config["default"])
        assert {key: now[key] for key in configs} == configs, f"line {at} of {whole.lines}"
    else:
        assert_same_tensors(snapshot(model), tensors)
        assert torch.equal(logits(model), outputs)
        operate(model, folder)
    return interrupts


def test_interrupted_values_of_an_adapter_are_the_old_or_the_new_ones(folder):
    """`Trainer` loads its best checkpoint into the adapter that it trains."""
    model = trained(**TRIM)
    expected = snapshot(PeftModel.from_pretrained(tiny_model(), folder))
    train(model)
    before = snapshot(model)
    for other in (copy.deepcopy(model), copy.deepcopy(model)):
        with Interrupt() as whole:
            other.load_adapter(folder, "default")
    seen = set()
    for at in range(whole.lines // 2, whole.lines, whole.lines // 40):  # the values are written at the end
        other = copy.deepcopy(model)
        with suppress(KeyboardInterrupt), Interrupt(at):
            other.load_adapter(folder, "default")
        found = snapshot(other)
        seen.add(torch.equal(found[NAME], before[NAME]))
        assert_same_tensors(found, before if torch.equal(found[NAME], before[NAME]) else expected)
    assert seen == {True, False}


def interrupt_load_of_another_plan(folder: Path, points: int) -> int:
    """Interrupts a load that gives a trained adapter another plan, and returns how often nothing had changed."""
    trained(budget=0.3).save_pretrained(folder)
    model = trained(**TRIM)
    for _ in range(2):
        other = copy.deepcopy(model)
        with Interrupt() as whole:
            other.load_adapter(folder, "default", is_trainable=True)
    expected, unchanged = snapshot(other), 0
    for at in range(1, whole.lines, max(1, whole.lines // points)):
        other = copy.deepcopy(model)
        before, values, config = state(other), snapshot(other), other.peft_config["default"].to_dict()
        optimizer = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=0.0)
        with suppress(KeyboardInterrupt), Interrupt(at):
            other.load_adapter(folder, "default", is_trainable=True)
        if other.base_model.plan() != model.base_model.plan():
            assert_same_tensors(snapshot(other), expected)
            continue
        unchanged += 1
        assert state(other) == before and other.peft_config["default"].to_dict() == config, f"line {at}"
        assert_same_tensors(snapshot(other), values)
        optimizer.step()  # it is not refused: its parameters are those of the model
    return unchanged


def test_an_interrupted_load_of_another_plan(tmp_path):
    assert interrupt_load_of_another_plan(tmp_path, 40) > 20


@pytest.mark.slow
def test_many_interrupted_loads_of_another_plan(tmp_path):
    print(interrupt_load_of_another_plan(tmp_path, 800), "interrupts")


@pytest.mark.parametrize("name", some_slow(OPERATIONS, "save merged", "load a third"))
def test_an_interrupted_operation_leaves_the_model_as_it_was(name, folder):
    assert interrupt_operation(name, folder, 5) > 4


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_many_interrupted_operations(name, folder):
    print(interrupt_operation(name, folder, 150), "interrupts")


def test_a_save_that_fails_leaves_an_adapter_that_can_be_trained(tmp_path, monkeypatch):
    """PEFT sets `inference_mode` while it saves. A trim would then freeze what is trained."""
    model = trained(**TRIM)
    monkeypatch.setattr("peft_sensi.tuner.config.write_atomically", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(tmp_path)
    assert not model.peft_config["default"].inference_mode
    model.base_model.trim(0.3)
    assert any(".sensi_weight" in name for name, p in model.named_parameters() if p.requires_grad)


def test_a_safe_merge_that_fails_changes_nothing():
    model = trained(**TRIM)
    layers = [m for m in model.modules() if isinstance(m, SensiLayer)]
    with torch.no_grad():
        layers[-1].sensi_bias["default"].fill_(float("nan"))
    before = state(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="NaN"):
            merge(safe_merge=True)
        assert state(model) == before


def test_a_load_that_fails_after_the_injection(folder, monkeypatch):
    base = tiny_model()
    before = state(base)
    monkeypatch.setattr("peft.peft_model.set_peft_model_state_dict", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        PeftModel.from_pretrained(base, folder)
    assert state(base) == before


@pytest.mark.parametrize("seed", [0, 1], ids=["the same plan", "another plan"])
def test_a_load_of_another_head_leaves_the_adapter_as_it_was(seed, tmp_path):
    """PyTorch would write all tensors that fit, and raise its error afterwards."""
    options = {"score": "random", "budget": 0.5}
    other = wrap(tiny_model(num_labels=5), seed=seed, **options)
    other.save_pretrained(tmp_path)
    model = wrap(tiny_model(), seed=0, **options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    before, tensors, plan = state(model), snapshot(model), model.base_model.plan()
    with pytest.raises(SensiLoadError, match="same `num_labels`"):
        model.load_adapter(tmp_path, "default", is_trainable=True)
    assert state(model) == before and model.base_model.plan() == plan
    assert_same_tensors(snapshot(model), tensors)
    optimizer.step()  # its parameters are still those of the model
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes=True"):
        model.load_adapter(tmp_path, "default", ignore_mismatched_sizes=True)
    assert model.base_model.plan() == other.base_model.plan()


def test_the_users_config_stays_as_it_was():
    mine = config(modules_to_save=["pooler"])
    before = {k: v for k, v in vars(mine).items() if k != "base_model_name_or_path"}
    model = get_peft_model(tiny_model(), mine)
    model.add_adapter("second", mine)
    assert {k: v for k, v in vars(mine).items() if k != "base_model_name_or_path"} == before
    assert mine.modules_to_save == ["pooler"]


# -- what a forward pass with labels changes --------------------------------------------------------------------------


@pytest.mark.parametrize("use", ["scores", "wrap"])
def test_calibration_leaves_the_config_as_it_was(use):
    model = tiny_model()
    before = dict(vars(model.config))
    if use == "scores":
        compute_scores(model, tiny_batches(1), priming_steps=1, progress=False)
    else:
        get_peft_model(model, config())
    assert dict(vars(model.config)) == before and model.config.problem_type is None


def test_scoring_leaves_attributes_and_buffers_as_they_were():
    """Models that resize their rotary embeddings register other buffers in their forward pass."""
    model = tiny_model()
    model.bert.seen, model.bert.lengths = 0, []
    model.bert.register_buffer("table", torch.ones(2))

    def count(module, args, output):
        module.seen, module.table = module.seen + 1, torch.zeros(3)
        module.lengths.append(module.seen)

    handle = model.bert.register_forward_hook(count)
    before = state(model)
    compute_scores(model, tiny_batches(1), priming_steps=1, progress=False)
    assert state(model) == before
    model(**tiny_batches(1)[0])
    assert model.bert.seen == 1 and len(model.bert.table) == 3
    handle.remove()
    assert not model.bert._forward_hooks


# -- beside other tuners ----------------------------------------------------------------------------------------------


def lora(**changes) -> LoraConfig:
    return LoraConfig(**{"target_modules": ["query"], "r": 2, "init_lora_weights": False, **changes})


@pytest.mark.parametrize("adapter_name", ["default", "other"])
def test_a_model_with_lora_is_refused_before_it_is_scored(adapter_name, tmp_path):
    model = get_peft_model(tiny_model(), lora())
    outputs, before = logits(model), state(model)
    batches = iter(tiny_batches(1))
    with pytest.raises(SensiError, match="merge_and_unload"):
        get_peft_model(model, config(calibration=batches), adapter_name=adapter_name)
    assert next(batches)  # nothing was scored
    assert state(model) == before and torch.equal(logits(model), outputs)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), outputs)


@pytest.mark.parametrize("name", ["lora", "ours"])
def test_lora_and_ours_are_refused_in_both_orders_in_transformers(name):
    configs = {"lora": lora(), "ours": config()}
    other = configs[{"lora": "ours", "ours": "lora"}[name]]
    model = tiny_model()
    model.add_adapter(configs[name], "first")
    outputs, before = logits(model), state(model)
    with pytest.raises(SensiError, match=r"delete_adapter|merge_and_unload"):
        model.add_adapter(other, "second")
    assert state(model) == before and torch.equal(logits(model), outputs)
    if name == "ours":
        train(model)


def test_a_wrapped_model_is_not_wrapped_again():
    model = wrap(tiny_model(), **TRIM)
    before = state(model)
    with pytest.raises(SensiError, match="add_adapter"):
        get_peft_model(model, config(), adapter_name="second")
    assert state(model) == before


def test_a_model_of_an_unknown_kind_is_left_alone():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(AnatomyError):
        get_peft_model(model, SensiConfig(budget=0.5))
    assert type(model[0]) is torch.nn.Linear and not hasattr(model, "peft_config")
