"""Numbers and module paths as short text for tables, pictures and messages."""

from __future__ import annotations

from collections.abc import Iterable


def human(number: float) -> str:
    """A count with three digits and a unit, such as `84.9 M`."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:
            value = number / size
            return f"{value:.{2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0}f} {unit}"
    return f"{number:,.0f}"


def size_of(count: float) -> str:
    """A number of bytes with a unit, in powers of ten, such as `1.20 MB`."""
    return f"{human(count)}{'B' if count >= 1000 else ' B'}"


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """The parts in which paths differ from each other.

    `bert.encoder.layer.0` becomes `0` among the layers of BERT. `encoder.block.0` becomes `encoder 0` beside
    `decoder.block.0` and `encoder.block.1`. A single path becomes its last number, or its last part.
    """
    paths = list(dict.fromkeys(paths))
    parts = [path.split(".") for path in paths]
    if len(paths) == 1:
        return {paths[0]: next((part for part in reversed(parts[0]) if part.isdecimal()), parts[0][-1])}
    if len({len(p) for p in parts}) == 1:
        keep = [i for i, column in enumerate(zip(*parts, strict=True)) if len(set(column)) > 1]
        return {path: " ".join(p[i] for i in keep) for path, p in zip(paths, parts, strict=True)}
    common = 0
    while len({tuple(p[: common + 1]) for p in parts}) == 1:
        common += 1
    return {path: " ".join(p[common:]) or p[-1] for path, p in zip(paths, parts, strict=True)}


def shortened(label: str, width: int) -> str:
    """Shortens a label to `width` characters. The first word, which names the block, and the end stay."""
    first = label.partition(" ")[0][: width // 2]
    return label if len(label) <= width else f"{first} …{label[len(first) + 2 - width :]}"
