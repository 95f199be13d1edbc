"""ONNX files: they say what the model says, need onnxruntime only, and never replace a good file by a bad one."""

from __future__ import annotations

import builtins
import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import save_tokenizer
from processes import PATIENCE
from tiny import assert_same_tensors, snapshot, tiny_batches, tiny_config, tiny_model, trained, wrap
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from peft_sensi import SensiError, export_onnx
from peft_sensi.merging import onnx as export_module
from peft_sensi.merging.onnx_graph import bytes_of
from peft_sensi.reporting.onnx_folder import example_for
from peft_sensi.utils.errors import how_to_install


onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def run(path: Path, batch: dict[str, torch.Tensor]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    batch = {"token_type_ids": torch.zeros_like(batch["input_ids"]), **batch}
    return session.run(None, {name: batch[name].numpy() for name in names})


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_file_says_what_the_model_says(family, tmp_path):
    model = trained(family, budget=0.5, score="random").train()
    before = snapshot(model)
    attention = model.config._attn_implementation
    report = export_onnx(model, tmp_path / "model.onnx")
    assert model.training and model.config._attn_implementation == attention
    assert_same_tensors(snapshot(model), before)
    assert report.file.difference < 1e-4 and report.opset == 17
    assert onnx.load(tmp_path / "model.onnx").opset_import[0].version == 17
    assert report.file.bytes == (tmp_path / "model.onnx").stat().st_size
    model.eval()
    for size, length in ((1, 1), (5, 3), (2, 40)):  # none of them is a shape that the export itself has tried
        batch = tiny_batches(1, size=size, length=length, seed=5, labels=False, padding=length > 3)[0]
        length = min(length, model.config.max_position_embeddings - 2 * (family == "roberta"))
        batch = {name: value[:, :length] for name, value in batch.items()}
        with torch.no_grad():
            expected = model(**batch).logits.numpy()
        np.testing.assert_allclose(run(tmp_path / "model.onnx", batch)[0], expected, atol=1e-4)


def test_a_default_device_does_not_reach_the_example(bert):
    given = tiny_batches(1, labels=False)[0]
    expected = [export_module._examples(bert, batch) for batch in (None, given)]
    with torch.device("meta"):  # as `set_default_device("cuda")` would, where there is none
        found = [export_module._examples(bert, batch) for batch in (None, given)]
    for ours, theirs in zip(sum(found, []), sum(expected, []), strict=True):
        assert_same_tensors(ours, theirs)


def test_for_a_text_that_is_too_long_the_error_names_the_limit(family, tmp_path):
    report = export_onnx(tiny_model(family), tmp_path / "model.onnx", int8=True)
    for file in (report.file, report.int8):
        ids = torch.full((1, report.longest + 1), 7)
        run(file.path, {"input_ids": ids[:, :-1], "attention_mask": torch.ones_like(ids[:, :-1])})
        with pytest.raises(Exception, match=f"a text may have at most {report.longest} tokens"):
            run(file.path, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def test_trimmed_units_are_not_in_the_file(tmp_path):
    model = trained("bert", budget=0.5)
    small = export_onnx(model, tmp_path / "small.onnx").file.bytes
    whole = export_onnx(tiny_model("bert"), tmp_path / "whole.onnx").file.bytes
    anatomy = model.base_model.plan().anatomy
    removed = anatomy.prunable_params - model.base_model.plan().kept_params
    assert whole - small > 0.9 * 4 * removed


def test_outputs_of_other_tasks(tmp_path):
    model = wrap(tiny_model("bert", "QUESTION_ANS"), budget=0.5, task_type="QUESTION_ANS")
    report = export_onnx(model, tmp_path / "qa.onnx")
    assert report.outputs == ("start_logits", "end_logits")
    batch = tiny_batches(1, seed=4, labels=False)[0]
    with torch.no_grad():
        expected = model.eval()(**batch)
    start, end = run(tmp_path / "qa.onnx", batch)
    np.testing.assert_allclose(start, expected.start_logits, atol=1e-4)
    np.testing.assert_allclose(end, expected.end_logits, atol=1e-4)


def test_a_decoder(tmp_path):
    model = AutoModelForCausalLM.from_config(tiny_config("llama")).eval()
    report = export_onnx(model, tmp_path / "llama.onnx")
    assert report.inputs == ("input_ids", "attention_mask") and report.outputs == ("logits",)
    batch = tiny_batches(1, size=3, length=17, seed=4, labels=False)[0]
    with torch.no_grad():
        expected = model(**batch).logits.numpy()
    found = run(tmp_path / "llama.onnx", batch)[0]
    kept = batch["attention_mask"].bool().numpy()
    np.testing.assert_allclose(found[kept], expected[kept], atol=1e-4)


def test_a_16_bit_model_becomes_a_float32_file(tmp_path):
    model = trained("bert", budget=0.5).bfloat16()
    before = {name: p.dtype for name, p in model.named_parameters()}
    assert torch.bfloat16 in before.values()
    report = export_onnx(model, tmp_path / "model.onnx")
    assert report.file.difference < 1e-4
    assert {name: p.dtype for name, p in model.named_parameters()} == before
    types = {tensor.data_type for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert onnx.TensorProto.FLOAT in types and onnx.TensorProto.BFLOAT16 not in types


def test_int8_with_size_and_accuracy(tmp_path):
    model = wrap(tiny_model("bert", hidden_size=64, intermediate_size=256), budget=0.5)
    data = tiny_batches(6, seed=3)
    report = export_onnx(model, tmp_path / "model.onnx", int8=True, data=data)
    assert report.int8 is not None and report.int8.path == tmp_path / "model.int8.onnx"
    assert report.int8.bytes < 0.7 * report.file.bytes
    right = count = same = 0
    for batch in data:
        with torch.no_grad():
            own = model.eval()(**batch).logits.argmax(-1)
        found = torch.from_numpy(run(report.int8.path, batch)[0].argmax(-1))
        right += int((found == batch["labels"]).sum())
        same += int((found == own).sum())
        count += len(found)
    assert report.int8.accuracy == right / count and report.int8.agreement == same / count
    assert report.file.agreement == 1.0 and report.int8.agreement > 0.7
    assert "int8.onnx" in str(report) and "opset 17" in str(report)


def accuracy_of(model: torch.nn.Module, data: list[dict[str, torch.Tensor]], path: Path) -> float | None:
    report = export_onnx(model, path, data=data)
    assert report.file.agreement in (1.0, None)
    return report.file.accuracy


def test_the_accuracy_of_a_causal_model_is_that_of_the_next_token(tmp_path):
    """Its labels are its input: compared in place, a model that repeats its input would be right."""
    model = AutoModelForCausalLM.from_config(tiny_config("llama")).eval()
    data = tiny_batches(2, task="CAUSAL_LM")
    data = [{**b, "labels": b["input_ids"].masked_fill(b["attention_mask"] == 0, -100)} for b in data]
    right = count = 0
    for batch in data:
        with torch.no_grad():
            found, wanted = model(**batch).logits[:, :-1].argmax(-1), batch["labels"][:, 1:]
        right, count = right + int((found == wanted).sum()), count + int((wanted >= 0).sum())
    assert accuracy_of(model, data, tmp_path / "model.onnx") == right / count


@pytest.mark.parametrize("problem", ["multi_label_classification", None])
def test_the_accuracy_of_several_labels_is_that_of_each_yes_and_no(problem, tmp_path):
    model = tiny_model(problem_type=problem)
    data = [{**batch, "labels": (torch.rand(4, 3) > 0.5).float()} for batch in tiny_batches(2)]
    with torch.no_grad():
        hits = [(model(**{**b, "labels": None}).logits > 0) == b["labels"].bool() for b in data]
    assert accuracy_of(model, data, tmp_path / "model.onnx") == pytest.approx(float(torch.cat(hits).float().mean()))


def test_an_answer_is_right_if_both_ends_are(tmp_path):
    model = tiny_model(task="QUESTION_ANS")
    data = tiny_batches(2, task="QUESTION_ANS")
    with torch.no_grad():
        outputs = model(**data[0])
    data[0]["start_positions"], data[0]["end_positions"] = (
        outputs.start_logits.argmax(-1),
        outputs.end_logits.argmax(-1),
    )
    data[0]["end_positions"][0] += 1  # of the four answers, one has a wrong end
    assert accuracy_of(model, data[:1], tmp_path / "model.onnx") == 0.75


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_predicted_numbers_have_no_accuracy(shape, tmp_path):
    model = tiny_model(num_labels=1)
    data = [{**tiny_batches(1)[0], "labels": torch.rand(shape)}]
    report = export_onnx(model, tmp_path / "model.onnx", data=data)
    assert report.file.agreement is None and report.file.accuracy is None


def test_the_int8_file_may_be_on_another_file_system(bert, tmp_path, monkeypatch):
    """A file cannot be renamed to another one, so it must be made where it will be."""
    rename = os.replace

    def within_one_folder(source, target):
        if Path(source).parent.parent != Path(target).parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(source, target)

    monkeypatch.setattr(os, "replace", within_one_folder)
    report = export_onnx(bert, tmp_path / "a" / "model.onnx", int8=tmp_path / "b" / "small.onnx")
    assert names(tmp_path / "a") == {"model.onnx"} and names(tmp_path / "b") == {"small.onnx"}
    assert report.int8.path == tmp_path / "b" / "small.onnx"


def test_weights_in_a_file_of_their_own(tmp_path):
    for budget in (0.5, 0.6):  # the second replaces the first
        report = export_onnx(trained("bert", budget=budget), tmp_path / "model.onnx", external_data=True, int8=True)
        data = [name for name in names(tmp_path) if name.endswith(".onnx_data")]
        assert len(data) == 2 and len(names(tmp_path)) == 4
        assert report.file.bytes > (tmp_path / "model.onnx").stat().st_size
        (tmp_path / f"model-2-{'0' * 16}.onnx_data").write_bytes(bytes(99))  # of another model in the folder
        assert bytes_of(tmp_path / "model.onnx") == report.file.bytes
        (tmp_path / f"model-2-{'0' * 16}.onnx_data").unlink()
    run(tmp_path / "model.onnx", tiny_batches(1)[0])
    run(tmp_path / "model.int8.onnx", tiny_batches(1)[0])


def test_without_torch(tmp_path):
    """In a process in which an import of torch, transformers or onnx raises."""
    model = trained("distilbert", budget=0.5)
    export_onnx(model, tmp_path / "model.onnx", external_data=True, int8=True)
    batch = tiny_batches(1, seed=8, labels=False)[0]
    with torch.no_grad():
        np.savez(tmp_path / "case.npz", expected=model(**batch).logits, **{n: v.numpy() for n, v in batch.items()})
    code = f"""
import sys
for name in ("torch", "transformers", "peft", "onnx", "peft_sensi"):
    sys.modules[name] = None
import numpy as np, onnxruntime
case = dict(np.load({str(tmp_path / "case.npz")!r}))
expected = case.pop("expected")
for name, limit in (("model", 1e-4), ("model.int8", 1.0)):
    session = onnxruntime.InferenceSession({str(tmp_path)!r} + "/" + name + ".onnx")
    assert np.abs(session.run(["logits"], case)[0] - expected).max() < limit
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE)


def test_a_bad_file_never_replaces_a_good_one(tmp_path, monkeypatch):
    model = trained("bert", budget=0.5)
    path = tmp_path / "model.onnx"
    export_onnx(model, path)
    good = path.read_bytes()
    with pytest.raises(SensiError, match=r"differ .* nothing was written"):
        export_onnx(model, path, tolerance=0.0)

    def wrong(*args, **kwargs):
        raise RuntimeError("no such operator")

    with monkeypatch.context() as patch:
        patch.setattr(torch.onnx, "export", wrong)
        with pytest.raises(SensiError, match="cannot export.*no such operator"):
            export_onnx(model, path)
    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(export_module.os, name, wrong)
            with pytest.raises(RuntimeError):
                export_onnx(model, path)
    assert path.read_bytes() == good and names(tmp_path) == {"model.onnx"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "model.pt"}, r"end in \.onnx"),
        ({"opset": 9}, "from 14 to 20"),
        ({"opset": "17"}, "from 14 to 20"),
        ({"inputs": {}}, "one shape"),
        ({"inputs": {"input_ids": torch.ones(3, dtype=torch.long)}}, "one shape"),
        ({"int8": "model.onnx"}, "another path"),
        ({"int8": "."}, r"`int8` must end in \.onnx"),
        ({"int8": "model.int8"}, r"`int8` must end in \.onnx"),
        ({"data": [{"labels": torch.zeros(1)}]}, "lacks 'attention_mask'"),
        ({"data": {"input_ids": torch.ones(1, 3, dtype=torch.long)}}, "`data` must be batches"),
        ({"data": [{"input_ids": torch.ones(1, 200, dtype=torch.long)}]}, r"whose shape is \[1, 200\]"),
        ({"data": [{"input_ids": [["a", "b"]]}]}, "no tensor"),
        ({"data": 5}, "`data` must be batches"),
        ({"tolerance": "x"}, "`tolerance` must be a number"),
        ({"tolerance": float("nan")}, "`tolerance` must be a number"),
    ],
)
def test_mistakes_in_arguments(options, message, bert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SensiError, match=message):
        export_onnx(bert, **{"path": "model.onnx", **options})
    assert not names(tmp_path)


def test_without_the_extra(bert, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("onnx"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SensiError, match=re.escape(how_to_install("onnx"))):
        export_onnx(bert, tmp_path / "model.onnx")


def test_an_example_batch_of_the_users(bert, tmp_path):
    batch = tiny_batches(1)[0]  # with labels, which are no input; without token types
    report = export_onnx(bert, tmp_path / "model.onnx", inputs=batch)
    assert report.inputs == ("input_ids", "attention_mask")
    assert report.file.difference < 1e-4
    with pytest.raises(SensiError, match="`inputs` must be one batch"):
        export_onnx(bert, tmp_path / "model.onnx", inputs=[batch])


def test_types_of_tokens_that_the_tokenizer_gives_are_an_input(tmp_path):
    """GPT-2 takes them, without a number of them in its config: the graph lacked them, and computed something else."""
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 40, "vocab_size": 64, "pad_token_id": 0}
    model = wrap(AutoModelForSequenceClassification.from_config(AutoConfig.for_model("gpt2", **sizes)), budget=0.5)
    report = export_onnx(model, tmp_path / "model.onnx", inputs=example_for(tokenizer, model))
    assert "token_type_ids" in report.inputs and report.file.difference < 1e-4
    assert example_for(tokenizer, tiny_model()) is None  # BERT's config tells


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_decoder_that_classifies_needs_a_pad_token(family, tmp_path):
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 40, "vocab_size": 64, "num_labels": 3}
    config = tiny_config("llama") if family == "llama" else AutoConfig.for_model("gpt2", **sizes)
    base = AutoModelForSequenceClassification.from_config(config)
    base.config.pad_token_id = None
    model = wrap(base, budget=0.5)
    with pytest.raises(SensiError, match=r"needs `model\.config\.pad_token_id`"):
        export_onnx(model, tmp_path / "model.onnx")
    assert not names(tmp_path)
    model.config.pad_token_id = 0
    assert export_onnx(model, tmp_path / "model.onnx").file.difference < 1e-4


def test_models_of_images_and_of_sounds_are_refused_with_the_way_out(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    convolutions = {"conv_dim": [8], "conv_stride": [5], "conv_kernel": [10], "num_feat_extract_layers": 1}
    seen = ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **sizes))
    heard = Wav2Vec2ForCTC(Wav2Vec2Config(vocab_size=12, **sizes, **convolutions))
    for model, what, batch in (
        (seen, "images", {"pixel_values": torch.zeros(1, 3, 16, 16)}),
        (heard, "sounds", {"input_values": torch.zeros(1, 400)}),
    ):
        for inputs in (None, batch):
            with pytest.raises(SensiError, match=rf"takes {what}.*torch\.onnx\.export"):
                export_onnx(model, tmp_path / "m.onnx", inputs=inputs)
    assert not list(tmp_path.iterdir())


def test_a_disabled_adapter_is_exported(tmp_path):
    model = trained(budget=0.5)
    expected = export_onnx(model, tmp_path / "a.onnx", inputs=tiny_batches(1)[0])
    with model.disable_adapter():
        found = export_onnx(model, tmp_path / "b.onnx", inputs=tiny_batches(1)[0])
    assert (tmp_path / "a.onnx").stat().st_size == (tmp_path / "b.onnx").stat().st_size
    assert type(found) is type(expected)
