"""Runs the command `peft-sensi` in this process, as on a terminal of 80 columns without colors."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from peft_sensi.cli.commands import app


def run(*arguments: Any, **environment: str) -> Any:
    runner = CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb", **environment})
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
