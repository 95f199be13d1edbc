"""A text-classification set that needs no download: which installed library does a docstring come from?

The sources are parsed, never imported, so building the set is quick and has no side effects. Three things keep the
task honest: names that give the answer away are taken out of the text, texts that say the same thing are kept once,
and a held-out row never shares a module with a training row.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value


# All of these come with the [demo] extra: the rows depend on the pinned versions, not on what else is installed.
LIBRARIES = ("networkx", "pandas", "sklearn", "sympy", "torch", "transformers")

# Parts of words that name a library, and import aliases that do so only as whole words.
_NAMES = re.compile(
    r"networkx|numpy|numarray|pandas|scipy|sklearn|scikit|sympy|torch|aten|transformer|hugging|\bhf\b", re.I
)
_ALIASES = frozenset({"nx", "np", "pd", "sp", "pt", "sm", "nn", "hub"})

# Where the prose of a docstring ends: sections in the numpydoc or Google style, arguments, doctests, directives, code.
_SECTION_WORDS = (
    "args arguments attributes example examples keyword note notes parameters params raises reference references"
    " return returns see usage warning warnings warns yield yields"
)
_END = re.compile(
    rf"^\s*(>>>|\.\. |```|read more in the|[`*]*\w+[`*]* ?\(.*\) ?:"
    rf"|(?:{'|'.join(_SECTION_WORDS.split())})(?: also| arguments| args)?\s*:{{0,2}}\s*$)",
    re.I,
)
_UNDERLINE = re.compile(r"^\s*[-=~*]{3,}\s*$")
_MARKUP = (
    (re.compile(r":[\w:+.-]+:`~?([^`<]+)[^`]*`"), r" \1 "),  # :class:`~a.B` -> a.B
    (re.compile(r"\[([^\]]*)\]\([^)]*\)"), r" \1 "),  # [text](link) -> text
    (re.compile(r"https?://\S+|\S+@\S+"), " "),
    (re.compile(r"[`*|<>~^$\\{}\[\]#=]+(?=\s|\w|$)|(?<=\w)[`*|]+"), " "),  # the markup dialect differs by library
)
_SKIPPED_FOLDERS = frozenset({"test", "tests", "testing", "_vendor", "externals", "_build_utils"})


def build(train_per_class: int = 400, test_per_class: int = 100, seed: int = 0) -> DatasetDict:
    """At most this many rows of each library, the same ones on every call with the same versions installed."""
    rows: dict[str, list[dict]] = {"train": [], "test": []}
    seen: set[str] = set()
    for label, library in enumerate(LIBRARIES):
        wanted = {"train": train_per_class, "test": test_per_class}
        for text, group in _texts(library, seed):
            # A share of the modules, a little over that of the rows, is held out before any row is looked at.
            split = "test" if _fraction(f"{seed}/{group}") < 0.25 else "train"
            key = _content_key(text)
            if not wanted[split] or key in seen:
                continue
            seen.add(key)
            wanted[split] -= 1
            rows[split].append({"text": text, "label": label, "module": group})
            if not any(wanted.values()):
                break
    features = Features(
        {"text": Value("string"), "label": ClassLabel(names=list(LIBRARIES)), "module": Value("string")}
    )
    return DatasetDict({split: Dataset.from_list(found, features=features) for split, found in rows.items()})


def _texts(library: str, seed: int) -> Iterator[tuple[str, str]]:
    """Cleaned (text, module group) pairs, the modules in an order that is mixed but fixed."""
    spec = importlib.util.find_spec(library)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(f"{library} is not installed; the demo needs the [demo] extra")
    root = Path(next(iter(spec.submodule_search_locations)))
    files = [path.relative_to(root) for path in root.rglob("*.py")]
    files = [path for path in files if _SKIPPED_FOLDERS.isdisjoint(path.parts)]
    for path in sorted(files, key=lambda path: (_fraction(f"{seed}/{library}/{path.as_posix()}"), path.as_posix())):
        # Siblings deep in the tree (the files of one model, say) repeat each other: they go to one side of the split.
        group = ".".join((library, *path.with_suffix("").parts[:3]))
        for docstring in _docstrings(root / path):
            if text := clean(docstring):
                yield text, group


def _docstrings(path: Path) -> Iterator[str]:
    """Docstrings of what is public; the notes on private helpers read alike in every library."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):  # templates, and files for other Python versions
        return
    pending: list[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef] = [tree]
    while pending:
        node = pending.pop()
        if docstring := ast.get_docstring(node):
            yield docstring
        if isinstance(node, ast.Module | ast.ClassDef):
            inner = [
                child
                for child in node.body
                if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            ]
            pending.extend(child for child in inner if not child.name.startswith("_"))


def clean(docstring: str, min_words: int = 12, max_words: int = 40) -> str:
    """The prose a docstring starts with, without what names its library; empty when too little is left."""
    lines = docstring.splitlines()
    ends = [i for i, line in enumerate(lines) if _END.match(line)]
    ends += [
        i - 1 for i, line in enumerate(lines) if i and _UNDERLINE.match(line)
    ]  # the heading goes with its underline
    text = " ".join(lines[: min(ends, default=None)])
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    words = [word for word in text.split() if not _gives_away(word)]
    if sum(word.isalpha() for word in words) < min_words:
        return ""
    return " ".join(words[:max_words])


def _gives_away(word: str) -> bool:
    bare = word.strip(".,:;!?()\"'")
    # A dotted name starts with the package or its alias; a version number dates a library.
    dotted = re.search(r"\w\.\w", bare) is not None
    return dotted or "_" in bare or _NAMES.search(bare) is not None or bare.lower() in _ALIASES


def _content_key(text: str) -> str:
    """Equal for texts that differ in names, numbers and punctuation only, as copies in sibling modules do."""
    words = text.split()
    plain = [word for i, word in enumerate(words) if i == 0 or word[:1].islower()]
    return "".join(re.sub(r"[^a-z ]", "", " ".join(plain).lower()).split())


def _fraction(name: str) -> float:
    """A number in [0, 1) that depends on the name only: unlike hash(), the same in every process."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
