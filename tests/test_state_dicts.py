"""Plain state dicts, by loaders that know nothing of PEFT: each carries the plan, and none loads under another one."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_model, save_model
from tiny import TRIM, assert_same_tensors, logits, tiny_model, trained, wrap
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from peft_sensi import Schedule, SensiConfig, SensiError, SensiLoadError, recipes


# Two wraps with the same tensors' names and shapes, which differ in the units or in the meaning of the values.
SAME_SHAPES = {
    "other units": ({"budget": 0.5, "widths": "uniform"}, {"score": "random", "seed": 3}),
    "other tuned units": ({"retention": 0.5}, {"score": "random", "seed": 3}),
    "another sparsity": ({"update": "mask", "sparsity": 0.5}, {"sparsity": 0.7}),
    "another scale": ({"update": "low_rank", "rank": 2}, {"scale": 1.0}),
}
# Other shapes, or other names.
OTHER_SHAPES = {
    "another budget": (TRIM, {"budget": 0.3}),
    "other Linears": (
        {"target_modules": ["query"], "budget": {"trainable": 0.1}},
        {"target_modules": ["output.dense"], "exclude_modules": ["attention.output.dense"]},
    ),
}


def by_torch(source, target, tmp_path, strict=True):
    torch.save(source.state_dict(), tmp_path / "model.pt")
    target.load_state_dict(torch.load(tmp_path / "model.pt"), strict=strict)


def by_torch_not_strict(source, target, tmp_path):
    by_torch(source, target, tmp_path, strict=False)


def by_safetensors(source, target, tmp_path):
    save_model(source, str(tmp_path / "model.safetensors"))
    load_model(target, tmp_path / "model.safetensors")


def by_accelerate(source, target, tmp_path):
    for model, step in ((source, "save_state"), (target, "load_state")):
        accelerator = Accelerator(cpu=True)
        accelerator.prepare(model)
        getattr(accelerator, step)(str(tmp_path / "state"))


def by_lightning(source, target, tmp_path):
    """A checkpoint of Lightning is the state dict of a module that holds the model, and it is loaded strictly."""
    torch.save({"state_dict": nn.ModuleDict({"model": source}).state_dict()}, tmp_path / "last.ckpt")
    nn.ModuleDict({"model": target}).load_state_dict(torch.load(tmp_path / "last.ckpt")["state_dict"])


def by_ema(source, target, tmp_path):
    average = AveragedModel(source, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(source)
    other = AveragedModel(target)
    other.load_state_dict(average.state_dict())
    target.load_state_dict(other.module.state_dict())


def by_averaged_tensors(source, target, tmp_path):
    """A loop that averages every entry of the state dict, whatever it holds."""
    average = {key: tensor.float() for key, tensor in source.state_dict().items()}
    for _ in range(3):
        average = {key: 0.9 * average[key] + 0.1 * tensor for key, tensor in source.state_dict().items()}
    target.load_state_dict(average)


def by_distributed_checkpoint(source, target, tmp_path):
    dcp.save(get_model_state_dict(source), checkpoint_id=tmp_path / "dcp")
    state = get_model_state_dict(target)
    dcp.load(state, checkpoint_id=tmp_path / "dcp")
    set_model_state_dict(target, state)


LOADERS = [
    by_torch, by_torch_not_strict, by_safetensors, by_accelerate, by_lightning, by_ema, by_averaged_tensors,
    by_distributed_checkpoint,
]  # fmt: skip


@pytest.mark.parametrize("load", LOADERS)
def test_the_same_plan_is_loaded(load, tmp_path):
    source, target = trained(**TRIM), wrap(tiny_model(), **TRIM)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*mark of the plan")
        load(source, target, tmp_path)
    close = {"atol": 1e-4, "rtol": 1e-4} if load is by_averaged_tensors else {"atol": 0.0, "rtol": 0.0}
    torch.testing.assert_close(logits(target), logits(source), **close)


@pytest.mark.parametrize("name", SAME_SHAPES)
@pytest.mark.parametrize("load", LOADERS)
def test_another_plan_is_refused(load, name, tmp_path):
    options, changes = SAME_SHAPES[name]
    source, target = trained(**options), wrap(tiny_model(), **{**options, **changes})
    shapes = [{k: v.shape for k, v in model.named_parameters()} for model in (source, target)]
    assert shapes[0] == shapes[1]
    before = copy.deepcopy(target.state_dict())
    # The distributed checkpoint fills the model's own tensors before it calls the model. It compares shapes first.
    in_place = load is by_distributed_checkpoint
    with pytest.raises(CheckpointException if in_place else SensiLoadError, match="_extra_state|another plan"):
        load(source, target, tmp_path)
    assert_same_tensors(target.state_dict(), before)


@pytest.mark.parametrize("name", OTHER_SHAPES)
@pytest.mark.parametrize("load", [by_torch, by_torch_not_strict, by_accelerate, by_lightning])
def test_other_shapes_and_layers_are_refused_by_the_plan(load, name, tmp_path):
    options, changes = OTHER_SHAPES[name]
    source, target = trained(**options), wrap(tiny_model(), **{**options, **changes})
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(SensiLoadError, match="another plan"):
        load(source, target, tmp_path)
    assert_same_tensors(target.state_dict(), before)


@pytest.mark.parametrize("strict", [True, False])
def test_an_adapter_without_a_peft_model(strict):
    """Transformers and others put the layers into the user's own model. Then the layers alone carry the plan."""
    options = {"budget": 0.5, "widths": "uniform", "task_type": "SEQ_CLS"}
    source, same = (inject_adapter_in_model(SensiConfig(score="magnitude", **options), tiny_model()) for _ in range(2))
    other = inject_adapter_in_model(SensiConfig(score="random", seed=3, **options), tiny_model())
    same.load_state_dict(source.state_dict(), strict=strict)
    with pytest.raises(SensiLoadError, match="another plan"):
        other.load_state_dict(source.state_dict(), strict=strict)


