"""`firesteel …`: the verbs, and the one place where errors become lines for people and codes for scripts.

Exit codes: 0 done; 1 failed for a reason that is not the caller's; 2 the caller can mend it (the text says
how, or the command line itself was wrong); 130 interrupted. A traceback means a bug.

A verb is a module in this folder, registered below. Modules here import torch, transformers and rich inside
the functions that need them, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import firesteel
from firesteel.cli import cache, data, doctor, keys, models, recipes, report, runs, sample, serve
from firesteel.sdk.errors import FiresteelError, UserError

app = typer.Typer(
    name="firesteel",
    help="Train language models from preferences, on your own machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a bug's traceback as Python prints it, to be copied into a report
    rich_markup_mode=None,  # plain help: importing rich takes longer than all the rest
)

# The verbs, in the order of `firesteel --help`.
recipes.register(app)
app.command("sample")(sample.sample)
app.command("report")(report.report)
app.add_typer(data.app, name="data")
app.command("export")(runs.export)
app.add_typer(runs.app, name="runs")
app.add_typer(models.app, name="models")
app.add_typer(cache.app, name="cache")
app.command("doctor")(doctor.doctor)
app.command("serve")(serve.serve)
app.command("ps")(serve.ps)
app.add_typer(keys.app, name="keys")


def run() -> None:
    """The entry point of the `firesteel` command."""
    try:
        app(prog_name="firesteel")
    except FiresteelError as error:
        typer.echo(f"error[{error.code}]: {error}", err=True)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"firesteel {firesteel.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Options of the command itself."""


if __name__ == "__main__":
    run()
