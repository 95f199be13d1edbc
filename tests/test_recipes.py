"""Every recipe and mixture keeps the contract, and trains as many values as its paper."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from test_trainer import trainer as trainer_of
from tiny import only_slow, some_slow, tiny_batches, tiny_model, train
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    MPNetConfig,
    T5Config,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from peft_sensi import BudgetError, Plan, Schedule, Scores, SensiCallback, SensiConfig, SensiError, recipes
from peft_sensi.layers.layer import SensiLayer, layers_of
from peft_sensi.utils.states import TRIMMED


DATA = {"task_type": "SEQ_CLS", "calibration": tiny_batches(4), "priming_steps": 2, "calibration_steps": 3}
PLAIN = {"task_type": "SEQ_CLS"}

CONFIGS = {
    "sensi_bert": lambda: recipes.sensi_bert(0.5, **DATA),
    "sensi_bert_flops": lambda: recipes.sensi_bert(0.5, "flops", score="fisher", **DATA),
    "sensi_bert_tensor": lambda: recipes.sensi_bert(0.6, granularity="tensor", **DATA),
    "sensi_bert_cuts": lambda: recipes.sensi_bert(0.5, trim="in cuts", task_type="SEQ_CLS", calibration_steps=2),
    "sensi_bert_warm_up": lambda: recipes.sensi_bert(0.5, "flops", trim="after warm-up", score="taylor", **PLAIN),
    "far": lambda: recipes.far(0.1, training_steps=200, **DATA),
    "far_random": lambda: recipes.far(0.1, embeddings=False, score="random", **PLAIN),
    "learners": lambda: recipes.learners(4, priming_epochs=1, **PLAIN),
    "learners_unprimed": lambda: recipes.learners(4, priming_epochs=0, **PLAIN),
    "dsee": lambda: recipes.dsee(4, 16, **PLAIN),
    "dsee_magnitude": lambda: recipes.dsee(4, 16, support="magnitude", **PLAIN),
    "dsee_random": lambda: recipes.dsee(4, 16, support="random", **PLAIN),
    "dsee_unstructured": lambda: recipes.dsee(4, 16, mask="unstructured", sparsity=0.3, **PLAIN),
    "dsee_structured": lambda: recipes.dsee(4, 16, mask="structured", sparsity=0.3, **PLAIN),
    "l0_close": lambda: recipes.l0_close(0.2, **DATA),
    "l0_close_layers": lambda: recipes.l0_close(layers=1, **DATA),
    "binary_mask": lambda: recipes.binary_mask(0.1, **PLAIN),
    "trim_and_tune": lambda: SensiConfig(budget={"flops": 0.6, "trainable": 0.08}, **DATA),
    "trim_and_low_rank": lambda: SensiConfig(budget=0.6, update="low_rank", rank=2, **DATA),
    "mask_and_tune": lambda: SensiConfig(budget={"trainable": 0.1}, sparsity=0.2, **DATA),
}


def trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def fit(model: PeftModel, steps: int = 4) -> None:
    config = model.peft_config["default"]
    schedule = Schedule(model, steps, steps // 2, calibration=DATA["calibration"]) if config.schedule else None
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for batch in tiny_batches(steps, seed=3):
        if schedule is not None:
            schedule.step(optimizer)
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if schedule is not None:
        schedule.finish()
    model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_batches(1, seed=9)[0]).logits


@pytest.mark.parametrize(
    "name", some_slow(CONFIGS, "sensi_bert_tensor", "far_random", "learners_unprimed", "dsee_magnitude", "dsee_random")
)
def test_contract(name, tmp_path):
    base = logits(tiny_model())
    model = get_peft_model(tiny_model(), CONFIGS[name]())
    plan = model.base_model.plan()
    head = sum(p.numel() for p in tiny_model().classifier.parameters())
    assert trained(model) == plan.trainable_params + head
    fit(model)
    expected = logits(model)
    assert not torch.equal(expected, base)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.save_pretrained(tmp_path)
    for kwargs in ({}, {"low_cpu_mem_usage": True}, {"adapter_name": "other"}, {"is_trainable": True}):
        assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), str(tmp_path), **kwargs).eval()), expected)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=0)
    assert all(type(m).__module__.split(".")[0] != "peft_sensi" for m in merged.modules())


@pytest.mark.parametrize(
    "name",
    [
        *("learners", "dsee_structured", "binary_mask", "sensi_bert_cuts"),
        *only_slow("dsee_unstructured", "far", "mask_and_tune"),
    ],
)
def test_trainer_resumes_to_the_same_model(name, tmp_path):
    rows = [{k: v[i] for k, v in batch.items()} for batch in tiny_batches(6, padding=False, seed=5) for i in range(4)]

    def trainer(**saving: Any) -> Trainer:
        torch.manual_seed(0)
        model = get_peft_model(tiny_model(), CONFIGS[name]())
        arguments = TrainingArguments(
            str(tmp_path), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2,
            use_cpu=True, report_to=[], seed=1, disable_tqdm=True, **saving,
        )  # fmt: skip
        return Trainer(model, arguments, train_dataset=rows, callbacks=[SensiCallback(DATA["calibration"])])

    whole = trainer(save_steps=1)
    whole.train()
    for saved_after in (1, 2, 4):
        resumed = trainer(save_strategy="no")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{saved_after}"))
        assert torch.equal(logits(resumed.model.eval()), logits(whole.model.eval())), saved_after


def test_trained_values_of_the_papers():
    distilbert = DistilBertForSequenceClassification(DistilBertConfig(num_labels=2))
    far = get_peft_model(copy.deepcopy(distilbert), recipes.far(0.1, score="random", task_type="SEQ_CLS"))
    assert trained(far) == 41_451_572
    primed = get_peft_model(copy.deepcopy(distilbert), recipes.learners(64, task_type="SEQ_CLS"))
    assert trained(primed) == 5_961_986 + 14_155_776
    unprimed = get_peft_model(distilbert, recipes.learners(64, priming_epochs=0, task_type="SEQ_CLS"))
    assert trained(unprimed) == 5_961_986
    added = sum(p.numel() for n, p in unprimed.named_parameters() if ".sensi_down." in n or ".sensi_up." in n)
    assert added == 5_308_416
    bert = BertForSequenceClassification(BertConfig())
    dsee = get_peft_model(bert, recipes.dsee(16, 128, support="magnitude", task_type="SEQ_CLS"))
    assert dsee.base_model.plan().trainable_params == 592_896


def test_learners_freeze_attention_after_priming_and_keep_what_it_learned():
    model = get_peft_model(tiny_model(), CONFIGS["learners"]())
    before = trained(model)
    dense = {n: p for n, p in model.named_parameters() if ".sensi_weight." in n}
    assert dense and all("attention" in n for n in dense)
    start = {n: p.detach().clone() for n, p in dense.items()}
    schedule = Schedule(model, 4, steps_per_epoch=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    middle = {}
    for step, batch in enumerate(tiny_batches(4)):
        schedule.step(optimizer)
        if step == 2:
            middle = {n: p.detach().clone() for n, p in dense.items()}
            assert trained(model) == before - sum(p.numel() for p in dense.values())
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(middle[n], start[n]) and torch.equal(p, middle[n]) for n, p in dense.items())


@pytest.mark.parametrize("limit", ["params", "flops"])
def test_cuts_close_units_step_by_step_and_end_at_the_budget(limit):
    config = recipes.sensi_bert(0.4, limit, trim="in cuts", task_type="SEQ_CLS", multiple_of=4)
    model = get_peft_model(tiny_model(), config)
    assert model.base_model.plan().params_share == 1.0
    shapes = {n: p.shape for n, p in model.named_parameters()}
    schedule = Schedule(model, 20, calibration=DATA["calibration"])
    assert schedule.switches == [2, 5, 8, 10]
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    closed = []
    for step in range(12):
        before = {n: p.clone() for n, p in model.named_parameters() if ".sensi_gate." in n}
        schedule.step()  # without the optimizer, masks stay until the end
        after = {n: p for n, p in model.named_parameters() if ".sensi_gate." in n}
        if step != schedule.switches[-1]:
            assert all(bool((after[n] <= before[n]).all()) for n in after), "a closed unit was opened again"
        closed.append(sum(int((gate == 0).sum()) for gate in after.values()))
        model(**tiny_batches(1, seed=step)[0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {n: p.shape for n, p in model.named_parameters()} == shapes
    assert sorted(set(closed)) == closed[1::3] or len(set(closed)) == 5
    model.eval()
    masked = logits(model)
    schedule.finish()
    torch.testing.assert_close(logits(model), masked, atol=1e-5, rtol=0)
    plan = model.base_model.plan()
    assert_filled(plan, 0.4, limit, multiple_of=4)
    head = sum(p.numel() for p in tiny_model().classifier.parameters())
    assert trained(model) == plan.trainable_params + head
    assert model.peft_config["default"].schedule is None


def assert_filled(plan: Plan, share: float, limit: str, multiple_of: int) -> None:
    """The limit holds, and no further step of any group would fit."""
    anatomy, length = plan.anatomy, plan.sequence_length
    kept = plan.kept_params if limit == "params" else plan.kept_flops
    whole = anatomy.prunable_params if limit == "params" else 2 * anatomy.prunable_macs(length)
    assert kept <= share * whole
    for group in anatomy.trimmable:
        units = int((plan.of(group) != TRIMMED).sum())
        step = min(group.size - units, 1 if group.kind == "head" else multiple_of - units % multiple_of)
        cost = group.unit_params if limit == "params" else 2 * group.unit_macs(length)
        assert step == 0 or kept + step * cost > share * whole, group.name


def test_a_recipe_that_ranks_nothing_does_not_warn_of_scores():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for name in ("learners", "learners_unprimed", "dsee", "dsee_structured", "binary_mask", "sensi_bert_cuts"):
            get_peft_model(tiny_model(), CONFIGS[name]())


def test_structured_dsee_removes_the_heads_that_the_update_leaves_alone():
    model = get_peft_model(tiny_model(), CONFIGS["dsee_structured"]())
    query = model.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query")
    anatomy = model.base_model.plan().anatomy
    heads = anatomy.by_name["bert.encoder.layer.0.heads"]
    width = heads.sides[0].width
    for layer in (m for m in model.modules() if isinstance(m, SensiLayer) and m.part("up", "default") is not None):
        torch.nn.init.ones_(layer.part("up", "default"))
    with torch.no_grad():
        query.part("up", "default")[:width] = 0  # the first head's query stays, and so does its value:
        value = model.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.value")
        value.part("up", "default")[:width] = 0
    schedule = Schedule(model, 2)
    schedule.step(done_steps=1)
    schedule.finish()
    plan = model.base_model.plan()
    assert plan.of(plan.anatomy.by_name[heads.name])[0] == TRIMMED
    assert_filled(plan, 0.7, "flops", multiple_of=8)
    merged = model.merge_and_unload()
    assert merged.bert.encoder.layer[0].attention.self.query.weight.shape[0] < heads.size * width


def test_tuned_layers_are_the_ones_with_the_best_scores():
    model = get_peft_model(tiny_model(), recipes.l0_close(layers=1, **PLAIN, scores=layer_scores(best=1)))
    tuned = {n for n, p in model.named_parameters() if p.requires_grad and ".sensi_weight" in n}
    assert tuned and all(".layer.1." in name for name in tuned)
    report = model.base_model.explain().splitlines()
    assert report[2].startswith("1 ") and report[2].split()[-1] != "0"
    with pytest.raises(BudgetError, match="layers"):
        get_peft_model(tiny_model(), recipes.l0_close(layers=99, **PLAIN, scores=layer_scores(best=1)))


def layer_scores(best: int) -> Scores:
    names = [n for n, m in tiny_model().named_modules() if isinstance(m, nn.Linear) and ".layer." in n]
    return Scores({n: torch.tensor([2.0 if f".layer.{best}." in n else 1.0]) for n in names}, "random")


def test_gradient_cuts_need_data():
    model = get_peft_model(tiny_model(), CONFIGS["sensi_bert_cuts"]())
    with pytest.raises(SensiError, match="calibration"):
        Schedule(model, 4)


def test_a_schedule_that_nobody_steps_raises():
    model = get_peft_model(tiny_model(), CONFIGS["dsee_unstructured"]()).train()
    with pytest.raises(SensiError, match="SensiCallback"):
        model(**tiny_batches(1)[0])
    logits(model.eval())  # inference needs no schedule


@pytest.mark.parametrize("sparsity", [0.0, 0.137, 0.5])
@pytest.mark.parametrize("kind", ["dsee", "binary_mask"])
def test_merged_sparsity_is_what_was_asked_for(kind, sparsity):
    if kind == "dsee":
        config = recipes.dsee(4, 16, mask="unstructured", sparsity=sparsity, **PLAIN)
    else:
        config = recipes.binary_mask(sparsity, **PLAIN)
    model = get_peft_model(tiny_model(), config)
    fit(model)
    merged = model.merge_and_unload()
    for name, module in merged.bert.encoder.named_modules():
        if isinstance(module, nn.Linear):
            assert int((module.weight == 0).sum()) == int(sparsity * module.weight.numel() + 1e-9), name


def test_compressed_mask_takes_one_bit_a_weight(tmp_path):
    model = get_peft_model(tiny_model(hidden_size=64, intermediate_size=256), recipes.binary_mask(0.2, **PLAIN))
    fit(model)
    expected = logits(model)
    model.base_model.compress("bits")
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    base = tiny_model(hidden_size=64, intermediate_size=256)
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    assert torch.equal(logits(loaded), expected)
    state = {n: p for n, p in loaded.named_parameters() if ".sensi_" in n}
    weights = sum(m.weight.numel() for m in tiny_model(hidden_size=64, intermediate_size=256).bert.encoder.modules()
                  if isinstance(m, nn.Linear))  # fmt: skip
    assert sum(p.numel() * p.element_size() for p in state.values()) == weights / 8
    with pytest.raises(SensiError, match="only masks have bits"):
        get_peft_model(tiny_model(), SensiConfig(score="magnitude", **PLAIN)).base_model.compress("bits")


@pytest.mark.parametrize(
    "fields",
    [
        {"update": "low_rank"},
        {"update": "sparse"},
        {"update": "mask"},
        {"update": "nonsense"},
        {"rank": 4},
        {"sparse": 4},
        {"support": "random"},
        {"update": "sparse", "sparse": 3, "support": "nonsense"},
        {"update": "low_rank", "rank": 0},
        {"update": "low_rank", "rank": 4, "budget": {"trainable": 0.1}},
        {"granularity": "weight"},
        {"granularity": "nonsense"},
        {"granularity": "tensor", "budget": {"params": 0.5, "trainable": 0.1}},
        {"retention": 0.1, "budget": {"trainable": 0.1}},
        {"retention": 1.5},
        {"sparsity": -0.1},
        {"schedule": {"phase": "nonsense"}},
        {"schedule": {"phase": ["cut"]}},
        {"schedule": {"phase": "cut", "start": 0.1, "end": 0.5, "cuts": 2.0}, "budget": 0.5},
        {"schedule": {"phase": "draw_mask", "at": 0.5}},
        {"schedule": {"phase": "freeze_dense"}},
        {"schedule": "often"},
        {"schedule": {"phase": "cut", "start": 0.1, "end": 0.5, "cuts": 4}, "budget": {"trainable": 0.1}},
        {"schedule": {"phase": "cut", "start": 0.5, "end": 0.1, "cuts": 4}, "budget": 0.5},
        {"schedule": {"phase": "cut", "start": 0.1, "end": 0.5, "cuts": 0}, "budget": 0.5},
        {"schedule": {"phase": "cut", "start": 0.1, "end": 0.5, "cuts": 2}, "budget": 0.5, "score": "mask"},
        {"schedule": {"phase": "cut", "start": 0.1, "end": 0.5, "cuts": 2}, "budget": 0.5, "sparsity": 0.2},
        {"tuned_layers": 0},
        {"tuned_layers": 1, "update": "low_rank", "rank": 2},
        {"compressed": "bits"},
        {"also_train": ["output_biases"], "budget": {"trainable": 0.1}},
    ],
)
def test_what_cannot_be_combined_is_refused(fields):
    with pytest.raises(SensiError):
        SensiConfig(**fields)


CUT = {"phase": "cut", "start": 0.8, "end": 0.8, "cuts": 1}


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: recipes.dsee(mask="structured", sparsity=0.3, budget=0.5), "sets `budget`"),
        (lambda: recipes.dsee(mask="structured", sparsity=0.3, schedule=CUT), "sets `schedule`"),
        (lambda: recipes.dsee(mask="structured", sparsity="x"), "`sparsity` must be a share"),
        (lambda: recipes.sensi_bert(0.5, trim="late", schedule=CUT), "sets `schedule`"),
        (lambda: recipes.sensi_bert(0.5, trim=["late"]), "`trim` must be one of"),
        (lambda: recipes.far(0.1, training_steps=1000, priming_steps=3), "sets `priming_steps` to 10"),
        (lambda: recipes.far(0.1, also_train=["biases"]), "sets `also_train`"),
        (lambda: recipes.far(None), "`retention` must be a share"),
        (lambda: recipes.far(priming=-1, training_steps=100), "`priming` must be a share"),
        (lambda: recipes.far(priming="x", training_steps=100), "`priming` must be a share"),
        (lambda: recipes.far(training_steps=2.5), "`training_steps` must be a number"),
        (lambda: recipes.learners(4, priming_epochs=None), "`priming_epochs` must be a number"),
        (lambda: recipes.l0_close(0.1, granularity="unit"), "sets `granularity`"),
        (lambda: recipes.binary_mask(0.1, update="dense"), "sets `update`"),
    ],
)
def test_a_recipe_replaces_nothing_that_the_user_gives(make, message):
    with pytest.raises(SensiError, match=message):
        make()


def test_dsee_needs_mask_and_sparsity_together():
    with pytest.raises(SensiError, match="belong together"):
        recipes.dsee(mask="unstructured")
    with pytest.raises(SensiError, match="belong together"):
        recipes.dsee(sparsity=0.5)


def test_dsee_finds_query_and_value_under_their_usual_names():
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64}
    sizes |= {"vocab_size": 64, "max_position_embeddings": 40}
    t5 = {"d_model": 32, "d_kv": 8, "num_heads": 4, "num_layers": 1, "d_ff": 64, "vocab_size": 64}
    for config, names in [
        (DebertaV2Config(**sizes), {"query_proj", "value_proj"}),
        (MPNetConfig(**sizes), {"q", "v"}),
        (T5Config(**t5, decoder_start_token_id=0), {"q", "v"}),
    ]:
        model = get_peft_model(AutoModel.from_config(config), recipes.dsee(2, 10))
        assert {name.rpartition(".")[2] for name in layers_of(model)} == names
    fused = AutoModel.from_config(GPT2Config(n_embd=32, n_head=4, n_layer=1, vocab_size=64))
    with pytest.raises(ValueError, match="This model has, for example, 'h.0.attn.c_attn'"):
        get_peft_model(fused, recipes.dsee(2, 10))


def test_cuts_rescore_by_the_loss_that_is_given():
    calls = []

    def loss_fn(model, batch):
        calls.append(model)
        return model(**batch).loss

    model = get_peft_model(tiny_model(), recipes.sensi_bert(0.4, trim="in cuts", task_type="SEQ_CLS"))
    schedule = Schedule(model, 4, calibration=DATA["calibration"], loss_fn=loss_fn)
    schedule.step(done_steps=schedule.switches[-1])
    assert calls
    schedule.finish()


# -- trainings that end in odd places ---------------------------------------------------------------------------------


def scheduled(total_steps, **config):
    config = {"task_type": "SEQ_CLS", "calibration_steps": 2, "multiple_of": 4, **config}
    model = get_peft_model(tiny_model(), SensiConfig(**config))
    return model, Schedule(model, total_steps, calibration=DATA["calibration"])


@pytest.mark.parametrize("left", [{"granularity": "tensor"}, {"min_units": 0, "budget": {"params": 0.1}}])
def test_cuts_may_take_whole_sublayers(left, tmp_path):
    phase = {"phase": "cut", "start": 0.5, "end": 0.5, "cuts": 1}
    model, schedule = scheduled(4, **{"budget": {"params": 0.5}, "schedule": phase, **left})
    train(model, steps=2)
    schedule.step(done_steps=2)
    train(model, steps=2)
    masked = logits(model)
    schedule.finish()
    assert any(not (model.base_model.plan().of(g) != TRIMMED).any() for g in model.base_model.plan().anatomy.trimmable)
    torch.testing.assert_close(logits(model), masked, atol=1e-5, rtol=0)
    head = sum(p.numel() for p in tiny_model().classifier.parameters())
    assert trained(model) == model.base_model.plan().trainable_params + head
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), logits(model))


def test_the_budget_holds_however_training_ends():
    phase = {"phase": "cut", "start": 0.1, "end": 1.0, "cuts": 4}
    model, schedule = scheduled(12, budget={"params": 0.5}, schedule=phase)
    assert schedule.switches[-1] == 11, "the last cut comes before the last step"
    for done in range(5):  # stopped early
        schedule.step(done_steps=done)
    with pytest.warns(UserWarning, match="units are cut now"):
        schedule.finish()
    assert_filled(model.base_model.plan(), 0.5, "params", 4)


def test_a_mask_is_drawn_however_training_ends():
    options = {"update": "low_rank", "rank": 2, "sparsity": 0.5, "budget": {"params": 0.5}, "score": "magnitude"}
    model, schedule = scheduled(12, **options, schedule={"phase": "draw_mask", "at": 1.0})
    assert schedule.switches == [11]
    train(model)
    with pytest.warns(UserWarning, match="the mask is drawn now"):
        schedule.finish()
    weights = [m.weight for m in model.merge_and_unload().bert.encoder.modules() if isinstance(m, nn.Linear)]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert zeros == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("settings", "epochs", "switch"), [({"max_steps": 12}, 1, 6), ({"num_train_epochs": 0.5}, 0.25, 2)]
)
def test_epochs_are_those_of_the_data(settings, epochs, switch, tmp_path):
    rows = [{k: v[i] for k, v in batch.items()} for batch in tiny_batches(6, padding=False) for i in range(4)]
    model = get_peft_model(tiny_model(), recipes.learners(2, priming_epochs=epochs, task_type="SEQ_CLS"))
    callback = SensiCallback()
    arguments = TrainingArguments(tmp_path, per_device_train_batch_size=4, report_to="none", use_cpu=True, **settings)
    Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
    assert callback.schedule.switches == [switch]


class Interrupted(Exception):
    pass


class Interrupt(TrainerCallback):
    """Notes whether the dense part is trained in a step, and interrupts the training before the step `at`."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.trained = at, []

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            raise Interrupted
        self.trained.append(any(p.requires_grad for p in dense_parts(kwargs["model"])))


