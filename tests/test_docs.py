"""Runs every Python block of the documentation exactly as it is written, page by page, from top to bottom.

The blocks of a page share one namespace, which is empty at first: a reader can paste them in this order. The names of
the Hub lead to tiny random models and a few made-up rows in a cache (`hub_cache`). The names of folders that a reader
is assumed to have (`my-finetuned-model`) are folders where the blocks run. A block that cannot run is marked `no-run`.
"""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import hub_cache
import pytest
import torch
from processes import PATIENCE
from tiny import tiny_config, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from peft_sensi.scoring.priming import EXAMPLES


ROOT = Path(__file__).resolve().parents[1]
FILES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
FILES += sorted((ROOT / "peft_sensi").rglob("*.md"))
FILES = [
    path for path in FILES if path.name != "card_template.md"
]  # a template; the tests of cards check it filled in
BLOCK = re.compile(r"^```python([^\n]*)\n(.*?)^```", re.S | re.M)


def blocks(path: Path) -> list[tuple[int, str, str]]:
    """The line number, mark and code of each block."""
    text = path.read_text(encoding="utf-8")
    return [(text[: m.start()].count("\n") + 2, m[1].strip(), m[2]) for m in BLOCK.finditer(text)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(60))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=40, **special)


FOLDERS = {"my-finetuned-model": "bert", "llama-1b": "llama"}
ON_THE_HUB = {
    "bert-base-uncased": "bert",
    "distilbert-base-uncased": "distilbert",
    "sentence-transformers/all-MiniLM-L6-v2": "bert",
}


