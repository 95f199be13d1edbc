"""`Trainer`: train, save, resume, load the best model; and never a word about us in its arguments."""

from __future__ import annotations

import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import BOTH, TRIM, TUNE, assert_same_tensors, logits, only_slow, tiny_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_sensi import SensiConfig, SensiError, SensiLoadError


def trainer(model, rows, folder, *, callbacks=(), **changes) -> Trainer:
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "num_train_epochs": 2,
        "learning_rate": 5e-3,
        "save_strategy": "epoch",
        "eval_strategy": "no",
        "logging_steps": 1000,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
        **changes,
    }
    return Trainer(
        model, TrainingArguments(**arguments), train_dataset=rows, eval_dataset=rows, callbacks=list(callbacks)
    )


def wrapped(rows, adapter_name="default", **config) -> PeftModel:
    calibration = torch.utils.data.DataLoader(rows, batch_size=8)
    config = {"calibration": calibration, "priming_steps": 2, "calibration_steps": 2, "task_type": "SEQ_CLS", **config}
    return get_peft_model(tiny_model(), SensiConfig(**config), adapter_name)


def state(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".sensi_" in n or ".modules_to_save." in n}


def test_train_and_save(budget, rows, tmp_path):
    model = wrapped(rows, **budget)
    run = trainer(model, rows, tmp_path, num_train_epochs=6)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < 0.8 * before
    run.save_model(str(tmp_path / "final"))
    names = {p.name for p in (tmp_path / "final").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names and "model.safetensors" not in names
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path / "final")), logits(model))
    checkpoints = sorted(p.name for p in tmp_path.glob("checkpoint-*"))
    assert len(checkpoints) == 6


@pytest.mark.parametrize("bf16", [False, *only_slow(True)])
def test_resume_equals_the_uninterrupted_run(budget, rows, tmp_path, bf16):
    torch.manual_seed(0)
    whole = wrapped(rows, **budget)
    trainer(whole, rows, tmp_path / "whole", bf16=bf16).train()
    torch.manual_seed(0)
    again = wrapped(rows, **budget)
    assert again.base_model.plan() == whole.base_model.plan()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "half" / "checkpoint-4")
    trainer(again, rows, tmp_path / "half", bf16=bf16).train(resume_from_checkpoint=True)
    assert_same_tensors(state(again), state(whole))
    assert torch.equal(logits(again), logits(whole))


PLANS = [
    (TRIM, TRIM),
    ({"budget": 0.6}, {"budget": 0.3}),
    (TUNE, {"budget": {"trainable": 0.02}}),
    (BOTH, {"budget": {"params": 0.4, "trainable": 0.03}}),
    (BOTH, TUNE),
    (TUNE, BOTH),
]


@pytest.mark.parametrize(("trained_under", "wrapped_under"), PLANS)
def test_resume_when_the_fresh_wrap_chose_another_plan(trained_under, wrapped_under, rows, tmp_path):
    """`Trainer` loads weights into the model it is given and never reads the checkpoint's config."""
    options = {"score": "random", "multiple_of": 1}
    whole = wrapped(rows, seed=0, **options, **trained_under)
    trainer(whole, rows, tmp_path / "whole").train()
    other = wrapped(rows, seed=1, **options, **wrapped_under)
    assert other.base_model.plan() != whole.base_model.plan()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "half" / "checkpoint-4")
    with warnings.catch_warnings(record=True) as caught:
        trainer(other, rows, tmp_path / "half").train(resume_from_checkpoint=True)
    # A plan that is a little larger is no news, unless it exceeds the limit of this wrap.
    limits, plan = other.active_peft_config.limits, whole.base_model.plan()
    is_over = plan.params_share > (limits.params or 1.0) or plan.flops_share > (limits.flops or 1.0)
    assert any("The checkpoint keeps" in str(warning.message) for warning in caught) == is_over
    assert other.base_model.plan() == whole.base_model.plan()
    with pytest.raises(SensiError, match="scores of 'default' are not known"):
        other.explain()  # its own scores are not behind this plan
    assert_same_tensors(state(other), state(whole))
    assert torch.equal(logits(other), logits(whole))
    # What it says, saves and merges afterwards is the checkpoint's plan, too.
    assert other.get_nb_trainable_parameters() == whole.get_nb_trainable_parameters()
    other.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path / "saved")), logits(whole))
    with other.disable_adapter():
        assert torch.equal(logits(other), logits(tiny_model()))
    torch.testing.assert_close(logits(other.merge_and_unload()), logits(whole), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("there", "here"),
    [(["norms"], []), ([], ["norms"]), (["output_biases"], []), ([], ["output_biases"]), (["pooler"], [])],
)
def test_a_checkpoint_that_trains_other_parts_is_not_half_loaded(there, here, rows, tmp_path):
    trainer(wrapped(rows, also_train=there, score="random", **TRIM), rows, tmp_path).train()
    other = wrapped(rows, also_train=here, score="random", **TRIM)
    before = state(other)
    with pytest.raises(SensiLoadError, match="`also_train`|lacks|holds"):
        trainer(other, rows, tmp_path).train(resume_from_checkpoint=True)
    assert_same_tensors(state(other), before)


