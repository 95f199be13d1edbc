"""Models that Accelerate has dispatched: without offloading everything works; with it, the error says what to do."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import PeftModel, get_peft_model
from tiny import TRIM, TUNE, logits, tiny_batches, tiny_model, trained, wrap

from peft_sensi import SensiConfig, SensiError, compute_scores


def offloaded(kind, folder):
    model = tiny_model()
    if kind == "cpu":  # "meta" in between: the weights wait in a state dict
        return cpu_offload(model, execution_device=torch.device("cpu"))
    if kind == "disk":
        return disk_offload(model, str(folder / "off"), execution_device=torch.device("cpu"))
    device_map = {"bert.embeddings": "cpu", "bert.encoder": "disk", "bert.pooler": "cpu", "classifier": "cpu"}
    return dispatch_model(model, device_map, main_device="cpu", offload_dir=str(folder / "off"))


@pytest.mark.parametrize("kind", ["cpu", "disk", "part on disk"])
def test_an_offloaded_model_is_refused_with_advice(kind, tmp_path):
    model = offloaded(kind, tmp_path)
    expected = logits(tiny_model())
    assert torch.equal(logits(model), expected)
    assert any(p.is_meta for p in model.parameters())
    for score in ("fisher", "magnitude", "random"):
        with pytest.raises(SensiError, match="offloaded.*device_map='cpu'"):
            compute_scores(model, tiny_batches(), score=score, progress=False)
    with pytest.raises(SensiError, match="offloaded"):
        get_peft_model(model, SensiConfig(**TRIM, calibration=tiny_batches(), task_type="SEQ_CLS"))
    assert torch.equal(logits(model), expected)  # the model is as it was
    trained(**TUNE).save_pretrained(tmp_path / "adapter")
    if kind == "part on disk":  # PEFT takes the hooks off, and the weights come back
        loaded = PeftModel.from_pretrained(model, tmp_path / "adapter")
        assert torch.equal(logits(loaded), logits(trained(**TUNE)))
    else:
        with pytest.raises(SensiError, match="offloaded"):
            PeftModel.from_pretrained(model, tmp_path / "adapter")


@pytest.mark.parametrize(
    "settings", [TUNE, {**TUNE, "also_train": ["tokens"], "calibration": tiny_batches()}], ids=str
)
def test_a_wrapped_model_that_is_offloaded_later_says_so(settings):
    model = trained(**settings)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(SensiError, match="offloaded"):
        logits(model)


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_what_else_a_wrapped_model_can_do_when_it_is_offloaded(kind, tmp_path):
    """PEFT loads the weights of each layer while it merges or unloads it."""
    expected, base = logits(trained(**TRIM)), logits(tiny_model())

    def fresh() -> PeftModel:
        model = trained(**TRIM)
        if kind == "cpu":
            return cpu_offload(model, execution_device=torch.device("cpu"))
        return disk_offload(model, str(tmp_path / "off"), execution_device=torch.device("cpu"))

    assert torch.equal(logits(fresh().merge_and_unload()), expected)
    assert torch.equal(logits(fresh().unload()), base)
    model = fresh()
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    second = SensiConfig(score="magnitude", task_type="SEQ_CLS", **TRIM)
    for action in (
        lambda: model.base_model.trim(0.25),
        lambda: model.add_adapter("second", second),
        lambda: model.set_adapter("default") or logits(model),
    ):
        with pytest.raises(SensiError, match="offloaded.*device_map='cpu'"):
            action()
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("device_map", [{"": "cpu"}, {"bert": "cpu", "classifier": "cpu"}], ids=str)
def test_a_device_map_without_offloading_works(device_map):
    batches = tiny_batches()
    model = dispatch_model(tiny_model(), device_map, force_hooks=True)
    assert any(hasattr(m, "_hf_hook") for m in model.modules())
    for score in ("fisher", "mask"):
        found, expected = (
            compute_scores(m, batches, score=score, priming_steps=2, progress=False) for m in (model, tiny_model())
        )
        for name, values in expected.values.items():
            torch.testing.assert_close(found.values[name], values)
    found, expected = (wrap(m, **TRIM, calibration=batches, priming_steps=2) for m in (model, tiny_model()))
    torch.testing.assert_close(logits(found), logits(expected))
    torch.testing.assert_close(logits(found.merge_and_unload()), logits(expected.merge_and_unload()))
