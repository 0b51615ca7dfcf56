"""Letting go of what the store holds: models and tokenizers that nobody uses, and what killed fetches have left."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from firesteel.catalog import Catalog
from firesteel.sdk.errors import ModelError
from firesteel.sealed import remove_unless_used
from firesteel.store import read_manifest, shelves, size_below, stored, stored_tokenizers, where


@dataclass(frozen=True)
class Removed:
    """A folder that was removed from the store."""

    path: str
    freed: int
    """Bytes that the disk has again."""
    kept_elsewhere: int
    """Bytes that it has not: the same files have another name, in the Hugging Face cache."""


def folders_of(name: str, catalog: Catalog) -> list[Path]:
    """What the store holds of a model: weights, or the tokenizer alone, by name or by its folder in the store.

    Raises ModelError where that is nothing, and for what is not the store's: a user's folder is only referred to.
    """
    path = Path(name).expanduser().absolute()
    if path.parent.resolve() in [parent.resolve() for parent in shelves()] and _is_kept(path):
        return [path]
    by_folder = [folder for folder in (*stored(), *stored_tokenizers()) if folder.name == name]
    return list(filter(_is_kept, by_folder)) or _folders_of_entry(name, catalog) or _folders_named(name)


def _folders_of_entry(name: str, catalog: Catalog) -> list[Path]:
    try:
        entry = catalog.resolve_model(name)
        folder = where(entry)
    except ModelError:
        if _folders_named(name):
            return []
        raise
    if entry.kind == "folder":
        raise ModelError(
            f"model {name!r} is the folder {folder}, which the store only refers to; it is yours, and stays"
        )
    found = [shelf / folder.name for shelf in shelves() if _is_kept(shelf / folder.name)]
    if not found and not _folders_named(name):
        raise ModelError(f"model {name!r} is not in the store: nothing of it was fetched")
    return found


def _folders_named(name: str) -> list[Path]:
    """Models that were fetched by this name, which may be another one's today."""
    found = []
    for folder in stored():
        try:
            if read_manifest(folder).name == name:
                found.append(folder)
        except ModelError:
            continue  # damaged: it can be named by its folder
    return found


def remove(folder: Path, name: str) -> Removed:
    """Remove a folder of the store. Raises ModelError while it is fetched, or a trainer has it loaded."""
    files = [path.stat() for path in folder.rglob("*") if path.is_file()]
    only_here = sum(file.st_size for file in files if file.st_nlink == 1)
    with _unless_held(folder) as free:
        if not free:
            raise ModelError(f"model {name!r} is being fetched into {folder} by another process; wait for it")
        if not remove_unless_used(folder):
            raise ModelError(
                f"model {name!r} is in use: a run or a server has {folder} loaded; end that first"
            )
    return Removed(str(folder), only_here, sum(file.st_size for file in files) - only_here)


def remove_unless_fetched(folder: Path) -> bool:
    """Remove a tokenizer that was fetched, unless a process is fetching it; whether it was removed."""
    with _unless_held(folder) as free:
        return free and remove_unless_used(folder)


@dataclass(frozen=True)
class Leftover:
    """What a killed process has left half fetched."""

    path: Path
    of: str
    """The folder that it was to become."""


def leftovers() -> list[Leftover]:
    """Half-fetched folders that nobody is at work on."""
    return [
        Leftover(path, path.name.removeprefix(".partial-").rpartition("-")[0])
        for shelf in shelves()
        for path in sorted(shelf.glob(".partial-*"))
        if not is_being_fetched(path)
    ]


def is_being_fetched(partial: Path) -> bool:
    """Whether a process is at work on a half-fetched folder."""
    with _unless_held(_target_of(partial)) as free:
        return not free


def remove_leftover(leftover: Leftover) -> int:
    """Remove it, unless somebody is at work on it after all; how many bytes that freed."""
    before = size_below(leftover.path)
    with _unless_held(_target_of(leftover.path)) as free:
        if free:
            shutil.rmtree(leftover.path, ignore_errors=True)
    return before - size_below(leftover.path)


def _target_of(partial: Path) -> Path:
    return partial.with_name(partial.name.removeprefix(".partial-").rpartition("-")[0])


def _is_kept(folder: Path) -> bool:
    """Whether it is a folder that the store has made; a link leads out of it."""
    return folder.is_dir() and not folder.is_symlink() and folder.name[:1] != "."


@contextmanager
def _unless_held(folder: Path) -> Iterator[bool]:
    """Hold the lock under which a folder is made; False where another process has it."""
    with folder.with_name(f".lock-{folder.name}").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
