"""Cards in saved folders, and the whole way over a Hub: upload, download, load."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from folders import NAMES, save_adapter
from hub_server import Hub
from huggingface_hub import ModelCard, close_session, constants
from peft import LoraConfig, PeftModel, get_peft_model
from processes import PATIENCE
from tiny import logits, tiny_batches, tiny_model, trained, wrap
from typer.testing import CliRunner

from peft_sensi import SensiConfig, SensiError, load_merged, save_merged
from peft_sensi.cli.commands import app
from peft_sensi.merging.hashes import hashes_of
from peft_sensi.reporting.card import results_table, write_card
from peft_sensi.reporting.card_files import SECTION, keep_words
from peft_sensi.reporting.hub import push_folder
from peft_sensi.reporting.results import model_index, training_rows
from peft_sensi.reporting.saved import open_adapter, short_fingerprint
from peft_sensi.reporting.saved_merged import open_saved
from peft_sensi.reporting.uploads import local_paths, scrubbed
from peft_sensi.tasks.options import Options
from peft_sensi.tasks.sources import read_source
from peft_sensi.utils import hub_names


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


def run(*arguments) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


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
    assert len(SECTION.findall(again.text)) == again.text.count("peft_sensi: end") == 1
    assert again.data.license == "mit" and again.data.language == "en"
    assert "| method | accuracy |" in again.text and "| sensi | 0.9 |" in again.text


@pytest.mark.parametrize(
    "text", [b"---\nlicense: [\n---\nMine", b"---\n- a\n---\nMine", "Mine: \xe9".encode("latin-1")]
)
def test_a_card_that_cannot_be_read_stays_and_loses_no_weights(adapter, tmp_path, text):
    folder = shutil.copytree(adapter, tmp_path / "run")
    (folder / "README.md").write_bytes(text)
    for command in (["card", folder], ["push", folder, "me/mine", "--dry-run"]):
        result = run(*command)
        line = result.stderr.splitlines()[-1]
        assert result.exit_code == 1 and f"{folder / 'README.md'} cannot be read as a model card" in line
        assert "--debug" not in line
    (folder / "adapter_model.safetensors").unlink()
    with pytest.warns(UserWarning, match="cannot be read as a model card"):
        trained(budget=0.5).save_pretrained(folder)
    assert (folder / "README.md").read_bytes() == text and (folder / "adapter_model.safetensors").is_file()


def test_cards_of_other_methods_are_pefts_own(tmp_path):
    model = get_peft_model(tiny_model(), LoraConfig(task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path)
    assert "peft_sensi" not in (tmp_path / "README.md").read_text()


def test_results_without_numbers_are_refused(tmp_path):
    (tmp_path / "r.json").write_text('{"a": "b"}')
    with pytest.raises(SensiError, match=f"no numbers for the card in {tmp_path / 'r.json'}"[:80]):
        results_table(tmp_path / "r.json")
    (tmp_path / "r.json").write_text("{")
    with pytest.raises(SensiError, match="not JSON"):
        results_table(tmp_path / "r.json")
    assert results_table({"accuracy": 0.5, "flag": True}) == "| measure | value |\n| --- | --- |\n| accuracy | 0.5 |"


def test_numbers_that_no_float_holds_are_left_out_of_a_card():
    numbers = {"accuracy": 0.5, "loss": float("nan"), "f1": 10**400}
    assert results_table(numbers) == "| measure | value |\n| --- | --- |\n| accuracy | 0.5 |"
    assert model_index({"validation": numbers}, "text-classification")[0].metric_value == 0.5
    metrics = {"epochs": 10**400, "seconds": {"training": 10**400}, "learning_rate": 0.1, "bf16": True, "seed": 0}
    assert training_rows(metrics) == [("learning rate", "0.1"), ("bfloat16", "yes")]


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

run("push", {adapter!r}, "me/two", "--license", "apache-2.0", "--base", {base!r}, "--json")
run("inspect", "me/two", "--json", "--base", {base!r})
"""


