"""What is imported when: the command's help without PyTorch, the package with everything."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from processes import PATIENCE

import peft_sensi
from peft_sensi.cli.commands import app
from peft_sensi.scoring.criteria import CRITERIA
from peft_sensi.scoring.methods import METHODS
from peft_sensi.utils import errors
from peft_sensi.utils.errors import how_to_install


HEAVY = ("torch", "transformers", "peft", "accelerate", "safetensors", "huggingface_hub", "scipy", "sklearn", "pandas",
         "datasets", "matplotlib", "onnx", "onnxruntime")  # fmt: skip

# As the script that pip writes: the name of the program is `peft-sensi`, and `main` ends the process.
CALLS = """
import contextlib, io, json, sys
sys.argv[0] = "/somewhere/bin/peft-sensi"
from peft_sensi.cli import main
found = {{}}
for arguments in {calls!r}:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        try:
            main(arguments)
        except SystemExit as end:
            assert not end.code, (arguments, end.code)
    found[" ".join(arguments)] = [len(output.getvalue()), [name for name in {heavy!r} if name in sys.modules]]
print(json.dumps(found))
"""


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_needs_no_pytorch():
    commands = typer.main.get_command(app).commands
    calls = [["--help"], ["--version"], ["recipes"], ["recipes", "--json"], *([name, "--help"] for name in commands)]
    found = json.loads(python(CALLS.format(calls=calls, heavy=HEAVY)))
    assert len(found) == len(calls) >= 14
    for call, (length, imported) in found.items():
        assert length > 10 and not imported, f"peft-sensi {call} printed {length} characters and imported {imported}"


# All in one process, because PEFT takes seconds to import: each way to load the package runs in a fork.
LOADS = """
import os, sys
sys.argv[0] = "peft-sensi"
import peft_sensi
assert "torch" not in sys.modules and "SensiConfig" in dir(peft_sensi)
try:
    peft_sensi.nothing
except AttributeError:
    pass
assert "torch" not in sys.modules

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known

def loaded_by_a_call():
    peft_sensi.register()

def loaded_by_a_name():
    from peft_sensi import Plan

def imported_by_another_program():
    for name in [name for name in sys.modules if name.startswith("peft_sensi")]:
        del sys.modules[name]
    sys.argv[0] = "train.py"
    global peft_sensi
    import peft_sensi
    assert all(name in vars(peft_sensi) for name in peft_sensi.__all__)
    exec("from peft_sensi import *")
    peft_sensi.SensiConfig, peft_sensi.recipes.far, peft_sensi.register
    assert set(peft_sensi.__all__) <= set(dir(peft_sensi))

for load in (loaded_by_a_call, loaded_by_a_name, imported_by_another_program):
    if not (child := os.fork()):
        try:
            assert "SENSI" not in known and "peft_sensi.tuner.model" not in sys.modules
            load()
            assert "peft_sensi.tuner.model" in sys.modules
            assert known["SENSI"] is peft_sensi.SensiConfig is sys.modules["peft_sensi.tuner.config"].SensiConfig
            peft.PeftConfig.from_peft_type(peft_type="SENSI")
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0, load.__name__
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_every_way_to_load_the_package_has_all_names_and_registers():
    python(LOADS)


def test_the_list_of_names_is_the_list_of_imports():
    """Type checkers read the imports, programs read `__all__`."""
    tree = ast.parse(Path(peft_sensi.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    names = {alias.asname or alias.name for node in imports for alias in node.names}
    assert {name for name in names if not name.startswith("_")} == {*peft_sensi.__all__, "SensiPeftType"}


def test_names_of_criteria():
    assert tuple(CRITERIA) == METHODS


# -- how to install ---------------------------------------------------------------------------------------------------


class Metadata:
    def __init__(self, *urls):
        self.urls = list(urls)

    def get_all(self, name):
        assert name == "Project-URL"
        return self.urls or None


def test_how_to_install(monkeypatch):
    monkeypatch.setattr(errors, "metadata", lambda name: Metadata())
    assert how_to_install() == "pip install '.'  # in a clone of peft_sensi's repository"
    assert how_to_install("cli", "-U").startswith("pip install -U '.[cli]'")
    links = Metadata("Documentation, https://docs.example", "Repository, https://git.example/a/b")
    monkeypatch.setattr(errors, "metadata", lambda name: links)
    assert how_to_install("onnx") == "pip install 'peft-sensi[onnx] @ git+https://git.example/a/b'"

    def missing(name):
        raise errors.PackageNotFoundError(name)

    monkeypatch.setattr(errors, "metadata", missing)
    assert "in a clone" in how_to_install()


def test_one_place_says_how_to_install():
    """The name is not on the package index, so a message with `pip install peft-sensi` would not help."""
    root = Path(peft_sensi.__file__).parent
    for path in [p for p in root.rglob("*") if p.suffix in (".py", ".md")]:
        if path != root / "utils" / "errors.py":
            found = re.findall(r"pip install [^\n]*(?:peft.sensi|'\.)|peft-sensi\[", path.read_text(encoding="utf-8"))
            assert not found, f"{path.name}: {found[0]}"
    for path in [*root.parent.glob("*.md"), *root.parent.glob("docs/*.md")]:
        named = re.findall(r"pip install [^\n`]*peft.sensi[^\n`]*", path.read_text(encoding="utf-8"))
        assert not named, f"{path.name}: {named[0]}"
