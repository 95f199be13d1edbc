"""File access: what each function does with a file that is missing, damaged, or of another kind."""

from __future__ import annotations

import os

import pytest

from peft_sensi import SensiLoadError
from peft_sensi.utils import files


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
