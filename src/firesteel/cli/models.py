"""`firesteel models …`: what the catalogue offers, what is on this machine, fetching it and letting it go."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from firesteel import removal, store
from firesteel.catalog import Catalog, load_catalog
from firesteel.fetching import shown_on_stderr
from firesteel.finding import size as shown_size
from firesteel.sdk.errors import ModelError

app = typer.Typer(help="List, fetch and remove models.", no_args_is_help=True, rich_markup_mode=None)


@dataclass(frozen=True)
class ModelRow:
    """One line of `firesteel models list`. `size` is in bytes, `problem` says why a model is unusable."""

    name: str
    source: str
    status: Literal["ready", "not fetched", "unusable", "left over"]
    path: str | None = None
    size: int | None = None
    problem: str | None = None


@app.command("list")
def list_models(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list, for scripts.")] = False,
) -> None:
    """Show the catalogue's models, all others that were fetched, and what killed fetches have left."""
    rows = [*_rows(load_catalog()), *map(_leftover_row, removal.leftovers())]
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=1))
        return
    cells = [("NAME", "SOURCE", "SIZE", "WHERE")]
    for row in rows:
        state = row.path if row.status == "ready" else row.problem or row.status
        cells.append((row.name, row.source, "-" if row.size is None else shown_size(row.size), str(state)))
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


@app.command()
def rm(
    name: Annotated[str, typer.Argument(help="Catalogue name, Hugging Face id, or folder in the store.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Remove a fetched model; whoever needs it later fetches it again. Folders of your own are never touched."""
    catalog = load_catalog()
    folders = removal.folders_of(name, catalog)
    names = {folder.name for folder in folders}
    left = [leftover for leftover in removal.leftovers() if leftover.of in names]
    others = [other for other in _names_of(names, catalog) if other != name]
    if not yes:
        size = shown_size(sum(map(store.size_below, [*folders, *(leftover.path for leftover in left)])))
        shared = f" It is the model of {', '.join(others)}, too." if others else ""
        where = ", ".join(map(str, folders))
        typer.confirm(f"remove {name}, {size}, in {where}?{shared}", abort=True, err=True)
    half = sum(map(removal.remove_leftover, left))
    removed = [removal.remove(folder, name) for folder in folders]
    freed, elsewhere = half + sum(r.freed for r in removed), sum(r.kept_elsewhere for r in removed)
    if as_json:
        content = {"removed": [r.path for r in removed], "freed": freed, "kept_elsewhere": elsewhere}
        typer.echo(json.dumps({**content, "also_named": others}, indent=1))
        return
    for each in removed:
        typer.echo(f"removed {each.path}")
    stays = (
        f", {shown_size(elsewhere)} stay in the Hugging Face cache, which has the same files"
        if elsewhere
        else ""
    )
    typer.echo(f"{shown_size(freed)} freed{stays}")


def _names_of(folders: set[str], catalog: Catalog) -> Iterator[str]:
    """The catalogue's names for what is in these folders of the store."""
    for name in catalog.models:
        try:
            entry = catalog.resolve_model(name)
            if entry.kind != "folder" and store.where(entry).name in folders:
                yield name
        except ModelError:
            continue  # an entry that leads nowhere leads to none of these


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


def _leftover_row(leftover: removal.Leftover) -> ModelRow:
    path = leftover.path
    problem = f"{path}: of a fetch that was killed; `firesteel cache clear leftovers` removes it"
    return ModelRow(leftover.of, "?", "left over", str(path), store.size_below(path), problem)
