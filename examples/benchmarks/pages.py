"""Generated parts of Markdown pages."""

from __future__ import annotations

from pathlib import Path

from peft_sensi.utils.files import write_atomically


def write_part(page: Path, name: str, text: str) -> None:
    """Replaces the text between `<!-- name: begin -->` and `<!-- name: end -->`. A missing page is created.

    Raises:
        ValueError: The page does not have the two markers.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, after = "", "\n"
    if page.exists():
        content = page.read_text(encoding="utf-8")
        if begin not in content or end not in content:
            raise ValueError(
                f"{page} does not have the markers {begin!r} and {end!r}. Add them where the table should be."
            )
        before, _, rest = content.partition(begin)
        after = rest.partition(end)[2]
    content = f"{before}{begin}\n{text}\n{end}{after}"
    write_atomically(page, lambda file: Path(file).write_text(content, encoding="utf-8"))
