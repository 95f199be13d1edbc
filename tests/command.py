"""Runs the command `peft-sensi` in this process, as on a terminal of 80 columns without colors.

The bootstrap of the metrics has a tenth of its resamples: it takes most of the time of an evaluation of a few rows.
`tests/test_tasks.py` tests the intervals.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

from typer.testing import CliRunner

from peft_sensi.cli.commands import app
from peft_sensi.tasks import metrics


def run(*arguments: Any, **environment: str) -> Any:
    runner = CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb", **environment})
    with patch.object(metrics, "RESAMPLES", metrics.RESAMPLES // 10):
        return runner.invoke(app, [str(argument) for argument in arguments], prog_name="peft-sensi")


def call(*arguments: Any) -> str:
    """What a command that succeeds prints on stdout."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(*arguments: Any, status: int = 1) -> str:
    """What a command that fails with this exit status prints, in one line."""
    result = run(*arguments)
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())