def test_a_state_dict_without_a_plan_warns():
    """As from an earlier version, or of a loop that saves only what is trained."""
    source, target = trained(**TRIM), wrap(tiny_model(), **TRIM)
    earlier = {key: tensor for key, tensor in source.state_dict().items() if not key.endswith("_extra_state")}
    with pytest.warns(UserWarning, match="not the mark of the plan"):
        target.load_state_dict(earlier)
    assert torch.equal(logits(target), logits(source))
    few = {name: parameter for name, parameter in source.named_parameters() if parameter.requires_grad}
    with pytest.warns(UserWarning, match="not the mark of the plan"):
        target.load_state_dict(few, strict=False)


@pytest.mark.parametrize(
    "entry",
    [torch.zeros(3), torch.zeros(1, 63), "text", None, lambda mark: mark ^ 64 * (torch.arange(mark.shape[1]) == 41)],
    ids=["one dimension", "too narrow", "text", "nothing", "other bits"],
)
def test_a_damaged_mark(entry):
    source, target = trained(**TRIM), wrap(tiny_model(), **TRIM)
    state = source.state_dict()
    key = next(key for key in state if key.endswith("query.plan_mark._extra_state"))
    state[key] = entry(state[key]) if callable(entry) else entry
    with pytest.raises(SensiLoadError, match="plan"):
        target.load_state_dict(state)


@pytest.mark.parametrize(
    "options", [{"update": "sparse", "sparse": 20}, {"update": "low_rank", "rank": 2}, TRIM], ids=str
)
def test_a_merged_state_and_an_unmerged_one_are_not_mixed(options, tmp_path):
    """The base would have the adapter's changes already, and would get them again; or it would lose them."""
    source, target = trained(**options), wrap(tiny_model(), **options)
    unmerged = copy.deepcopy(source.state_dict())
    source.merge_adapter()
    before = copy.deepcopy(target.state_dict())
    for strict in (True, False):
        with pytest.raises(SensiLoadError, match="unmerge_adapter"):
            target.load_state_dict(source.state_dict(), strict=strict)
        with pytest.raises(SensiLoadError, match="unmerge_adapter"):
            source.load_state_dict(unmerged, strict=strict)
    with pytest.raises(CheckpointException, match="Size mismatch"):
        by_distributed_checkpoint(source, target, tmp_path)
    assert_same_tensors(target.state_dict(), before)
    target.merge_adapter()
    target.load_state_dict(source.state_dict())
    assert torch.equal(logits(target), logits(source))
    source.save_pretrained(tmp_path / "adapter")  # PEFT's files hold nothing of the base
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")
    source.unmerge_adapter()
    assert torch.equal(logits(loaded), logits(source))