@pytest.mark.parametrize("layers", [1, 3])
def test_a_checkpoint_of_another_base_is_refused(layers, rows, tmp_path):
    foreign = get_peft_model(tiny_model(num_hidden_layers=layers), SensiConfig(score="magnitude", **TUNE))
    foreign.save_pretrained(tmp_path)
    model = wrapped(rows, task_type=None, **TUNE)
    plan, before = model.base_model.plan(), state(model)
    with pytest.raises(SensiLoadError, match="base model"):
        model.load_adapter(tmp_path, "default", is_trainable=True)
    assert model.base_model.plan() == plan
    assert_same_tensors(state(model), before)


def test_another_plan_cannot_be_resumed_without_the_base(rows, tmp_path):
    options = {"score": "random", "budget": 0.5}
    trainer(wrapped(rows, seed=0, **options), rows, tmp_path).train()
    other = wrapped(rows, seed=1, keep_base=False, **options)
    plan, before = other.base_model.plan(), state(other)
    with pytest.raises(SensiLoadError, match="another plan"):
        trainer(other, rows, tmp_path).train(resume_from_checkpoint=True)
    assert other.base_model.plan() == plan
    assert_same_tensors(state(other), before)


def test_the_same_plan_can_be_resumed_without_the_base(rows, tmp_path):
    options = {"score": "random", "budget": 0.5, "keep_base": False}
    whole = wrapped(rows, **options)
    trainer(whole, rows, tmp_path / "whole").train()
    again = wrapped(rows, **options)
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "half" / "checkpoint-4")
    trainer(again, rows, tmp_path / "half").train(resume_from_checkpoint=True)
    assert_same_tensors(state(again), state(whole))


class Worse(TrainerCallback):
    """Ruins the model after the first epoch, so that the best checkpoint is not the last."""

    def __init__(self, model) -> None:
        self.model, self.seen = model, None

    def on_epoch_end(self, args, state_, control, **kwargs):
        if state_.epoch >= 2:
            with torch.no_grad():
                for parameter in self.model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn_like(parameter))
        else:
            self.seen = state(self.model)


BEST = {"load_best_model_at_end": True, "eval_strategy": "epoch", "num_train_epochs": 3}


def test_load_best_model_at_end(budget, rows, tmp_path):
    model = wrapped(rows, **budget)
    callback = Worse(model)
    run = trainer(model, rows, tmp_path, callbacks=[callback], **BEST)
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-4")
    assert_same_tensors(state(model), callback.seen)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path / "checkpoint-4")), logits(model))


def test_the_best_values_come_back_under_another_name(budget, rows, tmp_path):
    """PEFT saves such an adapter into a subfolder, where `Trainer` alone does not look."""
    model = wrapped(rows, "other", **budget)
    callback = Worse(model)
    trainer(model, rows, tmp_path, callbacks=[callback], **BEST).train()
    assert (tmp_path / "checkpoint-4" / "other" / "adapter_model.safetensors").exists()
    assert_same_tensors(state(model), callback.seen)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "checkpoint-4" / "other", adapter_name="yet-another")
    assert torch.equal(logits(loaded), logits(model))


def at_the_end(model, checkpoint) -> None:
    """What `Trainer` does at the end of a training whose best checkpoint is this one."""
    best = SimpleNamespace(best_model_checkpoint=str(checkpoint), best_metric=0.0)
    Trainer._load_best_model(
        SimpleNamespace(model=model, state=best, is_fsdp_enabled=False, is_deepspeed_enabled=False)
    )


