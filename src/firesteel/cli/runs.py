"""`firesteel runs …` and `firesteel export`: what runs have left, and their weights for other programs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from training.utils.runs import RunRow

app = typer.Typer(help="List, show and delete runs.", no_args_is_help=True, rich_markup_mode=None)
_Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


@app.command("list")
def list_runs(
    folder: Annotated[Path, typer.Argument(help="Where to look, some levels deep.")] = Path("runs"),
    as_json: _Json = False,
) -> None:
    """Show the runs below a folder."""
    from training.utils.runs import row_of, runs_below

    rows = [row_of(path) for path in runs_below(folder)]
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=1))
        return
    cells = [("RUN", "STATE", "STEP", "CHECKPOINTS", "SIZE", "MODEL")]
    cells += [_cells(row) for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(6)]
    for line in cells:
        typer.echo("  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())


@app.command()
def show(run: Annotated[Path, typer.Argument(help="Folder of the run.")], as_json: _Json = False) -> None:
    """Show one run: how far it has come, its last metrics, its checkpoints."""
    from training.utils.runs import row_of

    row = asdict(row_of(run))
    if as_json:
        typer.echo(json.dumps(row, indent=1))
        return
    last = row.pop("last")
    for name, value in (*row.items(), *last.items()):
        typer.echo(f"{name:<24} {value}")


@app.command()
def rm(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: _Json = False,
) -> None:
    """Delete a run, checkpoints and earlier runs in its folder included; other files in it stay."""
    from training.utils.runs import remove_run, row_of

    row = row_of(run)
    if not yes:
        typer.confirm(
            f"delete {row.path}, {row.bytes / 1e6:,.1f} MB, {len(row.checkpoints)} checkpoints?",
            abort=True,
            err=True,
        )
    remove_run(run)
    typer.echo(json.dumps({"deleted": row.path}) if as_json else f"deleted {run}")


def export(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")],
    form: Annotated[
        Literal["peft", "merged"] | None,
        typer.Option("--format", help="The adapter alone, or a whole model; default: what was trained."),
    ] = None,
    step: Annotated[int | None, typer.Option(help="Of this step's checkpoint; default: the newest.")] = None,
    to: Annotated[Path | None, typer.Option(help="New folder; default: in the run's `exports/`.")] = None,
) -> None:
    """Write a run's weights for peft, transformers or vLLM, and print the folder."""
    from training.utils.export import export as export_weights

    typer.echo(export_weights(run, form, step, to))


def _cells(row: RunRow) -> tuple[str, str, str, str, str, str]:
    kept = f"{len(row.checkpoints)}, last {row.checkpoints[-1]}" if row.checkpoints else "-"
    model = f"{row.base_model}, rank {row.lora_rank}" if row.lora_rank else row.base_model
    return row.path, row.state, str(row.step), kept, f"{row.bytes / 1e6:,.1f} MB", model
