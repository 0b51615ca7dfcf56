"""`firesteel cache …`: what is kept beside models, and clearing it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from firesteel.finding import size as shown_size
from firesteel.sdk.errors import ConfigError

if TYPE_CHECKING:
    from training.utils.caches import CacheEntry, Cleared

app = typer.Typer(help="List and clear caches.", no_args_is_help=True, rich_markup_mode=None)
_Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


@app.command("list")
def list_all(as_json: _Json = False) -> None:
    """Show what is kept under FIRESTEEL_HOME: caches, and what is none."""
    from firesteel.store import home
    from training.utils.caches import list_caches, list_kept

    entries, kept = list_caches(), list_kept()
    if as_json:
        content = {"home": str(home()), "entries": [*map(asdict, entries)], "kept": [*map(asdict, kept)]}
        typer.echo(json.dumps(content, indent=1))
        return
    cells = [("CACHE", "SIZE", "AGE", "WHAT")]
    cells += [
        (entry.kind, shown_size(entry.bytes), f"{entry.age_days:.1f} d", _holds(entry)) for entry in entries
    ]
    cells += [("-", shown_size(each.bytes), "-", f"{each.path}: {each.what}") for each in kept]
    widths = [max(len(line[column]) for line in cells) for column in range(3)]
    for kind, size, age, what in cells:
        typer.echo(f"{kind:{widths[0]}}  {size:>{widths[1]}}  {age:>{widths[2]}}  {what}")
    total = sum(entry.bytes for entry in entries)
    typer.echo(f"{shown_size(total)} of caches in {home()}; `firesteel cache clear` frees what no run uses")


@app.command()
def clear(
    what: Annotated[
        list[str] | None,
        typer.Argument(help="references, rows, tokenizers or leftovers [default: all].", show_default=False),
    ] = None,
    older_than: Annotated[
        float | None, typer.Option(min=0, metavar="DAYS", help="Only what was written before so many days.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: _Json = False,
) -> None:
    """Clear caches; the next run makes again what it needs, with the same numbers. What a run uses stays."""
    from training.utils.caches import KINDS, clear, list_caches

    if unknown := sorted(set(what or []) - set(KINDS)):
        raise ConfigError(f"{', '.join(unknown)}: no cache of that name; there is {', '.join(KINDS)}")
    entries = [entry for entry in list_caches() if not what or entry.kind in what]
    chosen = [entry for entry in entries if entry.age_days >= (older_than or 0)]
    if not yes and chosen:
        parts = ", ".join(f"{count} {kind}" for kind, count in Counter(e.kind for e in chosen).items())
        typer.confirm(
            f"clear {parts}, {shown_size(sum(entry.bytes for entry in chosen))}?", abort=True, err=True
        )
    done = list(clear(chosen))
    younger = len(entries) - len(chosen)
    if as_json:
        content = {"cleared": [*map(asdict, done)], "freed": sum(c.freed for c in done), "younger": younger}
        typer.echo(json.dumps(content, indent=1))
        return
    _say(done, younger)


def _say(done: list[Cleared], younger: int) -> None:
    for each in done:
        what = f"stays: {each.stays_because}" if each.stays_because else "cleared"
        typer.echo(f"{each.entry.kind}: {each.entry.path}: {what}")
    stay = f"; {younger} were written since, and stay" if younger else ""
    typer.echo(f"{shown_size(sum(each.freed for each in done))} freed{stay}")


def _holds(entry: CacheEntry) -> str:
    return f"{entry.path}: {entry.holds}{', in use' if entry.in_use else ''}"
