"""Named checkpoints and exports of the service: where they are, whose they are, and how clients write their names.

::

    HOME/service/checkpoints/ACCOUNT/jobs/JOB/training/NAME/ID/   a saved state: weights and optimizer, sealed
    HOME/service/checkpoints/ACCOUNT/jobs/JOB/sampler/NAME/ID/    an export: an adapter, or a whole model
    HOME/service/checkpoints/ACCOUNT/models/MODEL/…               the same, of models that belong to no job

A folder is written whole before its record is added, so what is listed is whole. Its id is new each time: what was
read from a folder (a base that stays loaded) is what is there, also when a name is used again. Names come from clients
and become folders: they are checked against one pattern, and nothing else decides a path.
"""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from firesteel.sdk.errors import CheckpointError
from firesteel.service.records import Checkpoint, Records, now
from firesteel.service.sessions import Place, ServedModel
from firesteel.store import size_on_disk

Kind = Literal["training", "sampler"]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_TINKER = re.compile(r"tinker://(?P<model>[^/]+)/(?P<kind>weights|sampler_weights)/(?P<name>[^/]+)")
_CROSS_JOB = re.compile(r"cross_job://(?P<job>[^/]+)/(?P<name>[^/]+)")
_KINDS: Mapping[str, Kind] = {"weights": "training", "sampler_weights": "sampler"}


@dataclass(frozen=True)
class Reference:
    """A checkpoint as a client names it."""

    owner: str
    kind: Kind | None
    """None = the name does not say; a training checkpoint comes before an export."""
    name: str


class Checkpoints:
    """The checkpoints of all accounts, each seen by its own account only."""

    def __init__(self, home: Path, records: Records, is_at: Callable[[str, Place], bool]) -> None:
        """`is_at` says whether a model of this id is at a place now."""
        self._home = home
        self._records = records
        self._is_at = is_at
        self._being_written: set[Path] = set()

    def new_folder(self, model: ServedModel, name: str, kind: Kind) -> Path:
        """Where a checkpoint of this model will be. Raises `CheckpointError` for a name that is none, or is taken."""
        check_name(name)
        if self._records.checkpoint(model.place.account, model.owner, name, kind) is not None:
            raise CheckpointError(f"path: there is a {kind} checkpoint {name!r} already; choose another name")
        of_this_name = self._folder(model.place.account, model.owner, kind, name)
        if any(folder.parent == of_this_name for folder in self._being_written):
            raise CheckpointError(f"path: a {kind} checkpoint {name!r} is being kept; choose another name")
        # What is there was written by a process that ended before it was listed: nobody knows of it.
        shutil.rmtree(of_this_name, ignore_errors=True)
        folder = of_this_name / secrets.token_hex(4)
        self._being_written.add(folder)
        return folder

    def give_up(self, folder: Path) -> None:
        """It was not written, or could not be listed: its name is free again."""
        self._being_written.discard(folder)
        shutil.rmtree(folder, ignore_errors=True)

    def add(self, model: ServedModel, name: str, kind: Kind, folder: Path) -> Checkpoint:
        """List a checkpoint that is whole on the disk."""
        checkpoint = Checkpoint(
            account=model.place.account,
            owner=model.owner,
            name=name,
            kind=kind,
            base_model=model.description.base_model,
            lora=asdict(model.lora) if model.lora else None,
            folder=str(folder),
            size=size_on_disk(folder),
            created=now(),
        )
        self._records.add_checkpoint(checkpoint)
        self._being_written.discard(folder)
        return checkpoint

    def of(self, account: str, owner: str | None = None) -> list[Checkpoint]:
        """What is listed, oldest first."""
        return self._records.checkpoints(account, owner)

    def resolve(self, text: str, place: Place, model_id: str = "") -> Checkpoint:
        """The checkpoint that a client means. Raises `CheckpointError` if there is none of that name."""
        wanted = self._read(text, place, model_id)
        kinds: tuple[Kind, ...] = (wanted.kind,) if wanted.kind else ("training", "sampler")
        for kind in kinds:
            found = self._records.checkpoint(place.account, wanted.owner, wanted.name, kind)
            if found is not None:
                return found
        there = [row.name for row in self.of(place.account, wanted.owner)]
        raise CheckpointError(
            f"path: there is no checkpoint {text!r}; {wanted.owner} has {', '.join(there) or 'none'}"
        )

    def remove(self, checkpoint: Checkpoint) -> None:
        """Unlist it, then delete its folder."""
        self._records.remove_checkpoint(
            checkpoint.account, checkpoint.owner, checkpoint.name, checkpoint.kind
        )
        shutil.rmtree(checkpoint.folder, ignore_errors=True)

    def _read(self, text: str, place: Place, model_id: str) -> Reference:
        """`step-6`, `cross_job://job/step-6`, `tinker://model/weights/step-6`, or the folder of one."""
        if match := _TINKER.fullmatch(text):
            return Reference(
                self._owner_of(match["model"], place), _KINDS[match["kind"]], check_name(match["name"])
            )
        if match := _CROSS_JOB.fullmatch(text):
            return Reference(f"jobs/{check_name(match['job'])}", None, check_name(match["name"]))
        for row in self.of(place.account):
            if text == row.folder:
                return Reference(row.owner, row.kind, row.name)
        return Reference(place.owner_of(model_id), None, check_name(text))

    def _owner_of(self, model_id: str, place: Place) -> str:
        """A model of a job keeps its checkpoints with the job; which job an ended model was of, nobody knows."""
        own = f"models/{model_id}"
        if place.job_id is None or self.of(place.account, own):
            return own
        if self._is_at(model_id, place):
            return f"jobs/{place.job_id}"
        raise CheckpointError(
            f"path: there is no model {model_id!r} of trainer job {place.job_id!r} here; a checkpoint of a job goes by "
            "its bare name, one of another job by cross_job://JOB/NAME"
        )

    def _folder(self, account: str, owner: str, kind: Kind, name: str) -> Path:
        return self._home / "checkpoints" / account / owner / kind / name


def check_name(name: str) -> str:
    """A name that may become a folder. Raises `CheckpointError` for any other."""
    if not _NAME.fullmatch(name):
        raise CheckpointError(
            f"path: {name!r} is not the name of a checkpoint; letters, digits, '.', '_' and '-' make one, 128 at most"
        )
    return name


def tinker_path(model: ServedModel, kind: Kind, name: str) -> str:
    """How plain `tinker` clients name it."""
    segment = "weights" if kind == "training" else "sampler_weights"
    return f"tinker://{model.model_id}/{segment}/{name}"


def described(checkpoint: Checkpoint) -> dict[str, Any]:
    """`weights_info` of a checkpoint."""
    lora = checkpoint.lora
    info: dict[str, Any] = {"base_model": checkpoint.base_model, "is_lora": lora is not None}
    if lora is not None:
        info["lora_rank"] = lora["rank"]
        info |= {name: lora[name] for name in ("train_unembed", "train_mlp", "train_attn")}
    return info
