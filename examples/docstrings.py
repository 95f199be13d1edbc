"""A text classification data set that needs no download: which installed library does a docstring come from?

The source files are parsed but not imported, so building the data set is quick and has no side effects. Three rules
keep the task fair: names that reveal the library are removed from the texts, texts with the same content are kept only
once, and a held-out row never comes from the same module as a training row.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from peft_sensi.utils.progress import progress_bar


# The [demo] extra installs all of these, so the rows depend only on the pinned versions.
LIBRARIES = ("networkx", "pandas", "sklearn", "sympy", "torch", "transformers")

# Parts of words that reveal a library, and import aliases that reveal it only as whole words.
_NAMES = re.compile(
    r"networkx|numpy|numarray|pandas|scipy|sklearn|scikit|sympy|torch|aten|transformer|hugging|\bhf\b", re.I
)
_ALIASES = frozenset({"nx", "np", "pd", "sp", "pt", "sm", "nn", "hub"})

# The prose of a docstring ends here: sections in numpydoc or Google style, arguments, doctests, directives, code.
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
    (re.compile(r"[`*|<>~^$\\{}\[\]#=]+(?=\s|\w|$)|(?<=\w)[`*|]+"), " "),  # markup differs between libraries
)
_SKIPPED_FOLDERS = frozenset({"test", "tests", "testing", "_vendor", "externals", "_build_utils"})


def build(train_per_class: int = 400, test_per_class: int = 100, seed: int = 0, max_words: int = 40) -> DatasetDict:
    """Builds the data set, with at most the given numbers of rows per library and of words per row.

    With the same installed versions, the rows are the same on every call.
    """
    rows: dict[str, list[dict]] = {"train": [], "test": []}
    seen: set[str] = set()
    for label, library in enumerate(progress_bar(LIBRARIES, "docstrings")):
        wanted = {"train": train_per_class, "test": test_per_class}
        for text, group in _texts(library, seed, max_words):
            # A quarter of the modules is held out. The choice depends only on the name of the module.
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


def _texts(library: str, seed: int, max_words: int) -> Iterator[tuple[str, str]]:
    """Pairs of cleaned text and module group. The modules are in a shuffled but fixed order."""
    spec = importlib.util.find_spec(library)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(f"{library} is not installed. Install the [demo] extra: pip install '.[demo]'")
    root = Path(next(iter(spec.submodule_search_locations)))
    files = [path.relative_to(root) for path in root.rglob("*.py")]
    files = [path for path in files if _SKIPPED_FOLDERS.isdisjoint(path.parts)]
    for path in sorted(files, key=lambda path: (_fraction(f"{seed}/{library}/{path.as_posix()}"), path.as_posix())):
        # Neighboring files deep in the tree (such as the files of one model) repeat each other. They form one group,
        # which is held out as a whole or not at all.
        group = ".".join((library, *path.with_suffix("").parts[:3]))
        for docstring in _docstrings(root / path):
            if text := clean(docstring, max_words=max_words):
                yield text, group


def _docstrings(path: Path) -> Iterator[str]:
    """Docstrings of public objects. Those of private helpers look alike in every library."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):  # a template, or a file for another Python version
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
    """The prose at the start of a docstring, without words that reveal its library. Empty if too little is left."""
    lines = docstring.splitlines()
    ends = [i for i, line in enumerate(lines) if _END.match(line)]
    ends += [
        i - 1 for i, line in enumerate(lines) if i and _UNDERLINE.match(line)
    ]  # the heading is removed together with its underline
    text = " ".join(lines[: min(ends, default=None)])
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    words = [word for word in text.split() if not _gives_away(word)]
    if sum(word.isalpha() for word in words) < min_words:
        return ""
    return " ".join(words[:max_words])


def _gives_away(word: str) -> bool:
    bare = word.strip(".,:;!?()\"'")
    # A dotted name starts with the package or its alias. A version number can reveal the library too.
    dotted = re.search(r"\w\.\w", bare) is not None
    return dotted or "_" in bare or _NAMES.search(bare) is not None or bare.lower() in _ALIASES


def _content_key(text: str) -> str:
    """A key that is equal for texts which differ only in names, numbers and punctuation, such as copied texts."""
    words = text.split()
    plain = [word for i, word in enumerate(words) if i == 0 or word[:1].islower()]
    return "".join(re.sub(r"[^a-z ]", "", " ".join(plain).lower()).split())


def _fraction(name: str) -> float:
    """A number in [0, 1) that depends only on the name. Unlike `hash()`, it is the same in every process."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
