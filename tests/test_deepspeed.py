"""DeepSpeed: what it does to parameters is imitated here; one slow test needs DeepSpeed itself."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from processes import free_port
from tiny import TRIM, TUNE, assert_same_tensors, logits, snapshot, tiny_batches, tiny_model, trained, wrap

from peft_sensi import Schedule, SensiConfig, SensiError, SensiLoadError, compute_scores, recipes
from peft_sensi.layers.layer import layers_of


SPARSE = {"update": "sparse", "sparse": 40, "support": "random"}
CUT = {"phase": "cut", "start": 0.25, "end": 0.75, "cuts": 2}


@contextmanager
def partitioned(model):
    """Inside the block, parameters are as ZeRO-3 leaves them. Afterwards, as inside of `GatheredParameters`."""
    whole = [(p, p.data) for p in model.parameters()]
    for number, (p, data) in enumerate(whole):
        p.ds_id, p.ds_shape, p.ds_numel = number, data.shape, data.numel()
        p.data = data.new_empty(0)
    try:
        yield
    finally:
        for p, data in whole:
            p.data = data


def collected(model):
    """What `Trainer` collects under ZeRO-3: only what is trained."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_a_partitioned_base_is_refused_until_it_is_gathered(tmp_path):
    config = SensiConfig(**TRIM, calibration=tiny_batches(), task_type="SEQ_CLS", priming_steps=2)
    adapter = trained(**TRIM)
    adapter.save_pretrained(tmp_path)
    model, base = get_peft_model(tiny_model(), config), tiny_model()
    calls = (
        lambda: get_peft_model(base, config),
        lambda: compute_scores(base, tiny_batches(), progress=False),
        lambda: PeftModel.from_pretrained(base, tmp_path),
    )
    with partitioned(base):
        for call in calls:
            with pytest.raises(SensiError, match="before `TrainingArguments`.*or inside of `deepspeed.zero.Gathered"):
                call()
    assert_same_tensors(snapshot(get_peft_model(base, config)), snapshot(model))
    base = tiny_model()
    with partitioned(base):
        pass
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path)), logits(adapter))


def test_a_partitioned_adapter_is_neither_changed_nor_saved_as_it_is(tmp_path):
    model = trained(**TRIM)
    model.save_pretrained(tmp_path / "before")
    expected = logits(model)
    calls = (
        lambda: model.merge_adapter(),
        lambda: model.merge_and_unload(),
        lambda: model.compress("int8"),
        lambda: model.trim(0.25),
    )
    with partitioned(model):
        for call in calls:
            with pytest.raises(SensiError, match="sharded by FSDP or DeepSpeed ZeRO-3"):
                call()
        with pytest.raises(SensiError, match="ZeRO-3 has partitioned the model"):
            model.load_adapter(tmp_path / "before", "default")
        with pytest.raises(SensiError, match="holds shards of FSDP or DeepSpeed ZeRO-3"):
            model.save_pretrained(tmp_path)
    assert torch.equal(logits(model), expected)
    state = collected(model)
    with partitioned(model):
        model.save_pretrained(tmp_path, state_dict=state)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), expected)
    model.merge_adapter()  # inside of `GatheredParameters`
    torch.testing.assert_close(logits(model), expected)


def test_a_partitioned_head_is_not_saved(tmp_path):
    """ZeRO-3 leaves small parameters whole, so all layers of an adapter may be whole, and its head not."""
    model = trained(**TUNE)
    with partitioned(model.base_model.model.classifier), pytest.raises(SensiError, match="holds shards"):
        model.save_pretrained(tmp_path)


def test_integers_that_are_not_collected_are_saved_all_the_same(tmp_path):
    model = wrap(tiny_model(), **SPARSE)
    expected, state = logits(model), collected(model)
    with partitioned(model):
        model.save_pretrained(tmp_path, state_dict=state)
        for layer in layers_of(model, "default").values():
            layer.sensi_integers.clear()  # as if the layers had never had their integers
        with pytest.raises(SensiError, match=r"lacks .*sensi_places.*accelerator\.get_state_dict"):
            model.save_pretrained(tmp_path, state_dict=state)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), expected)


def test_nothing_of_a_partitioned_model_is_cached():
    model = wrap(tiny_model(), **TUNE)
    with partitioned(model):
        pass
    model.train()(**tiny_batches(1)[0]).loss.backward()
    assert not any(getattr(module, "_sensi_fused", None) for module in model.modules())


@pytest.mark.parametrize("processes", [1, 2])
def test_parameters_without_values_are_refused_where_they_must_be_gathered(processes, monkeypatch):
    model = wrap(tiny_model(), **TRIM, keep_base=False)
    with partitioned(model):
        pass
    monkeypatch.setattr(dist, "get_world_size", lambda: processes)
    model.train()
    if processes == 1:
        model(**tiny_batches(1)[0])
    else:
        with pytest.raises(SensiError, match="without values, which `keep_base=False` leaves"):
            model(**tiny_batches(1)[0])


