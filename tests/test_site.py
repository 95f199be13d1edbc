"""The site of the documentation. `make docs` builds it, and finds broken links and anchors; these are its parts."""

from __future__ import annotations

import base64
import json
import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import pytest

import peft_sensi


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def hooks():
    spec = spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_is_in_the_api_reference():
    named = re.findall(r"^::: peft_sensi\.(\w+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.M)
    assert sorted(named) == sorted(peft_sensi.__all__)


@pytest.mark.parametrize(
    ("page", "text", "expected"),
    [
        ("README.md", "[a](docs/faq.md#b) c", "[a](faq.md#b) c"),
        ("README.md", "[a](CONTRIBUTING.md)", "[a](contributing.md)"),
        ("README.md", "[a](#e)", "[a](#e)"),
        ("README.md", "[a](https://arxiv.org/abs/2307.11764)", "[a](https://arxiv.org/abs/2307.11764)"),
        ("README.md", "[a](nowhere.md)", "[a](nowhere.md)"),  # MkDocs reports it
        (
            "README.md",
            '<source srcset="docs/a.png"><img src="docs/b.png">',
            '<source srcset="a.png"><img src="b.png">',
        ),
        ("docs/safety.md", "[a](../peft_sensi/tuner/FORMAT.md)", "[a](format.md)"),
        ("docs/safety.md", "[a](../README.md#install)", "[a](index.md#install)"),
        ("docs/safety.md", "[a](faq.md)", "[a](faq.md)"),
    ],
)
def test_links_to_files_of_the_repository_become_links_of_the_site(hooks, page, text, expected):
    addresses = {str(ROOT / source): address for source, address in hooks.OUTSIDE.items()}
    addresses |= {str(ROOT / "docs" / name): name for name in ("faq.md", "safety.md", "a.png", "b.png")}
    assert hooks.with_links_of_site(text, str(ROOT / page), addresses) == expected


def test_marks_for_the_tests_do_not_reach_the_site(hooks, caplog):
    page = SimpleNamespace(file=SimpleNamespace(abs_src_path=str(ROOT / "README.md"), src_uri="index.md"))
    files = [SimpleNamespace(abs_src_path=str(ROOT / "README.md"), src_uri="index.md")]
    text = hooks.on_page_markdown("```python no-run\na = 1\n```\n```bash\nb\n```\n", page, None, files)
    assert text == "```python\na = 1\n```\n```bash\nb\n```\n"
    hooks.on_page_content("<p>a</p><pre><code>```</code></pre>", page, None, files)
    assert not caplog.records
    hooks.on_page_content("<p>```python no-run</p>", page, None, files)
    assert "index.md: a block of code" in caplog.text


def test_formulas_become_mathml(hooks, caplog):
    page = SimpleNamespace(file=SimpleNamespace(abs_src_path=str(ROOT / "docs" / "theory.md"), src_uri="theory.md"))
    files = [SimpleNamespace(abs_src_path=str(ROOT / "docs" / "theory.md"), src_uri="theory.md")]

    def shown(text: str) -> str:
        return hooks.on_page_content(hooks.on_page_markdown(text, page, None, files), page, None, files)

    text = shown("a $c_i^{(e)}$ b")
    assert re.fullmatch(r'a <math [^>]*display="inline">.*<mi>c</mi>.*<mi>e</mi>.*</math> b', text)
    assert 'display="block"' in shown(r"$$ \sum_{k=1}^n \left( \tfrac{a}{\sqrt d} \right)^2 $$")
    code = "`$HOME` and\n```bash\necho $A $B\n```\n"
    assert hooks.on_page_markdown(code, page, None, files) == code
    assert not caplog.records
    shown(r"$\unknown$")
    assert "unknown command" in caplog.text


def test_a_notebook_becomes_a_page_with_what_it_printed_and_showed(hooks, tmp_path):
    picture = base64.b64encode(b"a picture").decode()
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "text"]},
        {"cell_type": "code", "source": ["f()"], "outputs": [{"output_type": "stream", "text": ["one\n", "two\n"]}]},
        {"cell_type": "code", "source": ["g()"], "outputs": [{"data": {"image/png": picture, "text/plain": ["no"]}}]},
        {"cell_type": "code", "source": ["h()"], "outputs": [{"data": {"text/plain": ["[1]"]}}]},
    ]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells}))
    text, pictures = hooks.read_notebook(tmp_path / "a.ipynb")
    code = "# Title\ntext\n\n```python\nf()\n```\n\n```text\none\ntwo\n```\n\n```python\ng()\n```\n\n![Title](a-0.png)"
    assert text == f"{code}\n\n```python\nh()\n```\n\n```text\n[1]\n```"
    assert pictures == {"a-0.png": b"a picture"}
