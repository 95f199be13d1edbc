"""Files from outside, one rule at a time: which files are refused, by which error, and that the base is unchanged."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from test_contract import assert_is_base, edit_config, first, is_plain, spoil
from tiny import (
    TRIM,
    TUNE,
    assert_same_tensors,
    clone,
    load_from_subfolder,
    logits,
    snapshot,
    tiny_model,
    train,
    trained,
    wrap,
)

from peft_sensi import SensiConfig, SensiError, SensiLoadError
from peft_sensi.reporting.saved import open_adapter


SPARSE = {"update": "low_rank+sparse", "rank": 2, "sparse": 9, "target_modules": ["query", "value"]}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path) -> Path:
    trained(**TRIM).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def sparse(tmp_path) -> Path:
    trained(**SPARSE).save_pretrained(tmp_path / "sparse")
    return tmp_path / "sparse"


def refused(folder: Path, match: str) -> None:
    """Loading raises our error, which names the file, and leaves the base as it was."""
    base = tiny_model()
    base.bert.pooler.requires_grad_(False)
    flags = [p.requires_grad for p in base.parameters()]
    with pytest.raises(SensiLoadError, match=match) as caught:
        PeftModel.from_pretrained(base, folder)
    assert "adapter_config.json" in str(caught.value) or WEIGHTS in str(caught.value)
    assert str(folder) in str(caught.value)
    assert [p.requires_grad for p in base.parameters()] == flags
    assert_is_base(base, tiny_model())


PLACES = {
    "out of range": lambda p: p[-1:].fill_(32 * 32),
    "far out of range": lambda p: p[-1:].fill_(2**31 - 1),
    "negative": lambda p: p[:1].fill_(-1),
    "duplicate": lambda p: p[1:2].copy_(p[:1]),
    "unsorted": lambda p: p.copy_(p.flip(0)),
}


@pytest.mark.parametrize("name", PLACES)
def test_positions_of_single_values(sparse, name):
    spoil(sparse, lambda t: PLACES[name](t[first(t, "sensi_places")]))
    refused(sparse, "sensi_places.*ascending positions below 1024")


HEADS = {
    "nan": (lambda t: t["base_model.model.classifier.weight"].view(-1)[0].fill_(float("nan")), "classifier.*NaN"),
    "missing": (lambda t: t.pop("base_model.model.classifier.weight"), "lacks 'classifier.weight'"),
    "extra": (lambda t: t.update({"base_model.model.classifier.x": torch.ones(1)}), "holds 'classifier.x'"),
    "shape": (lambda t: t.update({"base_model.model.classifier.bias": torch.ones(4)}), r"\(4,\), expected \(3,\)"),
    "whole numbers": (lambda t: t.update({"base_model.model.classifier.bias": torch.ones(3).int()}), "dtype"),
    "twice": (lambda t: t.update({"classifier.bias": torch.ones(3)}), "once"),
    "too large for float32": (
        lambda t: t.update({"base_model.model.classifier.bias": torch.full((3,), 1e300, dtype=torch.float64)}),
        "infinity",
    ),
    "eight bits": (
        lambda t: t.update({"base_model.model.classifier.bias": torch.ones(3).to(torch.float8_e4m3fn)}),
        "F8_E4M3",
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_modules_that_are_saved_whole(folder, name):
    spoil(folder, HEADS[name][0])
    refused(folder, HEADS[name][1])


def test_no_pickle_is_written(tmp_path):
    """It could not be loaded: the training would be lost."""
    with pytest.raises(SensiError, match="safetensors files only"):
        wrap(tiny_model(), **TUNE).save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.iterdir())
    lora = get_peft_model(tiny_model(), LoraConfig(target_modules=["query"]))
    lora.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()


DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda text: b"",
    "truncated": lambda text: text[: len(text) // 2],
    "no JSON": lambda text: b"{peft_type: SENSI}",
    "a list": lambda text: b"[" + text + b"]",
    "null": lambda text: b"null",
    "a number": lambda text: b"3",
    "UTF-16": lambda text: text.decode().encode("utf-16"),
    "nested": lambda text: b"[" * 100_000,
    "no type": lambda text: b"{}",
    "an unknown type": lambda text: text.replace(b"SENSI", b"LORAX"),
    "a list as type": lambda text: text.replace(b'"SENSI"', b'["SENSI"]'),
}
READERS: dict[str, Callable[[Path], Any]] = {
    "PeftModel": lambda folder: PeftModel.from_pretrained(tiny_model(), folder),
    "a keyword": lambda folder: PeftModel.from_pretrained(model=tiny_model(), model_id=str(folder)),
    "a subfolder": lambda folder: PeftModel.from_pretrained(tiny_model(), folder.parent, subfolder=folder.name),
    "a second adapter": lambda folder: wrap(tiny_model(), **TRIM).load_adapter(folder, "second"),
    "SensiConfig": lambda folder: SensiConfig.from_pretrained(folder),
    "Transformers": lambda folder: tiny_model().load_adapter(str(folder)),
    "AutoPeft": lambda folder: AutoPeftModelForSequenceClassification.from_pretrained(folder),
    "the command": lambda folder: open_adapter(folder),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_config(folder, name):
    """PEFT reads the config before it knows that the adapter is ours, and raises the errors of `json`."""
    path = folder / "adapter_config.json"
    path.write_bytes(DAMAGED[name](path.read_bytes()))
    for reader, read in READERS.items():
        with pytest.raises(SensiLoadError, match=str(path) if reader != "the command" else str(folder)):
            read(folder)


def test_an_adapter_without_weights(folder):
    """PEFT takes the folder for the name of a repository on the Hub then."""
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model-00001-of-00001.safetensors").write_bytes(b"")
    config = SensiConfig.from_pretrained(folder)
    for reader, read in READERS.items():
        if reader != "SensiConfig":  # there are configs without weights
            with pytest.raises(SensiLoadError, match=f"holds no {WEIGHTS}: the adapter is not complete"):
                read(folder)
    with pytest.raises(SensiLoadError, match="not complete"):
        PeftModel.from_pretrained(tiny_model(), folder, config=config)


def test_a_truncated_file(folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-10])
    refused(folder, "whole safetensors file")


def test_a_pickle_is_refused(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    refused(folder, "only safetensors")


def test_files_of_the_hub_are_checked_alike(folder, tmp_path):
    cache, commit = tmp_path / "cache", "0" * 40
    place = cache / "models--somebody--adapter"
    snapshot_folder = place / "snapshots" / commit
    shutil.copytree(folder, snapshot_folder)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    options = {"cache_dir": str(cache)}
    expected = logits(PeftModel.from_pretrained(tiny_model(), folder))
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), "somebody/adapter", **options)), expected)
    spoil(snapshot_folder, lambda t: t[first(t)].fill_(float("nan")))
    base = tiny_model()
    with pytest.raises(SensiLoadError, match="NaN"):
        PeftModel.from_pretrained(base, "somebody/adapter", **options)
    (snapshot_folder / WEIGHTS).rename(snapshot_folder / "adapter_model.bin")
    with pytest.raises(SensiLoadError, match=r"somebody/adapter/adapter_model.bin: only safetensors"):
        PeftModel.from_pretrained(base, "somebody/adapter", **options)
    assert is_plain(base)


BAD_FIELDS = {
    "regex": ({"target_modules": "(.*)*query"}, "target_modules"),
    "regex that hangs": ({"target_modules": "((a|a)*)*b"}, "target_modules"),
    "regex of exclusions": ({"exclude_modules": ".*"}, "exclude_modules"),
    "regex of saved modules": ({"modules_to_save": ["(([a-z.]+)+)+!"]}, "modules_to_save"),
    "numbers for names": ({"target_modules": [1]}, "target_modules"),
    "huge number": ({"priming_lr": 10**400}, "priming_lr"),
    "huge budget": ({"budget": -(10**400)}, "params"),
    "nan": ({"priming_lr": float("nan")}, "priming_lr"),
    "a boolean for a count": ({"seed": True}, "seed"),
    "a private attribute": (
        {"blocks": [{"layer": "encoder.layer.*", "head_size": "__class__", "q": "a", "k": "b", "v": "c", "o": "d"}]},
        "head_size",
    ),
    "a regex for a layer": ({"blocks": [{"layer": "(a+)+", "up": "x", "down": "y"}]}, "layer"),
    "nan in the fingerprint": ({"fingerprint": {"shapes": {}, "marks": [float("nan")]}}, "fingerprint"),
    "an unknown update": ({"update": "dense+mask"}, "update"),
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_fields(folder, name):
    changes, match = BAD_FIELDS[name]
    edit_config(folder, **changes)
    begun = time.process_time()
    refused(folder, match)
    assert time.process_time() - begun < 5


def without_mark(folder: Path) -> None:
    """As older files are: no check of the fields that give values their meaning."""
    plan = json.loads((folder / "adapter_config.json").read_text())["plan"]
    data = torch.frombuffer(bytearray(json.dumps(plan).encode()), dtype=torch.uint8)
    spoil(folder, lambda t: t.update({"base_model.model.sensi_plan": data}))


@pytest.mark.parametrize(
    "changes",
    [{"rank": 10**8}, {"rank": 31}, {"sparse": 10**9}, {"sparse": 8}, {"update": "low_rank", "sparse": None}],
)
def test_sizes_are_checked_before_anything_is_allocated(sparse, changes, monkeypatch):
    edit_config(sparse, **changes)
    refused(sparse, "different settings")
    without_mark(sparse)
    monkeypatch.setattr("peft_sensi.layers.layer.first_parts", None)  # would be called for what is allocated
    refused(sparse, "rank|shape|holds")


def test_more_single_values_than_a_matrix_has_are_refused():
    with pytest.raises(SensiError, match="largest targeted Linear has 2048 values: `sparse` must be at most 2048"):
        wrap(tiny_model(), budget=0.5, update="sparse", sparse=2049)
    wrap(tiny_model(), budget=0.5, update="sparse", sparse=2048)  # more than smaller matrices have


def test_a_rank_beyond_every_matrix_is_refused():
    with pytest.raises(SensiError, match="at most 64"):
        wrap(tiny_model(), update="low_rank", rank=65)


def test_a_layout_cannot_set_what_is_no_number():
    layout = {
        "layer": "encoder.layer.*", "q": "attention.self.query", "k": "attention.self.key",
        "v": "attention.self.value", "o": "attention.output.dense", "head_size": 8,
        "head_counts": ["attention.self.forward"],
    }  # fmt: skip
    base = tiny_model()
    with pytest.raises(SensiLoadError, match="attention.self.forward"):
        wrap(base, blocks=[layout], budget=0.5)
    assert_is_base(base, tiny_model())


@pytest.mark.parametrize("targets", [r".*\.(query|value)", r".*layer\.1.*dense", "all-linear"])
def test_a_regular_expression_is_saved_as_the_names_it_matched(targets, tmp_path):
    model = wrap(
        tiny_model(), target_modules=targets, exclude_modules=r".*pooler.*", **{"budget": {"trainable": 0.05}}
    )
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert isinstance(values["target_modules"], list) and not isinstance(values["exclude_modules"], str)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), logits(model))


def test_a_failed_second_adapter_leaves_the_first(folder, sparse):
    model = PeftModel.from_pretrained(tiny_model(), folder)
    before, expected = snapshot(model), logits(model)
    spoil(sparse, lambda t: t.pop(first(t, "sensi_up")))
    with pytest.raises(SensiLoadError, match="lacks"):
        model.load_adapter(sparse, "second")
    assert list(model.peft_config) == ["default"]
    assert_same_tensors(snapshot(model), before)
    assert torch.equal(logits(model), expected)


def test_auto_classes_check_the_pair(folder, tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    trained(budget=0.3).save_pretrained(tmp_path / "other")
    shutil.copyfile(tmp_path / "other" / WEIGHTS, folder / WEIGHTS)
    edit_config(folder, base_model_name_or_path=str(tmp_path / "base"))
    with pytest.raises(SensiLoadError, match="do not belong together"):
        AutoPeftModelForSequenceClassification.from_pretrained(folder)


@pytest.mark.parametrize("part", ["sensi_places", "sensi_values"])
def test_transformers_loads_past_our_hooks_but_nothing_bad_is_used(sparse, part):
    def change(tensors: dict) -> None:
        if part == "sensi_values":
            tensors[first(tensors, part)][0] = float("inf")
        else:
            PLACES["out of range"](tensors[first(tensors, part)])

    spoil(sparse, change)
    model = tiny_model()
    load_from_subfolder(model, sparse)
    with pytest.raises(SensiLoadError, match=part):
        logits(model)


FAULTS = {
    "a weight of truth values": lambda t: t.update({first(t, "sensi_weight"): t[first(t, "sensi_weight")].bool()}),
    "a head of whole numbers": lambda t: t.update(
        {first(t, "classifier.weight"): t[first(t, "classifier.weight")].int()}
    ),
    "another plan": None,
}


@pytest.mark.parametrize("name", FAULTS)
def test_transformers_checks_a_folder_as_peft_does(folder, name):
    if FAULTS[name] is None:
        edit_config(folder, also_train=["norms"])
    else:
        spoil(folder, FAULTS[name])
    model = tiny_model()
    with pytest.raises(SensiLoadError, match="dtype|do not belong together"):
        model.load_adapter(str(folder))
    assert_is_base(model, tiny_model())


def test_a_config_whose_values_were_changed_starts_afresh(folder):
    """The same plan for another kind of update: the values beside the config are not meant then."""
    config = SensiConfig.from_pretrained(folder)
    config.update, config.rank, config.inference_mode = "dense+low_rank", 2, False
    model = get_peft_model(tiny_model(), config)
    assert any("sensi_down" in name for name, _ in model.named_parameters())


def test_a_config_from_a_file_wraps_a_base(folder):
    model = get_peft_model(tiny_model(), PeftConfig.from_pretrained(folder))
    assert model.base_model.plan().to_dict() == SensiConfig.from_pretrained(folder).plan


def test_bits_behind_the_last_weight_must_be_zero(tmp_path):
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.lin = torch.nn.Linear(3, 5)

    config = SensiConfig(update="mask", sparsity=0.3, target_modules=["lin"])
    model = get_peft_model(Odd(), config)
    model.base_model.compress("bits")
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(Odd(), tmp_path)
    spoil(tmp_path, lambda t: t[first(t, "sensi_bits")][-1:].bitwise_or_(1))
    with pytest.raises(SensiLoadError, match="zeros after its 15 bits"):
        PeftModel.from_pretrained(Odd(), tmp_path)


def test_models_that_do_not_tell_their_embeddings_come_back(tmp_path):
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = CLIPTextConfig(vocab_size=64, max_position_embeddings=16, **small)
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **small)
    base = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)).eval()
    inputs = {"input_ids": torch.arange(8)[None] + 2, "pixel_values": torch.randn(1, 3, 16, 16)}
    model = wrap(clone(base), budget={"trainable": 0.1}, task_type=None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
    model.save_pretrained(tmp_path)
    set_peft_model_state_dict(model, get_peft_model_state_dict(model))
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits_per_image, model.eval()(**inputs).logits_per_image)


@pytest.mark.parametrize("whole", ["bert.embeddings", "attention.output", "encoder.layer.1"])
def test_norms_inside_modules_that_are_saved_whole(whole, tmp_path):
    model = wrap(
        tiny_model(), modules_to_save=[whole], target_modules=["intermediate.dense"], budget={"trainable": 0.1}
    )
    train(model)
    model.save_pretrained(tmp_path)
    set_peft_model_state_dict(model, get_peft_model_state_dict(model))
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), logits(model))


def test_a_config_without_a_plan_may_come_from_a_file(tmp_path):
    SensiConfig(budget=0.5, score="magnitude", task_type="SEQ_CLS").save_pretrained(tmp_path)
    model = get_peft_model(tiny_model(), SensiConfig.from_pretrained(tmp_path))
    train(model)
    before = logits(model)
    set_peft_model_state_dict(model, get_peft_model_state_dict(model))  # as Trainer does when it resumes
    assert torch.equal(logits(model), before)
