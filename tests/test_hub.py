"""Cards in saved folders, and the whole way over a Hub: upload, download, load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import Hub
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from processes import PATIENCE
from tiny import logits, tiny_batches, tiny_model, trained, wrap

from peft_sensi import SensiError
from peft_sensi.reporting.card import BEGIN, END, results_table, write_card
from peft_sensi.reporting.saved import open_adapter, short_fingerprint


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """A saved adapter whose base is a folder with a license."""
    folder = tmp_path_factory.mktemp("hub")
    base = tiny_model()
    base.save_pretrained(folder / "base")
    (folder / "base" / "README.md").write_text("---\nlicense: mit\n---\n# Base\n")
    base.name_or_path = str(folder / "base")
    model = wrap(base, budget={"params": 0.5, "trainable": 0.06})
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


def python_block(text: str) -> str:
    return text.split("```python\n")[1].split("```")[0]


def test_save_pretrained_writes_the_card(adapter):
    card = ModelCard.load(adapter / "README.md")
    assert card.data.library_name == "peft" and "peft_sensi" in card.data.tags and "pruning" in card.data.tags
    assert card.data.pipeline_tag == "text-classification"
    assert "import peft_sensi" in card.text and "More Information Needed" not in card.text
    assert short_fingerprint(open_adapter(adapter).config) in card.text and "| size |" not in card.text  # no file yet
    assert "- PEFT " in card.text  # what PEFT itself adds stays
    assert not (adapter / "plan.png").exists()  # saving a checkpoint draws nothing


def test_the_card_names_what_was_asked_and_reached(adapter):
    saved = open_adapter(adapter)
    write_card(saved, license="apache-2.0", results={"validation": {"accuracy": 0.87654}, "rows": {"train": 1000}})
    card = ModelCard.load(adapter / "README.md")
    plan_line = next(line for line in card.text.splitlines() if line.startswith("| prunable parameters kept"))
    assert "| 0.5 |" in plan_line and "%" in plan_line
    assert "| accuracy | 0.8765 |" in card.text and "| train rows | 1,000 |" in card.text
    assert card.data.license == "apache-2.0" and "| license of the base | mit |" in card.text
    assert short_fingerprint(saved.config) in card.text
    assert (adapter / "plan.png").read_bytes()[:4] == b"\x89PNG" and "](plan.png)" in card.text
    compile(python_block(card.text), "card", "exec")
    assert card.data.base_model is None and not [tag for tag in card.data.tags if "base_model" in tag]
    assert 'from_pretrained("path/to/base", num_labels=3)' in card.text and str(adapter.parent) not in card.text


def test_what_somebody_wrote_into_the_card_stays(adapter):
    path = adapter / "README.md"
    card = ModelCard.load(path)
    card.text = "Mine before.\n\n" + card.text + "\nMine after.\n"
    card.data.license = "mit"
    card.data.language = "en"
    card.save(path)
    write_card(
        open_adapter(adapter), results=[{"method": "sensi", "accuracy": 0.9}, {"method": "full", "accuracy": 0.91}]
    )
    again = ModelCard.load(path)
    assert again.text.startswith("Mine before.") and again.text.rstrip().endswith("Mine after.")
    assert again.text.count(BEGIN) == again.text.count(END) == 1
    assert again.data.license == "mit" and again.data.language == "en"
    assert "| method | accuracy |" in again.text and "| sensi | 0.9 |" in again.text


def test_cards_of_other_methods_are_pefts_own(tmp_path):
    model = get_peft_model(tiny_model(), LoraConfig(task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path)
    assert "peft_sensi" not in (tmp_path / "README.md").read_text()


def test_results_without_numbers_are_refused(tmp_path):
    (tmp_path / "r.json").write_text('{"a": "b"}')
    with pytest.raises(SensiError, match="no numbers"):
        results_table(tmp_path / "r.json")
    (tmp_path / "r.json").write_text("{")
    with pytest.raises(SensiError, match="not JSON"):
        results_table(tmp_path / "r.json")
    assert results_table({"accuracy": 0.5, "flag": True}) == "| measure | value |\n| --- | --- |\n| accuracy | 0.5 |"


PUSH = """
import json, sys
sys.path.insert(0, {tests!r})
import torch
from peft import PeftModel
from tiny import logits, tiny_model
import peft_sensi
from peft_sensi.cli import main

base = tiny_model()
model = PeftModel.from_pretrained(base, {adapter!r}, is_trainable=True)
model.peft_config["default"].base_model_name_or_path = "me/base"
card = {{"results": {{"accuracy": 0.75}}, "license": "mit", "tags": ["mine"]}}
model.push_to_hub("me/one", private=True, commit_message="first", **card)
again = PeftModel.from_pretrained(tiny_model(), "me/one")
assert torch.equal(logits(again), logits(model))

def run(*arguments):
    try:
        main(arguments)
    except SystemExit as end:
        assert not end.code, end.code

run("push", {adapter!r}, "me/two", "--license", "apache-2.0", "--json")
run("inspect", "me/two", "--json", "--base", {base!r})
"""


def test_upload_download_load(adapter, tmp_path):
    (adapter / "optimizer.pt").write_bytes(b"pickle")
    with Hub() as hub:
        environment = os.environ | {
            "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": os.pathsep.join(sys.path),
        }  # fmt: skip
        environment = {k: v for k, v in environment.items() if not k.lower().endswith("_proxy")}
        script = PUSH.format(tests=str(Path(__file__).parent), adapter=str(adapter), base=str(adapter.parent / "base"))
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 0, f"{hub.strange} {done.stderr[-3000:]}"
    one, two = hub.repos["me/one"], hub.repos["me/two"]
    assert hub.private == {"me/one": True, "me/two": False} and "first" in hub.commits
    for files in (one, two):
        assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "plan.png"} <= set(files)
        assert files["plan.png"][:4] == b"\x89PNG" and "optimizer.pt" not in files
    card = ModelCard(one["README.md"].decode())
    assert card.data.license == "mit" and card.data.base_model == "me/base" and "mine" in card.data.tags
    assert "base_model:adapter:me/base" in card.data.tags and 'from_pretrained(base, "me/one")' in card.text
    assert "| accuracy | 0.75 |" in card.text
    pushed, inspected = (json.loads(part) for part in _values(done.stdout))
    assert pushed["repo"] == "me/two" and pushed["url"].startswith(hub.url)
    assert inspected["plan"]["params_share"] <= 0.5 and inspected["file_bytes"] == len(
        two["adapter_model.safetensors"]
    )


def _values(text: str) -> list[str]:
    """JSON objects one after the other."""
    decoder, found, place = json.JSONDecoder(), [], text.index("{")
    while place < len(text):
        _, end = decoder.raw_decode(text, place)
        found.append(text[place:end])
        place = text.find("{", end) if "{" in text[end:] else len(text)
    return found


def test_a_trained_adapter_still_saves_and_loads_with_its_card(tmp_path):
    model = trained(budget=0.5)
    model.save_pretrained(tmp_path)
    batch = tiny_batches(1, seed=99, labels=False)[0]
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path), batch), logits(model, batch))
