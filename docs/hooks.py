"""Hooks of MkDocs: files from outside of `docs/` become pages of the site, and links between all pages work.

The pages are written for GitHub, where links are relative to the file. The site has other addresses: `README.md` is
its start page, and `peft_sensi/tuner/FORMAT.md` is beside the other pages. So links to files of the repository are
rewritten here. A link to a file that the site does not have stays as it is, and MkDocs then reports it.
"""

from __future__ import annotations

import base64
import json
import os
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files


LOG = get_plugin_logger("hooks")  # its warnings are errors of a strict build
ROOT = Path(__file__).resolve().parents[1]
# Files of the repository, and their addresses in the site.
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "SECURITY.md": "security.md",
    "peft_sensi/tuner/FORMAT.md": "format.md",
    "hub_cards/README.md": "cards.md",
    "CITATION.cff": "CITATION.cff",
}
NOTEBOOK, NOTEBOOK_PAGE = ROOT / "examples" / "tour.ipynb", "tour.md"
# The target of a Markdown link, or of an image or link in HTML; without its anchor. Addresses with a scheme are left.
TARGET = re.compile(
    r'(?<=\]\()[^)#:\s]+(?=[)#])|(?<=src=")[^":]+(?=")|(?<=srcset=")[^":]+(?=")'
)
# Marks for the tests after the language of a block, such as `no-run`. GitHub ignores them; MkDocs would see no block.
MARK = re.compile(r"^(```\w+) .*$", re.M)
# Code, which stays as it is, or a formula between dollar signs, as GitHub shows it.
FORMULA = re.compile(
    r"^```.*?^```|`[^`\n]+`|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$\n]+)\$", re.S | re.M
)
PLACEHOLDER = re.compile(r"formula(block|inline)x([0-9a-f]+)z")
# Docstrings name public objects as Hugging Face's do: [`SensiConfig`].
REFERENCE = re.compile(r"\[<code>(\w+)</code>\]")


def on_files(files: Files, config: Any) -> Files:
    for source, address in OUTSIDE.items():
        files.append(File.generated(config, address, abs_src_path=str(ROOT / source)))
    for path in sorted(
        (ROOT / "examples").glob("*.py")
    ):  # not pages: a link shows the file itself
        files.append(
            File.generated(config, f"examples/{path.name}", abs_src_path=str(path))
        )
    text, pictures = read_notebook(NOTEBOOK)
    for address, content in {NOTEBOOK_PAGE: text, **pictures}.items():
        files.append(File.generated(config, address, content=content))
    return files


def read_notebook(path: Path) -> tuple[str, dict[str, bytes]]:
    """The cells of a notebook and what they printed as Markdown, and the pictures that they showed by file name.

    The text for those who cannot see a picture is the heading above it.
    """
    parts, pictures, heading = [], {}, ""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            heading = ([heading] + re.findall(r"^#+ (.+)$", source, re.M))[-1]
        parts.append(
            source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```"
        )
        printed, shown = "", []
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}-{len(pictures)}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                shown.append(f"![{heading}]({name})")
            else:
                printed += "".join(output.get("text") or data.get("text/plain") or ())
        parts += [f"```text\n{printed.rstrip()}\n```"] if printed else []
        parts += shown
    return "\n\n".join(parts), pictures


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    addresses = {file.abs_src_path: file.src_uri for file in files if file.abs_src_path}
    addresses[str(NOTEBOOK)] = NOTEBOOK_PAGE
    text = with_links_of_site(
        markdown, page.file.abs_src_path or str(NOTEBOOK), addresses
    )
    return FORMULA.sub(with_placeholder, MARK.sub(r"\1", text))


def with_placeholder(match: re.Match[str]) -> str:
    """A word in place of a formula, in which Markdown would find marks. Code stays as it is."""
    kind = match.lastgroup
    return match[0] if kind is None else f"formula{kind}x{match[kind].encode().hex()}z"


def formula(match: re.Match[str]) -> str:
    """The formula of a placeholder as MathML, which browsers show without a script."""
    result = convert(bytes.fromhex(match[2]).decode(), display=match[1])
    if unknown := re.search(r"\\\w+", result):
        LOG.warning(f"A formula has the unknown command {unknown[0]}.")
    return result


def with_links_of_site(markdown: str, source: str, addresses: dict[str, str]) -> str:
    """The text of the file `source` with links that hold in the site, where each file has the address given."""

    def address(match: re.Match[str]) -> str:
        target = addresses.get(
            os.path.normpath(os.path.join(os.path.dirname(source), match[0]))
        )
        folder = os.path.dirname(addresses[source]) or "."
        return match[0] if target is None else os.path.relpath(target, folder)

    return TARGET.sub(address, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    html = PLACEHOLDER.sub(formula, html)
    if "```" in re.sub(r"<(pre|code)\b.*?</\1>", "", html, flags=re.S):
        LOG.warning(
            f"{page.file.src_uri}: a block of code is not recognized, and what follows is wrong."
        )

    def link(match: re.Match[str]) -> str:
        anchor = f"peft_sensi.{match[1]}"
        code = f"<code>{match[1]}</code>"
        return f'<a href="#{anchor}">{code}</a>' if f'id="{anchor}"' in html else code

    return REFERENCE.sub(link, html)
