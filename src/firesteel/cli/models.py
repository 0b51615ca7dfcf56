"""`firesteel models …`: what the catalogue offers, what is on this machine, and fetching it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from firesteel import store
from firesteel.catalog import Catalog, load_catalog
from firesteel.fetching import shown_on_stderr
from firesteel.sdk.errors import ModelError

app = typer.Typer(help="List and fetch models.", no_args_is_help=True, rich_markup_mode=None)


@dataclass(frozen=True)
class ModelRow:
    """One line of `firesteel models list`. `size` is in bytes, `problem` says why a model is unusable."""

    name: str
    source: str
    status: Literal["ready", "not fetched", "unusable"]
    path: str | None = None
    size: int | None = None
    problem: str | None = None


@app.command("list")
def list_models(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list, for scripts.")] = False,
) -> None:
    """Show the catalogue's models and all others that were fetched."""
    rows = list(_rows(load_catalog()))
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=1))
        return
    cells = [("NAME", "SOURCE", "SIZE", "WHERE")]
    for row in rows:
        state = row.path if row.status == "ready" else row.problem or row.status
        cells.append((row.name, row.source, _human(row.size), str(state)))
    widths = [max(len(line[column]) for line in cells) for column in range(3)]
    for name, source, size, state in cells:
        typer.echo(f"{name:{widths[0]}}  {source:{widths[1]}}  {size:>{widths[2]}}  {state}")


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="Catalogue name, Hugging Face id, folder or .gguf file.")],
    force: Annotated[bool, typer.Option("--force", help="Fetch anew even if it is here.")] = False,
) -> None:
    """Fetch a model, or check every byte of one that is here, and print its folder."""
    entry = load_catalog().resolve_model(name)
    with shown_on_stderr(name) as progress:
        here = None if force else store.find(entry)
        folder = here or store.fetch(entry, progress, force=force)
        if here and entry.kind != "folder":
            store.verify(here, entry.name, progress)
    typer.echo(folder)


def _rows(catalog: Catalog) -> Iterator[ModelRow]:
    """The catalogue's models, then those fetched by an id or path, or for an entry that has changed since."""
    seen = set()
    for name in catalog.models:
        row = _catalogue_row(catalog, name)
        seen.add(row.path)
        yield row
    for folder in store.stored():
        if str(folder) not in seen:
            yield _stored_row(folder)


def _catalogue_row(catalog: Catalog, name: str) -> ModelRow:
    source = catalog.models[name].source
    try:
        folder = store.find(catalog.resolve_model(name))
    except ModelError as error:
        return ModelRow(name, source, "unusable", problem=str(error))
    if folder is None:
        return ModelRow(name, source, "not fetched")
    return ModelRow(name, source, "ready", str(folder), store.size_on_disk(folder))


def _stored_row(folder: Path) -> ModelRow:
    try:
        manifest = store.check(folder)
    except ModelError as error:
        return ModelRow(folder.name, "?", "unusable", str(folder), store.size_on_disk(folder), str(error))
    return ModelRow(manifest.name, manifest.source, "ready", str(folder), store.size_on_disk(folder))


def _human(size: int | None) -> str:
    if size is None:
        return "-"
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