def drawn():
    config = recipes.dsee(rank=2, sparse=8, mask="unstructured", sparsity=0.5, task_type="SEQ_CLS")
    model = get_peft_model(tiny_model(), config)
    return model, Schedule(model, total_steps=2)


def test_a_checkpoint_without_integers_is_loaded_only_where_they_are_the_same():
    """DeepSpeed saves the state dict of a module without what is not trained, and loads it with `strict=False`."""
    model, schedule = drawn()
    other, _ = drawn()
    early = {name: t for name, t in model.state_dict().items() if "_bits" not in name and "_places" not in name}
    other.load_state_dict(early, strict=False)
    schedule.step(), schedule.step()
    late = {name: t for name, t in model.state_dict().items() if "_bits" not in name and "_places" not in name}
    before = snapshot(other)
    with pytest.raises(SensiLoadError, match="but not the integers .* make a new optimizer"):
        other.load_state_dict(late, strict=False)
    assert_same_tensors(snapshot(other), before)
    for state in (early, late):  # without values of the adapter, nothing is lost
        other.load_state_dict({name: t for name, t in state.items() if "sensi_" not in name}, strict=False)
    model.load_state_dict(late, strict=False)
    logits(model)
    with partitioned(model):  # DeepSpeed's own files hold the values
        model.load_state_dict(model.state_dict())


def test_integers_that_are_partitioned_are_compared_as_well():
    model = trained(**SPARSE)
    state = {name: t for name, t in model.state_dict().items() if "_places" not in name}
    empty = {name: t[:0] if "sensi_values" in name else t for name, t in state.items()}

    def load_into(fresh):
        with partitioned(fresh):
            whole = fresh.state_dict()
            own = {name: t for name, t in whole.items() if "sensi_" not in name and "plan_mark" not in name}
            fresh.load_state_dict({**empty, **own}, strict=False)

    load_into(wrap(tiny_model(), **SPARSE))
    with pytest.raises(SensiLoadError, match="but not the integers"):
        load_into(wrap(tiny_model(), **SPARSE, seed=1))


@pytest.mark.parametrize("phase", ["cut", "freeze_dense", "draw_mask"])
def test_schedules_that_deepspeeds_optimizer_would_undo_are_refused(phase):
    if phase == "draw_mask":
        model, schedule = drawn()
    elif phase == "cut":
        model = wrap(tiny_model(), budget=0.5, schedule=CUT)
        schedule = Schedule(model, 4)
    else:
        model = get_peft_model(tiny_model(), recipes.learners(4, priming_epochs=1, task_type="SEQ_CLS"))
        schedule = Schedule(model, 4, steps_per_epoch=2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter._hp_mapping = None  # this process holds no part of the copy
    if phase == "draw_mask":
        schedule.step()
    else:
        with pytest.raises(SensiError, match=f"DeepSpeed's optimizer trains copies .* {phase!r}"):
            schedule.step()


def test_an_optimizer_of_copies_is_refused_after_a_trim():
    model = trained(budget=1.0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    flat = torch.cat([p.detach().flatten() for p in parameters])
    start = 0
    for p in parameters:
        p._hp_mapping = SimpleNamespace(hp_fragment=flat.narrow(0, start, p.numel()))
        start += p.numel()
    optimizer, other = torch.optim.AdamW([flat]), torch.optim.AdamW([flat.clone()])
    flat.grad = torch.zeros_like(flat)
    optimizer.step()
    model.trim(0.5)
    other.step()
    with pytest.raises(SensiError, match="made before units were removed"):
        optimizer.step()


def test_parameters_in_16_bits_with_copies_in_float32_do_not_warn():
    model = wrap(tiny_model(), **TRIM)
    for p in model.parameters():
        p.data = p.data.bfloat16()
        p._hp_mapping = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.train()(**tiny_batches(1)[0]).loss.backward()


@pytest.mark.slow
def test_zero_3_itself(tmp_path, monkeypatch):
    """Slow, because DeepSpeed compiles a kernel first."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    deepspeed = pytest.importorskip("deepspeed")
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 1000.0,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    changes = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    models = {}
    for way in ("plain", "ZeRO-3"):
        torch.manual_seed(0)
        model = wrap(tiny_model(**changes), budget=0.5, update="low_rank+sparse", rank=2, sparse=8)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        engine = None
        if way == "ZeRO-3":
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
            with pytest.raises(SensiError, match="holds shards"):
                model.save_pretrained(tmp_path)
        model.train()
        for batch in tiny_batches(3):
            loss = (engine or model)(**batch).loss
            engine.backward(loss) if engine else loss.backward()
            (engine or optimizer).step()
            optimizer.zero_grad()
        state = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True) if engine else None
        model.save_pretrained(tmp_path / way, state_dict=state)
        models[way] = PeftModel.from_pretrained(tiny_model(**changes), tmp_path / way)
    torch.testing.assert_close(logits(models["ZeRO-3"]), logits(models["plain"]))
    dist.destroy_process_group()