def dense_parts(model):
    return [p for n, p in model.named_parameters() if ".sensi_weight." in n]


def phased_trainer(model, folder, *, at=None, **settings):
    rows = [{k: v[i] for k, v in batch.items()} for batch in tiny_batches(4, padding=False) for i in range(4)]
    interrupt = Interrupt(at)
    settings = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1, **settings}
    callbacks = [SensiCallback(DATA["calibration"]), interrupt]
    return trainer_of(model, rows, folder, callbacks=callbacks, **settings), interrupt


def test_a_second_training_trains_the_dense_part_again(tmp_path):
    model = get_peft_model(tiny_model(), recipes.learners(2, priming_epochs=1, task_type="SEQ_CLS"))
    for _ in range(2):
        before = [p.clone() for p in dense_parts(model)]
        trainer, steps = phased_trainer(model, tmp_path)
        trainer.train()
        assert steps.trained == [True] * 4 + [False] * 4
        assert not any(map(torch.equal, before, dense_parts(model)))
        assert all(p.requires_grad for p in dense_parts(model)), "another optimizer gets it"
    with pytest.warns(UserWarning, match="nothing is frozen"):
        Schedule(get_peft_model(tiny_model(), recipes.learners(2, task_type="SEQ_CLS")), 4, steps_per_epoch=4)