def with_hub(hub: Hub, code: str, home: Path) -> subprocess.CompletedProcess:
    """Runs Python code in a process that knows this Hub only."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    environment = {k: v for k, v in environment.items() if not k.lower().endswith("_proxy")}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True,
                          timeout=PATIENCE)  # fmt: skip


def test_upload_download_load(adapter, tmp_path):
    (adapter / "optimizer.pt").write_bytes(b"pickle")
    with Hub() as hub:
        script = PUSH.format(tests=str(Path(__file__).parent), adapter=str(adapter), base=str(adapter.parent / "base"))
        done = with_hub(hub, script, tmp_path)
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


SECRETS = {
    "credentials.json": '{"token": "SECRET-1"}',
    ".env": "KEY=SECRET-2",
    "notes.txt": "SECRET-3",
    "optimizer.pt": "SECRET-4",
    "training_args.bin": "SECRET-5",
    "other.safetensors": "SECRET-6",
    "checkpoint-3/trainer_state.json": '{"secret": "SECRET-7"}',
    "vocab.txt": "SECRET-8",  # not of a tokenizer: there is no tokenizer_config.json
    "README.md.bak": "SECRET-9",
}


@pytest.fixture
def private_folder(adapter, tmp_path) -> Path:
    """An adapter in a folder with secrets, whose own files name this machine's folders everywhere."""
    folder = shutil.copytree(adapter, tmp_path / "SECRET-customer" / "run")
    for name, text in SECRETS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(shutil.copytree(adapter.parent / "base", tmp_path / "SECRET-models/base"))
    (folder / "adapter_config.json").write_text(json.dumps(config))
    data = str(tmp_path / "SECRET-customer" / "data.tsv")
    metrics = {
        "command": ["train", "--data", data],
        "folder": str(folder),
        "model": str(tmp_path / "SECRET-models" / "base"),
        "data_sha256": {"data.tsv": "ab12"},
        "hashes": {data: "cd34"},
        "data": {"train": data, "other": [r"C:\Users\SECRET-bob\x.tsv", "~/SECRET/y.csv", "../SECRET/z.csv"]},
        "classes": ["/a/b", "good"],
        "note": f"read from {data}, twice",
        "validation": {"accuracy": 0.5},
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    text = f"Trained on {data} in `{folder}` by file:///home/SECRET-bob/train.py.\n"
    (folder / "README.md").write_text(f"---\nbase_model: {folder}\n---\n# Mine\n\n{text}")
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that this process knows."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    with Hub() as hub:
        for name, value in {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
                            "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_DISABLE_TELEMETRY": True,
                            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
                            }.items():  # fmt: skip
            monkeypatch.setattr(constants, name, value)
        close_session()
        yield hub
    close_session()


@pytest.mark.parametrize("words", [["inspect"], ["check"], ["merge", "out"], ["measure"], ["plan", "--data", "a.csv"],
                                   ["push"]])  # fmt: skip
def test_an_unknown_name_costs_no_waiting_without_a_connection(hub, words, adapter, tmp_path, monkeypatch):
    """huggingface_hub tries again for 23 s for each file of a repository that is not in the cache."""
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("text,label\nso fine,1\nso bad,0\n")
    hub.server.shutdown()
    hub.server.server_close()
    result = run(*words[:1], *([adapter] if words == ["push"] else []), "me/unknown", *words[1:])
    assert result.exit_code == 1 and "cannot be reached" in result.output, result.output
    with pytest.raises(SensiError, match="it cannot be reached"):
        read_source("me/rows", None, Options())
    assert not waits


def test_a_card_does_not_wait_for_the_license_of_its_base(hub, adapter, tmp_path, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    hub.server.shutdown()
    hub.server.server_close()
    own = shutil.copytree(adapter, tmp_path / "own")
    config = json.loads((own / "adapter_config.json").read_text()) | {"base_model_name_or_path": "me/unknown"}
    (own / "adapter_config.json").write_text(json.dumps(config))
    assert run("card", own).exit_code == 0 and not waits


def test_the_hub_is_asked_once_in_a_minute_whether_it_is_there(hub, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(hub_names, "time", SimpleNamespace(monotonic=lambda: now[0]))
    hub.repos["me/model"] = {"config.json": b"{}"}
    assert not any(hub_names.is_out_of_reach("me/model") for _ in range(5))
    assert len(hub.received) == 1
    hub.server.shutdown()
    hub.server.server_close()
    close_session()
    now[0] = 59.0
    assert not hub_names.is_out_of_reach("me/model")
    now[0] = 60.0
    assert hub_names.is_out_of_reach("me/model")


def test_no_private_byte_leaves_this_machine(hub, private_folder, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        result = run("push", private_folder, "me/mine")
    assert "does not name it: give its name on the Hub as --base." in result.stderr
    assert result.exit_code == 0 and not hub.strange, f"{hub.strange} {result.output}"
    files = hub.repos["me/mine"]
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "metrics.json", "plan.png"}
    assert len(hub.received) > 5
    for part in hub.received:
        assert b"SECRET" not in part and str(tmp_path).encode() not in part, part[:2000]
    metrics = json.loads(files["metrics.json"])
    assert "command" not in metrics and "folder" not in metrics and metrics["classes"] == ["/a/b", "good"]
    assert metrics["model"] == "base" and metrics["data"] == {
        "train": "data.tsv",
        "other": ["x.tsv", "y.csv", "z.csv"],
    }
    assert metrics["hashes"] == {"data.tsv": "cd34"}
    assert metrics["note"] == "read from path/to/data.tsv, twice"
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] is None
    assert "Trained on path/to/data.tsv in `path/to` by path/to/train.py." in files["README.md"].decode()
    lines = result.stderr.splitlines()
    places = [i for i, line in enumerate(lines) for what in ("adapter_config.json ", "uploading") if what in line]
    assert places == sorted(places) and "me/mine is new: everybody can see it" in result.stderr
    assert "not uploaded: .env, README.md.bak, checkpoint-3/, credentials.json" in result.stderr


def test_links_to_other_places_are_not_followed(hub, adapter, tmp_path):
    """Except those of the Hub's cache, whose files are all links."""
    folder, other = shutil.copytree(adapter, tmp_path / "run"), tmp_path / "other"
    other.mkdir()
    for name in ("metrics.json", "README.md", "tokenizer.json"):
        (other / name).write_text('{"note": "SECRET"}')
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(other / name)
    (folder / "settings.json").write_text("{}")
    (folder / "tokenizer_config.json").symlink_to("settings.json")  # inside of the folder
    result = run("push", folder, "me/mine")
    assert result.exit_code == 0 and not hub.strange, result.output
    assert all(b"SECRET" not in part for part in hub.received)
    assert not {"metrics.json", "tokenizer.json"} & set(hub.repos["me/mine"])
    assert "tokenizer_config.json" in hub.repos["me/mine"]
    assert all(f"{name} (a link to another place)" in result.stderr for name in ("metrics.json", "tokenizer.json"))
    (folder / "adapter_model.safetensors").rename(other / "weights")
    (folder / "adapter_model.safetensors").symlink_to(other / "weights")
    received = len(hub.received)
    for options in ((), ("--dry-run",)):
        result = run("push", folder, "me/mine", *options)
        assert result.exit_code == 1 and "copy the file into the folder" in result.stderr.replace("\n", " ")
    assert len(hub.received) == received
    snapshot = tmp_path / "hub" / "models--me--x" / "snapshots" / "0"
    shutil.copytree(adapter, snapshot)
    for path in list(snapshot.iterdir()):
        blob = snapshot.parent.parent / "blobs" / f"blob-{path.name}"
        blob.parent.mkdir(exist_ok=True)
        path.rename(blob)
        path.symlink_to(blob)
    assert run("push", snapshot, "me/copy").exit_code == 0
    assert "adapter_model.safetensors" in hub.repos["me/copy"]


def test_without_a_login_the_error_says_what_to_do(hub, adapter, monkeypatch):
    hub.refuse = 401
    result = run("push", adapter, "me/mine")
    assert result.exit_code == 1 and "hf auth login" in " ".join(result.stderr.split()) and not hub.repos


@pytest.mark.parametrize(("status", "reason"), [(400, "Bad request"), (403, "hf auth login")])
def test_a_repository_that_an_upload_leaves_empty_is_named(hub, adapter, status, reason):
    hub.refuse_files = status
    for words in (("me/mine was created, but nothing is in it", reason), (reason,)):  # then it exists before
        result = run("push", adapter, "me/mine")
        said = " ".join(result.stderr.split())
        assert result.exit_code == 1 and all(word in said for word in words), said
        assert ("was created" in said) is (len(words) > 1) and hub.repos == {"me/mine": {}}


@pytest.mark.parametrize("base", [None, "me/never-seen"])
def test_dry_run_lists_the_files_without_a_connection(hub, private_folder, base):
    if base:
        config = json.loads((private_folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = base
        (private_folder / "adapter_config.json").write_text(json.dumps(config))
    before = {path: path.read_bytes() for path in private_folder.rglob("*") if path.is_file()}
    result = run("push", private_folder, "me/mine", "--dry-run")
    assert result.exit_code == 0 and not hub.received and not hub.repos, result.output
    assert "adapter_model.safetensors" in result.stdout and "public" in result.stdout
    assert "not uploaded: .env" in result.stdout
    assert {path: path.read_bytes() for path in private_folder.rglob("*") if path.is_file()} == before


def test_a_public_repository_is_not_taken_for_a_private_one(hub, adapter):
    hub.repos["me/mine"], hub.private["me/mine"] = {}, False
    result = run("push", adapter, "me/mine", "--private")
    assert result.exit_code == 1 and "exists and is public" in result.stderr and not hub.repos["me/mine"]


def test_a_branch_and_a_pull_request_leave_the_main_branch_as_it_is(hub, adapter, tmp_path):
    wrap(tiny_model(), budget=0.25).save_pretrained(tmp_path / "other")
    push_folder(open_adapter(adapter), "me/repo")
    main = dict(hub.repos["me/repo"])
    push_folder(open_adapter(tmp_path / "other"), "me/repo", revision="small")
    request = push_folder(open_adapter(tmp_path / "other"), "me/repo", create_pr=True)
    push_folder(open_adapter(tmp_path / "other"), "me/repo", revision=request.pr_revision, commit_message="Again")
    assert hub.repos["me/repo"] == main and not hub.strange and hub.commits[-1] == "Again"
    assert hub.branches.keys() == {("me/repo", "small"), ("me/repo", "refs%2Fpr%2F1")}
    for files in hub.branches.values():
        assert files["adapter_model.safetensors"] == (tmp_path / "other/adapter_model.safetensors").read_bytes()


def test_a_merged_model_is_pushed_and_loads_from_the_hub(hub, tmp_path):
    save_adapter(tmp_path, names=NAMES)
    folder = tmp_path / "merged"
    for name, text in SECRETS.items():
        if "vocab" not in name:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
    config = json.loads((folder / "config.json").read_text())
    config["_name_or_path"] = str(tmp_path / "SECRET-models")
    del config["peft_sensi_hash"]
    config["peft_sensi_hash"] = hashes_of(config, folder / config["peft_sensi"]["weights"])
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.json").write_text(json.dumps({"model": str(tmp_path / "base"), "command": ["SECRET"]}))
    result = run("push", folder, "me/small", "--private")
    assert result.exit_code == 0 and not hub.strange, f"{hub.strange} {result.output}"
    files = hub.repos["me/small"]
    assert {"README.md", "config.json", "modeling_sensi_bertforsequenceclassification.py", "metrics.json",
            "tokenizer.json", "tokenizer_config.json"} <= set(files) and hub.private["me/small"]  # fmt: skip
    assert sum(name.endswith(".safetensors") for name in files) == 1 and not {*files} & {*SECRETS} - {"vocab.txt"}
    assert all(b"SECRET" not in part and str(tmp_path).encode() not in part for part in hub.received)
    for name, content in files.items():
        (tmp_path / "again" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "again" / name).write_bytes(content)
    assert load_merged(tmp_path / "again").config.id2label == dict(enumerate(NAMES))
    assert open_saved("me/small").labels == NAMES  # downloads it


def test_what_somebody_wrote_into_the_card_on_the_hub_stays(hub, adapter, tmp_path):
    """Also with the adapter's own `push_to_hub`, which has no card of a folder."""
    model = wrap(tiny_model(), budget=0.5)
    model.push_to_hub("me/mine")
    first = hub.repos["me/mine"]["README.md"].decode()
    edited = first.replace("<!-- peft_sensi: gen", "Use it for ferries.\n\n<!-- peft_sensi: gen")
    edited = edited.replace("tags:\n", "license: mit\nbase_model: other/base\ntags:\n- boats\n")
    hub.repos["me/mine"]["README.md"] = edited.encode()
    own = shutil.copytree(adapter, tmp_path / "own", ignore=shutil.ignore_patterns("README.md"))
    write_card(open_adapter(own))
    for push in (lambda: model.push_to_hub("me/mine"), lambda: push_folder(open_adapter(own), "me/mine")):
        push()
        card = ModelCard(hub.repos["me/mine"]["README.md"].decode())
        assert "Use it for ferries.\n" in card.text and card.text.count("peft_sensi: generated") == 1
        assert card.data.license == "mit" and "boats" in card.data.tags and "peft_sensi" in card.data.tags
        assert "| license of the adapter | mit |" in card.text
        assert card.data.get("base_model") is None  # of the adapter that was there
    (own / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Own\n\nUse it for trains.\n")
    push_folder(open_adapter(own), "me/mine")
    card = ModelCard(hub.repos["me/mine"]["README.md"].decode())
    assert "trains" in card.text and "ferries" not in card.text and card.data.license == "apache-2.0"
    assert "boats" in card.data.tags and not hub.strange
    hub.repos["me/mine"]["README.md"] = b"---\n: [\n---\n"
    with pytest.raises(SensiError, match="README.md in me/mine cannot be read"):
        push_folder(open_adapter(own), "me/mine")


def test_files_of_another_model_do_not_stay_on_the_hub(hub, adapter, tmp_path):
    save_adapter(tmp_path, names=NAMES)
    folder = tmp_path / "merged"
    (folder / "metrics.json").write_text(json.dumps({"validation": {"accuracy": 0.99}}))
    push_folder(open_saved(folder), "me/small")
    hub.repos["me/small"]["notes.txt"] = b"mine"
    (first,) = (name for name in hub.repos["me/small"] if name.endswith(".safetensors"))
    save_merged(load_merged(folder), folder)
    (folder / "metrics.json").unlink()
    result = run("push", folder, "me/small")
    assert "Of the model there, metrics.json" in result.stderr.replace("\n", " "), result.stderr
    (second,) = (name for name in hub.repos["me/small"] if name.endswith(".safetensors"))
    assert first != second and open_saved("me/small").labels == NAMES
    assert {"notes.txt", "tokenizer.json"} <= set(hub.repos["me/small"])
    assert "metrics.json" not in hub.repos["me/small"]
    with pytest.raises(SensiError, match=r"me/small holds 'config.json' of another kind of model"):
        push_folder(open_adapter(adapter), "me/small")
    plain = tmp_path / "plain"
    assert save_merged(wrap(tiny_model(), budget={"trainable": 0.1}), plain)
    for name in ("adapter_config.json", "model.safetensors"):
        for saved in (folder, plain):
            hub.repos["me/other"], hub.private["me/other"] = {name: b"{}"}, False
            with pytest.raises(SensiError, match=f"me/other holds '{name}'"):
                push_folder(open_saved(saved), "me/other")
            assert set(hub.repos["me/other"]) == {name}
    assert not hub.strange


def test_an_upload_does_not_name_a_local_base_in_the_card(hub, tmp_path):
    """PEFT writes the path of a base into the card, which must not become the name of a repository."""
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    model = wrap(base, budget=0.5)
    model.save_pretrained(tmp_path / "adapter")
    for options in ((), ("--base", "me/base")):
        assert run("push", tmp_path / "adapter", "me/mine", *options).exit_code == 0
        data = ModelCard(hub.repos["me/mine"]["README.md"].decode()).data
        assert data.get("base_model") == (options[1] if options else None)
        tags = [tag for tag in data.tags if tag.startswith("base_model:")]
        assert tags == ["base_model:adapter:me/base"] * bool(options)


@pytest.mark.parametrize("tags", ["[2024]", "[no]", "\n-", "text"])
def test_a_strange_tag_in_a_card_loses_no_weights(tags, tmp_path):
    (tmp_path / "README.md").write_text(f"---\ntags: {tags}\n---\n# Mine\n")
    wrap(tiny_model(), budget=0.5).save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert "peft_sensi" in ModelCard.load(tmp_path / "README.md").data.tags


def test_words_after_a_section_without_its_end_stay(adapter, tmp_path):
    own = shutil.copytree(adapter, tmp_path / "own", ignore=shutil.ignore_patterns("README.md"))
    write_card(open_adapter(own))
    text = (own / "README.md").read_text().replace("<!-- peft_sensi: end -->", "Use it for ferries.")
    (own / "README.md").write_text(text)
    for _ in range(3):
        write_card(open_adapter(own))
    assert "Use it for ferries." in (own / "README.md").read_text()


@pytest.mark.parametrize(
    ("here", "there", "kept", "lost"),
    [
        ("# own\n", "# Boats\n\nFor ferries.\n", ["# Boats", "For ferries."], []),
        ("# Trains\n", "# Boats\n\nFor ferries.\n", ["# Trains", "For ferries."], ["# Boats"]),
        ("# own\n\nFor trains.\n", "# Boats\n\nFor ferries.\n", ["For trains."], ["For ferries."]),
        ("# own\n", "", ["# own"], []),
        (
            "<!-- This model card has been generated automatically according to the information the Trainer had "
            "access to. -->\n# own\n\nMore information needed\n",
            "# Boats\n\nFor ferries.\n",
            ["For ferries."],
            ["More information"],
        ),
        ("# own\n### Framework versions\n\n- PEFT 0.21.2\n\n- For trains.\n", "# Boats\n", ["- For trains."], []),
    ],
)
def test_whose_words_a_card_has(here, there, kept, lost, tmp_path):
    """`own` and `mine` are generated titles."""
    for name, text in (("here", here), ("there", there)):
        (tmp_path / name).write_text(f"---\nlicense: mit\n---\n{text}")
    keep_words(tmp_path / "here", tmp_path / "there", "me/mine", {"own", "mine"})
    text = (tmp_path / "here").read_text()
    assert all(words in text for words in kept) and not any(words in text for words in lost), text


def test_an_upload_names_the_adapters_that_it_leaves_out(hub):
    model = wrap(tiny_model(), budget=0.5)
    model.add_adapter("second", SensiConfig(budget=0.6, score="magnitude", task_type="SEQ_CLS"))
    with pytest.warns(UserWarning, match="'default' is uploaded, not 'second'"):
        model.push_to_hub("me/mine")
    with pytest.raises(TypeError, match="push_to_hub.*no argument 'use_temp_dir'"):
        model.push_to_hub("me/mine", use_temp_dir=True)
    model.delete_adapter("second")
    model.delete_adapter("default")
    with pytest.raises(SensiError, match="No adapter is active"):
        model.push_to_hub("me/mine")


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("/srv/data/train.tsv", "train.tsv"),
        (r"D:\data\train.tsv", "train.tsv"),
        ("me/model", "me/model"),
        ("good/bad", "good/bad"),
        ("</s>", "</s>"),
        ("/", "/"),
        ("1/2", "1/2"),
        ("https://hf.co/home/x", "https://hf.co/home/x"),
        ("see /Users/bob/thesis/a.py", "see path/to/a.py"),
    ],
)
def test_only_paths_are_taken_out_of_texts(text, public):
    assert scrubbed({"a": [text], "labels": ["/x/y"]}, local_paths()) == {"a": [public], "labels": ["/x/y"]}


def test_a_path_in_the_header_of_the_weights_is_refused(adapter, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(adapter, tmp_path / "run")
    weights = folder / "adapter_model.safetensors"
    save_file(load_file(weights), weights, metadata={"format": "pt", "source": str(tmp_path / "x")})
    with pytest.raises(SensiError, match="__metadata__"):
        push_folder(open_adapter(folder), "me/mine", dry_run=True)


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
