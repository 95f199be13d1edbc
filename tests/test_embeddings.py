"""Adapters of sentence-transformers models, and their merged models. Skipped where the package is not installed."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from peft_sensi import SensiConfig, build_anatomy, save_merged


sentence_transformers = pytest.importorskip("sentence_transformers", minversion="6")

WORDS = "a the red green blue car cat sky runs sleeps shines is very old new".split()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """The folder of a tiny BERT with a tokenizer of whole words."""
    folder = tmp_path_factory.mktemp("encoder")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **names).save_pretrained(folder)
    config = BertConfig(vocab_size=len(pieces), hidden_size=32, num_attention_heads=4, num_hidden_layers=2,
                        intermediate_size=64, max_position_embeddings=40)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def script():
    examples = str(Path(__file__).resolve().parents[1] / "examples")
    sys.path.insert(0, examples)
    yield importlib.import_module("embeddings")
    sys.path.remove(examples)


def pairs(count: int = 48) -> list[dict[str, str]]:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 5)) for _ in range(count)]
    return [{"first": text, "second": f"very {text}", "number": str(i)} for i, text in enumerate(texts)]


def test_the_example_trims_and_reloads(script, encoder, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs())))
    script.main(
        f"--model {encoder} --train_file {tmp_path / 'pairs.jsonl'} --output_dir {tmp_path / 'out'} --budget 0.5 "
        f"--use_cpu --disable_tqdm True --num_train_epochs 1 --per_device_train_batch_size 8".split()
    )
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    anatomy = build_anatomy(BertModel.from_pretrained(encoder))
    removed = metrics["parameters before"] - metrics["parameters, merged"]
    assert 0.5 * anatomy.prunable_params <= removed <= 0.6 * anatomy.prunable_params
    assert metrics["difference after loading"] < 1e-6
    assert metrics["recall"] == metrics["recall, merged"] > 0.1
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()


def test_pairs_with_the_same_second_text_count_as_found(script):
    class Perfect:
        def encode(self, texts, **options):
            return np.array([[text.endswith("a"), text.endswith("b")] for text in texts], dtype=float)

    rows = {"first": ["to a", "also to a", "to b"], "second": ["a", "a", "b"]}
    assert script.recall(Perfect(), Dataset.from_dict(rows), ["first", "second"]) == 1.0
    rows["first"][0] = "to b"
    assert script.recall(Perfect(), Dataset.from_dict(rows), ["first", "second"]) == pytest.approx(2 / 3)


def test_what_the_example_cannot_do_is_said(script, tmp_path, capsys):
    given = ["--train_file", "pairs.tsv", "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit):
        script.main(given)
    assert "the following arguments are required: --model" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--resume_from_checkpoint has no effect here"):
        script.main([*given, "--model", "any", "--resume_from_checkpoint", "nowhere"])


def test_an_adapter_is_saved_and_loaded_by_sentence_transformers(encoder, tmp_path):
    model = sentence_transformers.SentenceTransformer(str(encoder), device="cpu")
    texts = [pair["first"] for pair in pairs(6)]
    before = model.encode(texts)
    model.add_adapter(SensiConfig(budget=0.5, score="magnitude", task_type="FEATURE_EXTRACTION"))
    vectors = model.encode(texts)
    assert np.abs(vectors - before).max() > 1e-3
    model.save_pretrained(str(tmp_path))
    again = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    np.testing.assert_allclose(again.encode(texts), vectors, atol=1e-6)


def test_an_untrimmed_model_is_a_stock_model(script, encoder, tmp_path):
    model = sentence_transformers.SentenceTransformer(str(encoder), device="cpu")
    model.add_adapter(SensiConfig(update="low_rank", rank=2, init_weights=False, task_type="FEATURE_EXTRACTION"))
    texts = [pair["first"] for pair in pairs(6)]
    vectors = model.encode(texts)
    model.save_pretrained(str(tmp_path / "adapter"))
    script.merge(str(encoder), tmp_path / "adapter", tmp_path / "merged")
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    np.testing.assert_allclose(again.encode(texts), vectors, atol=1e-5)


def test_the_way_of_the_docs_is_right_also_if_the_stock_form_can_hold_the_model(encoder, tmp_path):
    model = sentence_transformers.SentenceTransformer(str(encoder), device="cpu")
    config = SensiConfig(budget={"trainable": 0.1}, score="magnitude", task_type="FEATURE_EXTRACTION")
    model.add_adapter(config)
    model.save_pretrained(str(tmp_path / "adapter"))
    small = sentence_transformers.SentenceTransformer(str(encoder), device="cpu")
    small[0].model = PeftModel.from_pretrained(small[0].model, tmp_path / "adapter").merge_and_unload()
    small.save_pretrained(str(tmp_path / "merged"))
    assert save_merged(small[0].model, tmp_path / "merged")
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    texts = [pair["first"] for pair in pairs(6)]
    np.testing.assert_array_equal(again.encode(texts), small.encode(texts))


def test_a_reloaded_model_can_be_saved_again(script, encoder, tmp_path):
    """Its own saves, also those of a Trainer's checkpoints, keep the widths."""
    model = sentence_transformers.SentenceTransformer(str(encoder), device="cpu")
    model.add_adapter(SensiConfig(budget=0.5, score="magnitude", task_type="FEATURE_EXTRACTION"))
    model.save_pretrained(str(tmp_path / "adapter"))
    script.merge(str(encoder), tmp_path / "adapter", tmp_path / "merged")
    texts = [pair["first"] for pair in pairs(6)]
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "merged"), device="cpu", trust_remote_code=True)
    np.testing.assert_allclose(again.encode(texts), model.encode(texts), atol=1e-5)
    again.save_pretrained(str(tmp_path / "again"))
    third = sentence_transformers.SentenceTransformer(str(tmp_path / "again"), device="cpu", trust_remote_code=True)
    np.testing.assert_allclose(third.encode(texts), model.encode(texts), atol=1e-5)