@pytest.mark.parametrize("active", ["other", ["other", "default"], ["default", "other"]])
def test_the_best_values_of_the_active_adapters_come_back(active, tmp_path):
    """`Trainer` alone loads those of "default" into the active adapter, or only those of the first one."""
    base = tiny_model(task="FEATURE_EXTRACTION")
    model = get_peft_model(base, SensiConfig(score="random", **TUNE))
    model.add_adapter("other", SensiConfig(score="random", seed=1, **TUNE))
    model.base_model.set_adapter(active)
    model.save_pretrained(tmp_path)
    expected = state(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    at_the_end(model, tmp_path)
    assert_same_tensors(state(model), expected)
    assert model.active_adapters == ([active] if isinstance(active, str) else active)


def test_best_values_that_are_gone_are_an_error(tmp_path):
    model = get_peft_model(tiny_model(), SensiConfig(score="magnitude", **TUNE), "other")
    model.save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "other")
    with pytest.raises(SensiError, match=r"no values of the adapter 'other'.*save_on_each_node"):
        at_the_end(model, tmp_path)


def test_resume_under_another_name(rows, tmp_path):
    options = {"score": "random", "multiple_of": 1}
    whole = wrapped(rows, "other", seed=0, **options, **TRIM)
    trainer(whole, rows, tmp_path / "whole").train()
    again = wrapped(rows, "other", seed=1, **options, **TRIM)
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "half" / "checkpoint-4")
    trainer(again, rows, tmp_path / "half").train(resume_from_checkpoint=True)
    assert_same_tensors(state(again), state(whole))


def test_an_adapter_of_transformers_cannot_come_back_by_trainer(rows, tmp_path):
    def adapted():
        model = tiny_model()
        model.add_adapter(SensiConfig(score="magnitude", modules_to_save=["classifier"], **TRIM), "other")
        return model

    model = adapted()
    with pytest.raises(SensiError, match="get_peft_model"):
        trainer(model, rows, tmp_path, **BEST).train()
    with pytest.raises(SensiError, match="get_peft_model"):
        trainer(adapted(), rows, tmp_path).train(resume_from_checkpoint=True)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "checkpoint-12")  # as the error says
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(budget, rows, tmp_path, reentrant):
    states = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = wrapped(rows, **budget)
        options = {"gradient_checkpointing": checkpointing, "save_strategy": "no"}
        if checkpointing:
            options["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}
        trainer(model, rows, tmp_path, num_train_epochs=1, **options).train()
        states.append(state(model))
    for name, value in states[0].items():
        if "key.sensi_bias" not in name:  # it has no effect, so its gradient is noise, which AdamW makes large
            torch.testing.assert_close(states[1][name], value, atol=1e-5, rtol=1e-4)


def test_gradient_accumulation_equals_a_large_batch(rows, tmp_path):
    states = []
    for size, steps in ((16, 1), (4, 4)):
        model = wrapped(rows, score="random", **TUNE)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "save_strategy": "no"}
        trainer(model, rows, tmp_path, num_train_epochs=1, optim="sgd", **options).train()
        states.append(state(model))
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, atol=1e-5, rtol=1e-4)


def test_the_optimizer_holds_trained_values_only(rows, tmp_path):
    model = wrapped(rows, **BOTH)
    run = trainer(model, rows, tmp_path, num_train_epochs=1)
    run.train()
    held = sum(v["exp_avg"].numel() for v in run.optimizer.optimizer.state.values())
    assert held == model.base_model.plan().trainable_params + 32 * 3 + 3


def test_a_torn_pair_of_files_is_seen(rows, tmp_path):
    """A kill between the two files of a save: weights of one plan beside the config of another."""
    for seed in (0, 1):
        model = wrapped(rows, score="random", seed=seed, **TRIM)
        model.save_pretrained(tmp_path / str(seed))
    shutil.copy(tmp_path / "0" / "adapter_model.safetensors", tmp_path / "1" / "adapter_model.safetensors")
    with pytest.raises(SensiError, match="do not belong together"):
        PeftModel.from_pretrained(tiny_model(), tmp_path / "1")