def test_a_plan_that_changes_changes_the_mark(tmp_path):
    model, target = trained(**TRIM), wrap(tiny_model(), **TRIM)
    before = model.state_dict()
    model.base_model.trim(0.3)
    with pytest.raises(SensiLoadError, match="another plan"):
        model.load_state_dict(before, strict=False)
    with pytest.raises(SensiLoadError, match="another plan"):
        target.load_state_dict(model.state_dict(), strict=False)
    # The ways out that the error names.
    model.save_pretrained(tmp_path)
    saved = SensiConfig.from_pretrained(tmp_path)
    saved.inference_mode = False
    for config in (model.peft_config["default"], saved):
        again = get_peft_model(tiny_model(), config)
        again.load_state_dict(model.state_dict())
        assert torch.equal(logits(again), logits(model))
        assert again.num_parameters(only_trainable=True) == model.num_parameters(only_trainable=True)


def average_of_torch(model):
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9999))
    for _ in range(3):
        average.update_parameters(model)
    return average.module


def average_in_place(model):
    """As the EMA models of timm do."""
    average = copy.deepcopy(model)
    for _ in range(3):
        for mine, theirs in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
            mine.copy_(0.9999 * mine + 0.0001 * theirs)
    return average


INTEGERS = {
    "positions": {"update": "low_rank+sparse", "rank": 2, "sparse": 300, "target_modules": ["query", "value"]},
    "masks": {"update": "mask", "sparsity": 0.5},
}


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("make", [average_of_torch, average_in_place])
def test_averages_leave_positions_and_masks(make, name):
    """Cut off, `0.9999 * 200 + 0.0001 * 200` is 199."""
    model = trained(**INTEGERS[name])
    if name == "masks":
        model.base_model.compress("bits")
    average = make(model)
    for copied in (average.state_dict(), average_in_place(average).state_dict()):
        integers = {key: t for key, t in copied.items() if not t.is_floating_point()}
        assert_same_tensors(integers, {key: t for key, t in model.state_dict().items() if key in integers})
    torch.testing.assert_close(logits(average), logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", INTEGERS)
def test_averages_that_are_floats_are_rounded(name):
    model, target = trained(**INTEGERS[name]), wrap(tiny_model(), **INTEGERS[name])
    for one in (model, target) if name == "masks" else ():
        one.base_model.compress("bits")
    average = {key: 0.9999 * t.float() + 0.0001 * t.float() for key, t in model.state_dict().items()}
    target.load_state_dict(average)
    integers = {key: t for key, t in model.state_dict().items() if not t.is_floating_point()}
    assert_same_tensors({key: t for key, t in target.state_dict().items() if key in integers}, integers)
    torch.testing.assert_close(logits(target), logits(model), atol=1e-4, rtol=1e-4)


def average_of_copies(model, decay):
    """A loop that averages a dict of copies, and keeps their dtypes."""
    average = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for _ in range(3):
        for key, tensor in model.state_dict().items():
            average[key].copy_(decay * average[key] + (1 - decay) * tensor)
    return average


@pytest.mark.parametrize("name", INTEGERS)
def test_averages_that_are_cut_off_are_repaired_or_refused(name):
    """Positions and masks in a dict belong to no layer that could keep them."""
    config = {**INTEGERS[name], "support": "random"} if name == "positions" else INTEGERS[name]
    model, same = trained(**config), wrap(tiny_model(), **config)
    other = wrap(tiny_model(), **config, **({"seed": 1} if name == "positions" else {}))
    for one in (model, same, other) if name == "masks" else ():
        one.base_model.compress("bits")
    if name == "masks":
        same.load_state_dict(model.state_dict())
    average = average_of_copies(model, 0.9)
    kind = "sensi_places" if name == "positions" else "sensi_bits"
    changed = [key for key, t in average.items() if kind in key and not torch.equal(t, model.state_dict()[key])]
    assert changed
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(SensiLoadError, match="is not what it was"):
        other.load_state_dict(average)
    assert_same_tensors(other.state_dict(), before)
    same.load_state_dict(average)
    integers = {key: t for key, t in model.state_dict().items() if not t.is_floating_point()}
    assert_same_tensors({key: t for key, t in same.state_dict().items() if key in integers}, integers)
    torch.testing.assert_close(logits(same), logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.9999])