def save_model(family: str, folder: Path) -> None:
    """A tiny model of this family with its tokenizer."""
    if family == "llama":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(tiny_config(family)).save_pretrained(folder)
    else:
        tiny_model(family, num_labels=2).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A cache of the Hub, and a folder `folders` with models, under the names that the documentation uses."""
    cache = tmp_path_factory.mktemp("cache")
    for name, family in FOLDERS.items():
        save_model(family, cache / "folders" / name)
    for name, family in ON_THE_HUB.items():
        save_model(family, cache / "saved" / name)
        hub_cache.add_model(cache, name, cache / "saved" / name)
    rows = [
        {"idx": i, "sentence": " ".join(f"w{(7 * i + j) % 60}" for j in range(3 + i % 4)), "label": i % 2}
        for i in range(40)
    ]
    hub_cache.add_dataset(cache, "stanfordnlp/sst2", {"train": rows, "validation": rows[:8]})
    pairs = [{"query": row["sentence"], "answer": f"{row['sentence']} w9"} for row in rows]
    hub_cache.add_dataset(cache, "sentence-transformers/natural-questions", {"train": pairs})
    return cache


@pytest.fixture
def namespace(cache, tmp_path, monkeypatch) -> dict:
    hub_cache.use(cache, monkeypatch)
    for path in (cache / "folders").iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples" / "benchmarks")
    return {"__name__": "docs"}


@pytest.mark.parametrize("path", [path for path in FILES if blocks(path)], ids=lambda path: path.name)
def test_python_blocks_run(path, namespace, capsys):
    for line, mark, code in blocks(path):
        assert mark in ("", "no-run"), f"{path.name}:{line}: unknown mark {mark!r}"
        compiled = compile("\n" * (line - 1) + code, str(path), "exec")  # tracebacks show the line in the document
        if not mark:
            exec(compiled, namespace)


def test_few_blocks_are_exempt():
    marks = [(path.name, line) for path in FILES for line, mark, _ in blocks(path) if mark]
    assert len(marks) <= 3, marks


def test_commands_in_the_documentation_exist():
    """Every `peft-sensi` line names a command and options that it has."""
    import typer.main

    from peft_sensi.cli.commands import app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    seen = 0
    for path in FILES:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^(?:\$ )?peft-sensi (.+)$", text, re.M):
            name, *words = line.partition("#")[0].split()
            assert name in commands, f"{path.name}: {line}"
            known = {option for parameter in commands[name].params for option in parameter.opts} | {"--help"}
            unknown = [word for word in words if word.startswith("--") and word not in known]
            assert not unknown, f"{path.name}: peft-sensi {name} has no {unknown[0]}"
            seen += 1
    assert seen >= 5


class Parsed(BaseException):
    """A script has read its options."""


def test_scripts_in_the_documentation_accept_their_options(monkeypatch):
    """Each line `python examples/... OPTIONS` is parsed by its script, which then stops."""
    parse, depth = argparse.ArgumentParser.parse_known_args, 0

    def parse_and_stop(parser, *arguments, **options):
        nonlocal depth
        depth += 1  # a command of a parser has a parser of its own
        try:
            found, unknown = parse(parser, *arguments, **options)
        finally:
            depth -= 1
        if depth:
            return found, unknown
        assert not unknown, f"{parser.prog} has no {unknown[0]}"
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.syspath_prepend(ROOT / "examples" / "benchmarks")
    sources = [path for folder in ("examples", "hub_cards") for path in (ROOT / folder).rglob("*.py")]
    seen = set()
    for path in [*FILES, *sources]:
        text = re.sub(r"\\+\n", " ", path.read_text(encoding="utf-8"))
        lines = re.findall(r"python (examples/[\w/]+\.py)((?: [^`#\n]*)?)", text)
        lines += re.findall(r"(?:accelerate launch|torchrun) .*?(examples/[\w/]+\.py)((?: [^`#\n]*)?)", text)
        for script, words in lines:
            if script in ("examples/quickstart.py", "examples/benchmarks/speed_table.py"):
                continue  # without options
            monkeypatch.setattr(sys, "argv", [script, *shlex.split(words)])
            with pytest.raises(Parsed):
                runpy.run_path(str(ROOT / script), run_name="__main__")
            seen.add(script)
    assert len(seen) > 10


def test_commands_fit_the_site():
    """A page of the site shows 88 characters of a line. (Python blocks have their own check: `docs/ruff.toml`.)"""
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        for mark, block in re.findall(r"^```(\w*).*\n((?:.*\n)*?)```", text, re.M):
            assert mark, f"{path.name}: {block[:80]!r} has no language"
            assert mark != "bash" or max(map(len, block.splitlines())) <= 88, f"{path.name}: {block}"


def headings(path: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_inside_the_repository_lead_somewhere():
    for path in FILES:
        for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", path.read_text(encoding="utf-8")):
            page = path.parent / target if target else path
            assert page.exists(), f"{path.name} links to {target}"
            assert not anchor or anchor in headings(page), f"{path.name} links to {target}#{anchor}"


def test_files_named_in_the_documentation_exist():
    for path in FILES:
        for name in re.findall(r"\b(?:peft_sensi|examples|tests|docs)/[\w./-]*\w", path.read_text(encoding="utf-8")):
            assert (ROOT / name).exists() or (ROOT / f"{name}.py").exists(), f"{path.name} names {name}"


def test_pages_agree_on_how_many_examples_a_priming_step_takes():
    pages = [path.read_text(encoding="utf-8") for path in FILES]
    found = [
        n
        for text in pages
        for n in re.findall(r"(\d+) (?:examples|rows) (?:of|from) (?:a batch|each (?:of|batch|process))", text)
    ]
    assert len(found) >= 4 and {*map(int, found)} == {EXAMPLES}


def test_make_targets_in_the_documentation_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for path in FILES:
        for target in re.findall(r"^(?:\| `)?make ([a-z]+)", path.read_text(encoding="utf-8"), re.M):
            assert target in targets, f"{path.name}: make {target}"


@pytest.mark.slow
def test_the_package_is_imported_where_blocks_say_it_must_be():
    """The README says that PEFT does not know the method without the import."""
    code = "from peft import PeftConfig; PeftConfig.from_peft_type(peft_type='SENSI')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert "KeyError: 'SENSI'" in done.stderr
