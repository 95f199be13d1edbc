"""Generated parts of Markdown pages."""

from __future__ import annotations

from pathlib import Path


def write_part(page: Path, name: str, text: str) -> None:
    """Replaces what is between `<!-- name: begin -->` and `<!-- name: end -->`; a page that is missing is made.

    Raises `ValueError` for a page without the two marks.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, after = "", "\n"
    if page.exists():
        content = page.read_text()
        if begin not in content or end not in content:
            raise ValueError(f"{page} has no part between {begin!r} and {end!r} that could be written anew.")
        before, _, rest = content.partition(begin)
        after = rest.partition(end)[2]
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}")