def test_averages_do_not_hide_another_plan(decay):
    """If the entry with the plan is averaged and cut off, it can still be compared."""
    options = {"budget": 0.5, "widths": "uniform"}
    source, same, other = trained(**options), wrap(tiny_model(), **options), wrap(tiny_model(), **options, seed=3,
                                                                                   score="random")  # fmt: skip
    average = average_of_copies(source, decay)
    same.load_state_dict(average)
    torch.testing.assert_close(logits(same), logits(source), atol=1e-4, rtol=1e-4)
    with pytest.raises(SensiLoadError, match="another plan"):
        other.load_state_dict(average)
    key = next(key for key in average if key.endswith("query.plan_mark._extra_state"))
    average[key][:, :32] = 0  # the names of the adapters
    with pytest.raises(SensiLoadError, match="no mark"):
        same.load_state_dict(average)


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_a_mask_that_is_drawn_later_has_no_average(decay, looks):
    """The copy has no mask yet. Its average with a mask would be a third one, of no meaning."""
    config = recipes.dsee(rank=2, sparse=8, mask="unstructured", sparsity=0.5, task_type="SEQ_CLS")
    model = get_peft_model(tiny_model(), config)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    schedule = Schedule(model, total_steps=4)
    for _ in range(2):
        average.update_parameters(model)
        schedule.step()
    late = copy.deepcopy(model)
    for _ in range(2):
        schedule.step()
        average.update_parameters(model)
        if looks:
            with pytest.raises(SensiError, match="make a new copy"):
                logits(average.module)
    for use in (logits, nn.Module.state_dict, copy.deepcopy):
        with pytest.raises(SensiError, match="make a new copy"):
            use(average.module)
    late.load_state_dict(model.state_dict())
    assert torch.equal(logits(late), logits(model))


def with_large_positions():
    """Float32 cannot hold the average of large positions exactly."""
    config = {"update": "sparse", "sparse": 40, "support": "random", "target_modules": ["intermediate.dense"]}
    return wrap(tiny_model(intermediate_size=2**13, num_hidden_layers=1), **config)


def test_large_positions_are_not_moved_by_many_averages():
    """Cut off 30 times, positions up to 2^18 become smaller by up to 30."""
    model = with_large_positions()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9999))
    for _ in range(30):
        average.update_parameters(model)
    (place,) = [key for key in model.state_dict() if "sensi_places" in key]
    moved = dict(model.named_parameters())[place] - dict(average.module.named_parameters())[place]
    assert moved.max() > 1
    assert torch.equal(average.module.state_dict()[place], model.state_dict()[place])
    torch.testing.assert_close(logits(average.module), logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("change", [lambda t: t + 0.4, lambda t: t.bfloat16(), lambda t: t.half()])
def test_floats_that_cannot_hold_the_positions_are_refused(change):
    model = with_large_positions()
    state = dict(model.state_dict())
    (place,) = [key for key in state if "sensi_places" in key]
    before = state[place].clone()
    state[place] = change(state[place])
    with pytest.raises(SensiLoadError, match="must hold integers"):
        model.load_state_dict(state)
    assert torch.equal(model.state_dict()[place], before)


def test_marks_of_earlier_versions_have_no_zeros():
    source, target = trained(**TRIM), wrap(tiny_model(), **TRIM)
    earlier = {key: t[:, :64] if key.endswith("_extra_state") else t for key, t in source.state_dict().items()}
    target.load_state_dict(earlier)
    assert torch.equal(logits(target), logits(source))
    with pytest.raises(SensiLoadError, match="another plan"):
        wrap(tiny_model(), **TRIM | {"budget": 0.4}).load_state_dict(earlier, strict=False)


def test_other_adapters_have_no_influence():
    source, target = trained(**TRIM), wrap(tiny_model(), **TRIM)
    target.add_adapter("b", SensiConfig(budget=0.3, score="magnitude", task_type="SEQ_CLS"))
    target.load_state_dict(source.state_dict(), strict=False)
    assert torch.equal(logits(target), logits(source))
    target.delete_adapter("b")
    target.load_state_dict(source.state_dict())
