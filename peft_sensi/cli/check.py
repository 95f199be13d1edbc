"""The command `check`."""

from __future__ import annotations

import typer
from rich.text import Text

from ..reporting.tables import records_table
from . import arguments as args
from .terminal import print_result, step


def check(
    adapter: args.AdapterOrMerged, base: args.Base = None, json: args.Json = False, debug: args.Debug = False
) -> None:
    """Check an adapter or a merged model. The exit status is 1 if something is wrong.

    Checked are the files (do they belong together, are all values finite), the versions, the tokenizer, the base of an
    adapter (is it the one that the adapter was made for), and the outputs for one batch.
    """
    from ..reporting.checking import WRONG, check_saved

    with step("checking", show=not json):
        findings = list(check_saved(adapter, base))
    wrong = [finding for finding in findings if finding.status == WRONG]
    table = records_table(
        ["checked", "result", ""], [[finding.what, finding.status, finding.text] for finding in findings]
    )
    verdict = f"{len(wrong)} of {len(findings)} checks failed." if wrong else "Nothing is wrong."
    print_result(json, {"ok": not wrong, "findings": [f.to_dict() for f in findings]}, table, Text(verdict))
    if wrong:
        raise typer.Exit(1)
