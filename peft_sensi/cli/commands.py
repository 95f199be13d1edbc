"""The commands of `peft-sensi`, put together: name, function and example of each."""

from __future__ import annotations

import shutil
from functools import partial
from importlib.metadata import version as version_of
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from . import adapter_commands, base_commands, measure, prediction_commands, sweep, training_commands
from .arguments import with_debug
from .terminal import one_line_errors


class PlainHelp:
    """Without a text, typer would show `<bool>` beside --help, as if it took a value."""

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)  # type: ignore[misc]
        if option is not None:
            option.metavar = ""
        return option


class Command(PlainHelp, TyperCommand):
    def format_help(self, ctx: Any, formatter: Any) -> None:
        columns = shutil.get_terminal_size().columns
        if columns < 80:  # boxes would cut the names of options
            self.rich_markup_mode = None
            formatter.width = columns - 2  # click would use at least 50
        if columns < 60:  # each text in the line below its option
            formatter.write_dl = partial(formatter.write_dl, col_max=8)
        super().format_help(ctx, formatter)


class Group(PlainHelp, TyperGroup):
    pass


app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Fine-tune and trim transformers under a budget: rank heads and neurons, then tune, freeze or trim them.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"peft-sensi {version_of('peft-sensi')}")
        raise typer.Exit()


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", metavar="", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# Several processes can run these together. Ranking is a part of training.
TRAINING = (base_commands.plan, training_commands.train, training_commands.trim, sweep.sweep)
# The order is that of `peft-sensi --help`.
for function, example in (
    (base_commands.plan, "plan bert-base-uncased --data train.tsv --budget 0.5"),
    (training_commands.train, "train bert-base-uncased --data train.tsv --budget 0.5 --out adapter"),
    (training_commands.trim, "trim my-finetuned-model --data train.tsv --budget 0.5 --heal-epochs 1 --out adapter"),
    (sweep.sweep, "sweep bert-base-uncased --data train.tsv --budgets 0.75 0.5 0.25 --out sweep"),
    (prediction_commands.predict, "predict adapter new.csv --out predictions.csv"),
    (prediction_commands.evaluate, "evaluate adapter test.csv"),
    (prediction_commands.compare, "compare adapter-1 adapter-2 --data test.csv"),
    (measure.measure, "measure bert-base-uncased --batch-size 1 --sequence-length 128 --threads 1 --out table.json"),
    (adapter_commands.inspect, "inspect adapter --json"),
    (adapter_commands.check, "check adapter --base my-copy-of-the-base"),
    (adapter_commands.merge, "merge adapter small-model"),
    (adapter_commands.export, "export adapter model.onnx"),
    (adapter_commands.card, "card adapter --results metrics.json --license apache-2.0"),
    (adapter_commands.push, "push adapter me/my-adapter --private"),
    (base_commands.list_recipes, "recipes --json"),
):
    # Lines inside of a paragraph would be kept as they are in the source.
    text = "\n\n".join(" ".join(part.split()) for part in (function.__doc__ or "").split("\n\n"))
    loads, trains = function is not base_commands.list_recipes, function in TRAINING
    app.command(example.split()[0], cls=Command, help=text, epilog=f"Example: peft-sensi {example}")(
        with_debug(one_line_errors(function, loads, trains))
    )
