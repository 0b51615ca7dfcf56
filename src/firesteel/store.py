"""Fetch a model, verify it, give a folder. Imports no torch until there is something to convert.

::

    $FIRESTEEL_HOME/models/            default ~/.cache/firesteel/models
        NAME-HASH/                     config.json, *.safetensors, tokenizer files, manifest.json
        .partial-NAME-HASH-…/          being made; never used, swept by the next process that makes this model
        .lock-NAME-HASH                held while one is being made, or removed
    $FIRESTEEL_HOME/tokenizers/        the same, of models of which only the tokenizer was asked for

A folder gets its final name only once it is whole: every file is synced to disk and hashed in the manifest,
then the folder is renamed into place. HASH stands for source, revision and file hash, so that a changed
catalogue entry is fetched anew. Files are replaced by rename and never written in place: other processes may
have them mapped.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path

from firesteel.catalog import ModelEntry
from firesteel.fetching import Progress
from firesteel.model_sources import MAKERS, TOKENIZER_FILES, sha256_of, sha256_of_gguf, tokenizer_from_hub
from firesteel.sdk.errors import ModelError, StorageError
from firesteel.sealed import MANIFEST, WRITE_ERRORS, SealedFile, sync

_SHARD_INDEX = "model.safetensors.index.json"
_FORMAT = 2  # raised when the same source gives other files than before: a new folder, no stale one


@dataclass(frozen=True)
class Manifest:
    """What a stored model is made of; `revision` is the commit for a Hugging Face id."""

    name: str
    source: str
    revision: str | None
    files: tuple[SealedFile, ...]


def home() -> Path:
    """The folder for all that Firesteel keeps: FIRESTEEL_HOME, or ~/.cache/firesteel."""
    return Path(os.environ.get("FIRESTEEL_HOME") or "~/.cache/firesteel").expanduser().absolute()


def shelves() -> tuple[Path, Path]:
    """Where models are, and tokenizers without one."""
    return home() / "models", home() / "tokenizers"


def where(entry: ModelEntry, progress: Progress | None = None) -> Path:
    """The folder that holds this model once it is fetched. Reads a .gguf file whose hash is not given."""
    if entry.kind == "folder":
        return Path(entry.source)
    if entry.kind == "gguf":
        # Its content alone: the same file under another name is the same model.
        stem, identity = "gguf", entry.sha256 or sha256_of_gguf(entry, progress or _silent)
    else:
        stem = entry.source.split(":", 1)[-1]
        identity = json.dumps([entry.source, entry.revision, entry.sha256, entry.trust_remote_code])
    key = hashlib.sha256(f"{_FORMAT} {identity}".encode()).hexdigest()[:12]
    return home() / "models" / f"{re.sub(r'[^A-Za-z0-9.]+', '-', stem).strip('-.')}-{key}"


def find(entry: ModelEntry) -> Path | None:
    """The model's folder if it is here, None if it has to be fetched. Raises ModelError if it is damaged."""
    folder = where(entry)
    if entry.kind != "folder" and not folder.exists():
        return None
    _check_on_use(folder, entry)
    return folder


def fetch(entry: ModelEntry, progress: Progress | None = None, *, force: bool = False) -> Path:
    """A folder with config.json, *.safetensors and tokenizer files, fetched or converted first if need be.

    A local folder is given back as it is. `force` makes a stored model anew. Raises ModelError where the
    model cannot be had or is damaged, StorageError where it cannot be kept. Several processes may ask at once: one
    fetches, the others wait.
    """
    folder = where(entry, progress)
    if entry.kind != "folder" and (force or not folder.exists()):
        _make(_Making(entry, folder, _fill_model, progress or _silent), force)
    _check_on_use(folder, entry)
    return folder


def fetch_tokenizer(entry: ModelEntry, progress: Progress | None = None) -> Path:
    """A folder that holds at least the tokenizer: without the weights, if these would have to be downloaded."""
    model = where(entry, progress)
    if entry.kind != "hub" or model.exists():
        return fetch(entry, progress)
    folder = home() / "tokenizers" / model.name
    if not folder.exists():
        _make(_Making(entry, folder, tokenizer_from_hub, progress or _silent), force=False)
    check(folder, entry.name)
    return folder


def _fill_model(entry: ModelEntry, made: Path, scratch: Path, progress: Progress) -> str | None:
    revision = MAKERS[entry.kind](entry, made, scratch, progress)
    _check_model_files(made, entry.name)
    return revision


def _check_on_use(folder: Path, entry: ModelEntry) -> None:
    if entry.kind == "folder":
        _check_model_files(folder, entry.name)
    else:
        check(folder, entry.name)


