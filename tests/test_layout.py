"""The order of the packages (CONTRIBUTING.md), the length of the modules and their docstrings, read with `ast`."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import peft_sensi


ROOT = Path(peft_sensi.__file__).parent
# A module may import from its own package and from packages on lower floors. `recipes` is a single module.
FLOORS = [
    {"utils"},
    {"plotting"},
    {"anatomy"},
    {"layers", "scoring"},
    {"planning"},
    {"tuner"},
    {"merging", "recipes"},
    {"reporting"},
    {"tasks"},
    {"cli"},
]
FLOOR = {package: floor for floor, packages in enumerate(FLOORS) for package in packages}
WITHOUT_TORCH = ["planning.budget", "planning.plan", "planning.packing", "planning.allocate", "planning.ladders",
                 "planning.costs", "planning.first_cut", "anatomy.latency", "anatomy.latency_points",
                 "merging.latency_graphs", "utils.timing", "cli.device", "tasks.kinds", "tasks.texts",
                 "tasks.words", "tasks.answers", "tasks.metrics", "tasks.sources",
                 "tasks.encodings", "tasks.reading"]  # fmt: skip
LONGEST_FILE = 350

# By the name of the module, without `peft_sensi.`; a package has the name of its folder.
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
    if path != ROOT / "__init__.py"
}


def imported(module: str) -> set[str]:
    """The modules of peft_sensi that a module imports, also inside of functions and for type checking only."""
    path, found = FILES[module], set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                parts = package.split(".") if package else []
                above = parts[: len(parts) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            elif (node.module or "").split(".")[0] == "peft_sensi":
                base = (node.module or "").partition(".")[2]
            else:
                continue
            names = [f"{base}.{alias.name}".strip(".") for alias in node.names]
            found |= {name if name in FILES else base for name in names}
        elif isinstance(node, ast.Import):
            found |= {a.name.partition(".")[2] for a in node.names if a.name.split(".")[0] == "peft_sensi"}
    return found - {module}


GRAPH = {module: imported(module) for module in FILES}


def package_of(module: str) -> str:
    return module.split(".")[0]


def test_imports_are_found():
    assert "utils.errors" in GRAPH["utils.checks"]
    assert "tuner.config" in GRAPH["recipes"]


def test_only_known_packages():
    assert {package_of(module) for module in FILES} == set(FLOOR)
    visible = [p for p in ROOT.iterdir() if p.name not in ("__pycache__", "py.typed")]
    assert len(visible) <= 13, sorted(p.name for p in visible)


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_point_down(module):
    own = package_of(module)
    for other in sorted(GRAPH[module]):
        if not other:
            assert module == "cli.terminal", f"{module} imports the top of the package, which imports everything"
            continue
        package = package_of(other)
        assert package == own or FLOOR[package] < FLOOR[own], f"{module} imports {other}"


def test_no_circles():
    left = {module: set(needs) & set(FILES) for module, needs in GRAPH.items()}
    while free := {module for module, needs in left.items() if not needs}:
        left = {module: needs - free for module, needs in left.items() if module not in free}
    assert not left, f"these modules import each other in a circle: {sorted(left)}"


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_planning_is_arithmetic(module):
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [name for name in names if name.split(".")[0] == "torch"]


@pytest.mark.parametrize("module", sorted(FILES))
def test_files_are_short(module):
    assert len(FILES[module].read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE


@pytest.mark.parametrize("module", sorted(FILES))
def test_modules_have_docstrings(module):
    text = ast.get_docstring(ast.parse(FILES[module].read_text(encoding="utf-8"))) or ""
    assert text and "TODO" not in text
