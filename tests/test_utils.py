"""What functions do with a file that is missing, damaged, or of another kind, and with values from outside."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from peft_sensi import SensiLoadError
from peft_sensi.reporting.saved_merged import SavedMerged
from peft_sensi.utils import files, heads, hub_names
from peft_sensi.utils.errors import first_line


@pytest.mark.parametrize("text", ["{", "", "[" * 100_000, "\ufeff{}"])
def test_what_is_no_json_is_refused(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SensiLoadError, match=r"x\.json cannot be read: it is not JSON"):
        files.read_json(path)
    assert files.read_json_object(path, optional=True) == {}


def test_a_json_file_that_holds_no_object(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("[1, 2]", encoding="utf-8")
    assert files.read_json(path) == [1, 2]
    with pytest.raises(SensiLoadError, match=r"x\.json must hold a JSON object, found a list"):
        files.read_json_object(path)
    assert files.read_json_object(path, optional=True) == {}


def test_missing_files(tmp_path):
    for read in (files.read_json, files.read_json_object):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "no.json")
    with pytest.raises(FileNotFoundError), files.open_safetensors(tmp_path / "no.safetensors"):
        pass
    assert files.read_json_object(tmp_path / "no.json", optional=True) == {}
    with pytest.raises(SensiLoadError, match="cannot be read"):
        files.read_json(tmp_path)  # a folder


def test_the_file_that_refers_to_others_is_moved_last(tmp_path, monkeypatch):
    (tmp_path / "new").mkdir()
    for folder, text in ((tmp_path, "old"), (tmp_path / "new", "new")):
        for name in ("weights", "config"):
            (folder / name).write_text(text)
    replace = os.replace

    def interrupted(source, target):
        if target.name == "config":
            raise OSError("no space left")
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    new = [tmp_path / "new" / name for name in ("weights", "config")]
    with pytest.raises(OSError, match="no space left"):
        files.move_files(new, tmp_path)
    assert (tmp_path / "weights").read_text() == "new" and (tmp_path / "config").read_text() == "old"
    monkeypatch.undo()
    files.move_files(new[1:], tmp_path)
    assert (tmp_path / "config").read_text() == "new" and not any((tmp_path / "new").iterdir())


def raised(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("offline", "cause", "words"),
    [
        (
            False,
            lambda r: RepositoryNotFoundError("404", response=r),
            "there is none with this name that you may read",
        ),
        (False, lambda r: GatedRepoError("403", response=r), "its authors must give you access. Ask at"),
        (False, lambda r: HfHubHTTPError("503", response=r), "it answered with the error 503. Try again later"),
        (False, lambda r: ConnectionError("host"), "it cannot be reached, and the cache has no copy"),
        (False, lambda r: LocalEntryNotFoundError("no"), "it cannot be reached, and the cache has no copy"),
        (True, lambda r: ConnectionError("host"), "HF_HUB_OFFLINE forbids downloads, and the cache has no copy"),
        (False, lambda r: KeyError("x"), "its reason"),
    ],
)
def test_why_the_hub_has_no_such_repository(offline, cause, words, monkeypatch, tmp_path):
    """Libraries wrap these errors in their own, whose texts are about their own options."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    answer = SimpleNamespace(status_code=503, headers={}, request=None)
    text = hub_names.not_found("me/model", raised(OSError("its reason\nand more"), cause(answer)))
    assert text.startswith(f"There is no folder me/model here, and it was not found on the Hub: {words}")


def test_names_that_can_only_be_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for name in ("./x", "/x/y", "~/x", "a/b/c", "models/x", "with blank"):
        assert hub_names.not_found(name, OSError("?")) == f"There is no folder {name}. Check the path."
    assert "is a web address" in hub_names.not_found("https://huggingface.co/me/x", OSError("?"))
    assert hub_names.is_repo("me/x") and not hub_names.is_repo("models") and not hub_names.is_repo("a/b/c")


@pytest.mark.parametrize(
    ("id2label", "names"),
    [
        ({0: "bad", 1: "good"}, ["bad", "good"]),
        ({str(i): f"class {i}" for i in (10, 2, 0, 1, *range(3, 10))}, [f"class {i}" for i in range(11)]),
        ({"0": "LABEL_A", "1": "LABEL_B"}, ["LABEL_A", "LABEL_B"]),
        ({0: "LABEL_1", 1: "LABEL_0"}, ["LABEL_1", "LABEL_0"]),
        ({0: "LABEL_0", 1: "LABEL_1"}, []),
        ({1: "bad", 2: "good"}, []),
        ({"a": "bad"}, []),
        ({}, []),
        (None, []),
        ("bad", []),
    ],
    ids=str,
)
def test_names_of_labels(id2label, names):
    assert heads.label_names(id2label) == names
    assert SavedMerged("m", Path(), {"id2label": id2label}, "w", {}, 0).labels == names


def test_the_first_line_of_an_error():
    assert first_line(ValueError("\n one \ntwo")) == "one"
    assert first_line(NotImplementedError()) == "NotImplementedError"


def test_a_file_is_not_a_repository(tmp_path, monkeypatch):
    """Its name may look like one, and would be sent to the Hub."""
    monkeypatch.chdir(tmp_path)
    assert hub_names.is_repo("model.onnx") and hub_names.is_repo("me/model.onnx")
    (tmp_path / "model.onnx").touch()
    assert not hub_names.is_repo("model.onnx")


def test_json_has_no_nan_and_no_numbers_of_numpy():
    """`metrics.json` with a NaN could not be read by other programs."""
    values = {"nan": float("nan"), "inf": np.float32("inf"), "mean": np.float32(0.5), "counts": np.arange(2),
              "names": {"b", "a"}, "folder": Path("x")}  # fmt: skip
    assert json.loads(files.json_text(values)) == {
        "nan": None, "inf": None, "mean": 0.5, "counts": [0, 1], "names": ["a", "b"], "folder": "x"
    }  # fmt: skip
