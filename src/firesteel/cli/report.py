"""`firesteel report RUN…`: a page of what runs came to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    to: Annotated[
        Path | None,
        typer.Option(help="The file; default: report.html in the run's folder, of several runs in this one."),
    ] = None,
) -> None:
    """Write a page of a run, or of several beside each other, and print where it is."""
    from training.utils.report import write_report

    typer.echo(write_report(runs, to))