def test_a_training_that_was_interrupted_after_the_freeze_goes_on(tmp_path):
    model = get_peft_model(tiny_model(), recipes.learners(2, priming_epochs=1, task_type="SEQ_CLS"))
    with pytest.raises(Interrupted):
        phased_trainer(model, tmp_path, at=6)[0].train()
    assert not any(p.requires_grad for p in dense_parts(model))
    with pytest.raises(SensiError, match="optimizer was made while the dense part.*trainable again now"):
        phased_trainer(model, tmp_path / "new")[0].train()
    with pytest.raises(Interrupted):
        phased_trainer(model, tmp_path / "new", at=6)[0].train()
    trainer, steps = phased_trainer(model, tmp_path / "new")
    trainer.train(resume_from_checkpoint=str(tmp_path / "new" / "checkpoint-3"))
    assert steps.trained == [True] + [False] * 4


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        ({"schedule": recipes.LATE_CUT}, {"num_train_epochs": 3}),
        ({"schedule": {**recipes.LATE_CUT, "start": 0.3, "cuts": 3}}, {"num_train_epochs": 3}),
        ({"schedule": recipes.LATE_CUT}, {"num_train_epochs": 6, "per_device_train_batch_size": 8}),
        (
            {"schedule": {"phase": "draw_mask", "at": 0.6}, "update": "low_rank", "rank": 2, "sparsity": 0.5},
            {"num_train_epochs": 3},
        ),
    ],
)
def test_a_switch_that_a_resumed_training_has_passed_is_made_at_once(config, settings, tmp_path, recwarn):
    """After 9 of 16 steps, the cut (due after 10) is not made. Of 12 steps, it is due after 8."""

    def fresh():
        given = {"budget": 0.5, "task_type": "SEQ_CLS", "calibration_steps": 2, **config}
        return get_peft_model(tiny_model(), SensiConfig(**given))

    with pytest.raises(Interrupted):
        phased_trainer(fresh(), tmp_path, num_train_epochs=4, at=9)[0].train()
    model = fresh()
    trainer, _ = phased_trainer(model, tmp_path, **settings)
    seen = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            layers = layers_of(model).values()
            seen.append((trained(model), sum(layer.is_masked("default") for layer in layers)))

    trainer.add_callback(Look())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert trainer.state.max_steps == 12 and len(seen) == 3
    assert seen[0] == seen[-1] == (trained(model), seen[0][1])
    assert model.base_model.plan().params_share <= 0.5
    assert not [w for w in recwarn if "Training ended in a state" in str(w.message)]


def test_a_schedule_may_be_stepped_less_often_than_there_are_steps():
    phase = {"phase": "cut", "start": 0.25, "end": 0.6, "cuts": 3}
    model, schedule = scheduled(50, budget={"params": 0.5}, schedule=phase)
    made = [done for done in range(0, 50, 4) if schedule.step(done_steps=done)]
    assert schedule.switches == [13, 22, 30] and made == [16, 24, 32]
    schedule.finish()
    assert_filled(model.base_model.plan(), 0.5, "params", 4)


def test_a_compiled_model_can_be_scheduled():
    model, _ = scheduled(4, budget={"params": 0.5}, schedule={"phase": "cut", "start": 0.5, "end": 0.5, "cuts": 1})
    schedule = Schedule(torch.compile(model), 4, calibration=DATA["calibration"])
    schedule.step(done_steps=2)
    schedule.finish()
    assert model.base_model.plan().params_share <= 0.5
