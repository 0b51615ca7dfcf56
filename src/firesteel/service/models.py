"""Models by name: those of the catalogue, and those that were made here by promoting an export.

::

    HOME/models/ACCOUNT/ID/model/      a whole model: the export, or an adapter's export added to its base
    HOME/models/ACCOUNT/ID/adapter/    that adapter by itself
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from firesteel import store
from firesteel.catalog import load_catalog
from firesteel.sdk.errors import ModelError, OperationError
from firesteel.sealed import storage_errors, sync
from firesteel.service.records import Checkpoint, PromotedModel, Records, now

MODEL, ADAPTER = "model", "adapter"
_MODEL_ID = re.compile(r"[a-z0-9-]{1,63}")


class Models:
    """What clients may name as a base model."""

    def __init__(self, folder: Path, records: Records, offered: Sequence[str]) -> None:
        """With `offered`, those and promoted ones only; without, every name of the catalogue."""
        self._folder = folder
        self._records = records
        for left_over in (*folder.glob(".partial-*"), *folder.glob("*/.partial-*")):
            shutil.rmtree(left_over, ignore_errors=True)  # of a process that was killed
        self.offered = tuple(offered)

    def find(self, account: str, model_id: str) -> PromotedModel | None:
        """A promoted model of this account."""
        return self._records.model(account, model_id)

    def adapter(self, name: str, account: str) -> Path | None:
        """The folder of a promoted adapter."""
        promoted = self._promoted(name, account)
        if promoted is None or promoted.kind != "HF_PEFT_ADDON":
            return None
        return Path(promoted.folder, ADAPTER)

    def _promoted(self, name: str, account: str) -> PromotedModel | None:
        """By its whole name only: a model's id may be that of one in the catalogue."""
        prefix = f"accounts/{account}/models/"
        return self.find(account, name.removeprefix(prefix)) if name.startswith(prefix) else None

    def source(self, name: str, account: str) -> str:
        """What the engine loads for a name. Raises `ModelError` for one that this server does not offer."""
        promoted = self._promoted(name, account)
        if promoted is not None:
            return str(Path(promoted.folder, MODEL))
        if self.offered and name not in self.offered:
            raise ModelError(
                f"base_model: this server trains {', '.join(self.offered)}, not {name!r}; start it with "
                f"--base-model {name} to offer that too"
            )
        if not self.offered and name not in (known := load_catalog().models):
            raise ModelError(
                f"base_model: this server trains the models of its catalogue ({', '.join(known)}), not {name!r}; start "
                f"it with --base-model {name} to offer that"
            )
        return name

    def check(self, checkpoint: Checkpoint, model_id: str) -> PromotedModel | None:
        """The model that this promotion has made already. Raises `OperationError` for an id that is none, or taken."""
        if not _MODEL_ID.fullmatch(model_id):
            raise OperationError(
                f"output_model: {model_id!r}; 1 to 63 of a-z, 0-9 and '-' make the id of a model"
            )
        known = self.find(checkpoint.account, model_id)
        # Without the time: a promotion of before names could be used again.
        origins = (_origin(checkpoint), f"{checkpoint.owner}/{checkpoint.name}")
        if known is not None and known.checkpoint not in origins:
            raise OperationError(
                f"output_model: there is a model {model_id!r} already, of {known.checkpoint}"
            )
        return known

    async def fetch(self, source: str) -> None:
        """Bring a model to this machine, beside the engine: everybody would wait for it there."""
        entry = load_catalog().resolve_model(source)
        await asyncio.to_thread(store.fetch, entry)

    def scratch(self) -> Path:
        """A folder that does not exist yet, for a model on its way to become one."""
        return self._folder / f".partial-{secrets.token_hex(8)}"

    def promote(self, checkpoint: Checkpoint, model_id: str, whole: Path) -> PromotedModel:
        """List a model whose files, those of `whole`, are its own: what becomes of the checkpoint does not matter."""
        folder = self._folder / checkpoint.account / model_id
        parts = {MODEL: whole}
        if checkpoint.lora is not None:
            parts[ADAPTER] = Path(checkpoint.folder)
        _copy_folders(parts, folder, checkpoint.size)
        model = PromotedModel(
            account=checkpoint.account,
            model_id=model_id,
            base_model=checkpoint.base_model,
            kind="HF_BASE_MODEL" if checkpoint.lora is None else "HF_PEFT_ADDON",
            lora_rank=int(checkpoint.lora["rank"]) if checkpoint.lora is not None else 0,
            folder=str(folder),
            checkpoint=_origin(checkpoint),
            created=now(),
        )
        if not self._records.add_model(model):
            raise OperationError(f"output_model: there is a model {model_id!r} already")
        return model


def _origin(checkpoint: Checkpoint) -> str:
    return f"{checkpoint.owner}/{checkpoint.name} of {checkpoint.created.isoformat()}"  # a name may be used again


def _copy_folders(sources: Mapping[str, Path], target: Path, size: int) -> None:
    """Copies that are whole or not there. Files are never changed in place, so a second name is a copy."""
    partial = target.with_name(f".partial-{target.name}")
    with storage_errors(target, size):
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(target, ignore_errors=True)  # of a process that ended before it was listed
        for name, source in sources.items():
            (partial / name).mkdir(parents=True)
            for path in source.iterdir():
                os.link(path, partial / name / path.name)
            sync(partial / name)
        sync(partial)
        partial.rename(target)
        sync(target.parent)
