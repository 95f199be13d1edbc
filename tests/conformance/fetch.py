"""PEFT's own tests, from its source distribution (the wheel has none). Nothing of them is kept in this repository."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest


CACHE = Path(__file__).resolve().parents[2] / ".cache" / "peft-tests"
PACKAGE = "peft_own_tests"  # not `tests`: that is also what others call theirs
# Without isolation pip needs no network for the build backend, but a setuptools in this environment.
ATTEMPTS = (["--no-build-isolation"], [])


class Unavailable(Exception):
    """The source distribution can't be had."""


def import_suite(*names: str) -> list[ModuleType]:
    """Modules of PEFT's `tests` folder, of the installed version. Downloads it once; raises `Unavailable`."""
    folder = CACHE / version("peft")
    if not (folder / PACKAGE).is_dir():
        _fetch(version("peft"), folder)
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    pytest.register_assert_rewrite(PACKAGE)
    with _without_diffusers():
        # The helper goes online for the first use of each model id; ours are local folders.
        importlib.import_module(f"{PACKAGE}.testing_utils").hub_online_once = lambda model_id: nullcontext()
        return [importlib.import_module(f"{PACKAGE}.{name}") for name in names]


def _fetch(peft: str, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        output = ""
        for options in ATTEMPTS:
            # `--no-binary` for PEFT alone: with `:all:` an isolated build would compile its backend from source, too.
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=peft", *options]
            command += ["--quiet", "--disable-pip-version-check", f"--dest={work}", f"peft=={peft}"]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
            except subprocess.TimeoutExpired:
                raise Unavailable(f"pip took more than half an hour to download peft {peft}.") from None
            output = done.stderr
            if done.returncode == 0:
                break
        archive = Path(work) / f"peft-{peft}.tar.gz"
        if not archive.is_file():
            raise Unavailable(f"pip can't download the source distribution of peft {peft}: {output.strip()[-500:]}")
        with tarfile.open(archive) as file:
            prefix = f"peft-{peft}/tests/"
            members = [m for m in file.getmembers() if m.name.startswith(prefix) and m.name.endswith(".py")]
            file.extractall(work, members, filter="data")
        if not members:
            raise Unavailable(f"The source distribution of peft {peft} ships no tests.")
        (Path(work) / "ready").mkdir()
        (Path(work) / prefix).rename(Path(work) / "ready" / PACKAGE)
        try:
            (Path(work) / "ready").rename(folder)  # in one step: a run that is stopped leaves no half of it
        except OSError:
            if not (folder / PACKAGE).is_dir():  # unless another process was faster
                raise


@contextmanager
def _without_diffusers() -> Iterator[None]:
    """The common tests import one class of it, to recognize image pipelines."""
    try:
        import diffusers  # noqa: F401
    except ImportError:
        sys.modules["diffusers"] = SimpleNamespace(StableDiffusionPipeline=type("StableDiffusionPipeline", (), {}))  # type: ignore[assignment]
        yield
        del sys.modules["diffusers"]  # PEFT and Transformers ask whether it can be found
    else:
        yield