def copy_tokenizer(folder: Path, target: Path) -> None:
    """Copy the tokenizer's files, chat template included, from one model folder into another that exists."""
    for path in tokenizer_files(folder):
        shutil.copyfile(path, target / path.name)


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer, chat template included."""
    return [p for p in folder.iterdir() if any(fnmatch(p.name, pattern) for pattern in TOKENIZER_FILES)]


def stored() -> list[Path]:
    """The folders of all models that were fetched, by name."""
    return _kept_in(shelves()[0])


def stored_tokenizers() -> list[Path]:
    """The folders of those whose model was not asked for, by name."""
    return _kept_in(shelves()[1])


def _kept_in(shelf: Path) -> list[Path]:
    return sorted(path for path in shelf.iterdir() if path.name[0] != ".") if shelf.is_dir() else []


def size_on_disk(folder: Path) -> int:
    """Bytes of all files in a model folder."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def size_below(folder: Path) -> int:
    """Bytes of all files below a folder, some of which may vanish meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def check(folder: Path, name: str = "NAME") -> Manifest:
    """Check that each file of a stored model is there at its full size; raises ModelError if one is not.

    `name` is what the error tells the user to pull.
    """
    manifest = read_manifest(folder, name)
    for file in manifest.files:
        path = folder / file.name
        if not path.is_file():
            raise _damaged(path, "is missing", name)
        if path.stat().st_size != file.size:
            raise _damaged(path, f"has {path.stat().st_size} bytes instead of {file.size}", name)
    return manifest


def verify(folder: Path, name: str = "NAME", progress: Progress | None = None) -> None:
    """Read a stored model and compare each file with its hash; raises ModelError if one differs."""
    for file in check(folder, name).files:
        if sha256_of(folder / file.name, progress or _silent) != file.sha256:
            raise _damaged(folder / file.name, "does not have the content it was stored with", name)


def read_manifest(folder: Path, name: str = "NAME") -> Manifest:
    """What a stored model is made of. Raises ModelError if there is no readable manifest."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        files = tuple(SealedFile(**file) for file in content.pop("files"))
        return Manifest(**content, files=files)
    except FileNotFoundError:
        raise _damaged(path, "is missing", name) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"is not a manifest ({error})", name) from None


def _damaged(path: Path, problem: str, name: str) -> ModelError:
    return ModelError(
        f"model {name!r} is damaged: {path} {problem}; run `firesteel models pull {name} --force`"
    )


def _silent(message: str, done: int, total: int | None) -> None:
    """The progress of callers that did not ask for any."""


@dataclass(frozen=True)
class _Making:
    """A folder to be made whole, and how."""

    entry: ModelEntry
    folder: Path
    fill: Callable[[ModelEntry, Path, Path, Progress], str | None]
    progress: Progress


def _make(making: _Making, force: bool) -> None:
    folder = making.folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder, making.progress):
            if force or not folder.exists():  # another process may have made it while this one waited
                _make_under_lock(making)
    except StorageError:
        raise
    except OSError as error:
        raise _cannot_be_kept(making, str(error)) from error


def _make_under_lock(making: _Making) -> None:
    entry, folder, progress = making.entry, making.folder, making.progress
    for left_over in folder.parent.glob(f".partial-{folder.name}-*"):
        shutil.rmtree(left_over, ignore_errors=True)  # of a process that was killed: the lock is ours
    partial = folder.with_name(f".partial-{folder.name}-{secrets.token_hex(4)}")
    made, scratch = partial / "model", partial / "scratch"
    try:
        made.mkdir(parents=True)
        scratch.mkdir()
        revision = making.fill(entry, made, scratch, progress)
        _seal(made, entry, revision, progress)
        if folder.exists():
            folder.rename(partial / "replaced")
        made.rename(folder)
        sync(folder.parent)
    except WRITE_ERRORS as error:
        written = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
        raise _cannot_be_kept(making, f"{error}, after {written:,} bytes") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _cannot_be_kept(making: _Making, why: str) -> StorageError:
    return StorageError(
        f"model {making.entry.name!r} cannot be kept in {making.folder.parent}: {why}; make room or set "
        "FIRESTEEL_HOME to a folder that can be written to"
    )


@contextmanager
def _lock(folder: Path, progress: Progress) -> Iterator[None]:
    """Hold this model's lock. The system frees it if the process is killed; the empty file stays."""
    with folder.with_name(f".lock-{folder.name}").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another process that is fetching this model", 0, None)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _seal(made: Path, entry: ModelEntry, revision: str | None, progress: Progress) -> None:
    """Hash every file, bring all of them to the disk and write the manifest as the last."""
    files = []
    for path in sorted(made.iterdir()):
        if path.stat().st_nlink == 1:  # a second name of a file in the hub's cache keeps that cache's mode
            path.chmod(0o444)
        sync(path)
        files.append(SealedFile(path.name, path.stat().st_size, sha256_of(path, progress)))
    manifest = Manifest(entry.name, entry.source, revision, tuple(files))
    (made / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1) + "\n", encoding="utf-8")
    sync(made / MANIFEST)
    sync(made)


def _check_model_files(folder: Path, name: str) -> None:
    """Raise ModelError unless there is a config and every file of weights that the index of shards lists."""
    if not folder.is_dir():
        raise ModelError(f"model {name!r}: there is no folder {folder}")
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        hint = (
            "is an adapter, not a model; name its base model"
            if adapter
            else "has no config.json, so is no model"
        )
        raise ModelError(f"model {name!r}: {folder} {hint}")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"model {name!r}: there are no *.safetensors files in {folder}. Other weights (*.bin, *.pt) "
            "are not read, since reading them can run code; save the model with `save_pretrained` first"
        )
    for shard in _shards(folder, name):
        if not (folder / shard).is_file():
            raise ModelError(f"model {name!r}: {folder / shard} is missing, but {_SHARD_INDEX} lists it")


def _shards(folder: Path, name: str) -> list[str]:
    """The files over which large models spread their weights; none for a model in one file."""
    index = folder / _SHARD_INDEX
    if not index.is_file():
        return []
    try:
        return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"model {name!r}: {index} is no index of shards ({error!r}); fetch it anew"
        ) from None
