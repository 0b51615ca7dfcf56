"""What a config will need, by arithmetic, and whether it is there: model, data, memory, disk. Loads nothing.

Memory and disk follow from the numbers of parameters and the token budget. They are upper estimates: what a run on this
machine really takes, `firesteel data check --estimate` finds out by timing a step.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from firesteel import machine, store
from firesteel.catalog import ModelEntry, load_catalog
from firesteel.finding import Finding, size
from firesteel.model_size import ACTIVATION_TOKEN_BUDGET, ITEM_BYTES, STATE_COPIES, TRAINED_COPIES, ModelSize
from firesteel.sdk import FiresteelError
from firesteel.sdk.service_client import REFERENCE_MODES, ReferenceStrategy, decide_reference, policy_mode
from firesteel.sdk.shapes import TrainingShape
from training.utils.first_rows import FirstRows
from training.utils.run_folder import is_a_run
from training.utils.runs import is_held
from training.utils.training_settings import TrainingSettings

PROGRAM_BYTES = 600_000_000
"""What Python, torch and transformers take before a model is loaded."""


@dataclass(frozen=True)
class Device:
    """Where models would be loaded, and what is free there."""

    kinds: Sequence[str]
    """The preferred one first."""
    free: int


def findings_before_torch(config: TrainingSettings) -> Iterator[Finding]:
    """Model, tokenizer, data, the run's folder, trackers."""
    yield from _model(config.base_model, "model")
    if config.tokenizer_model and config.tokenizer_model != config.base_model:
        yield from _model(config.tokenizer_model, "tokenizer")
    for name, path in (("dataset", config.dataset), ("eval_dataset", config.eval_dataset)):
        if path:
            yield _data(name, path, config)
    yield _run_folder(Path(config.log_path))
    if (config.wandb.project or config.wandb.entity) and importlib.util.find_spec("wandb") is None:
        says = "settings for Weights & Biases, which is not installed: a run goes on without"
        yield Finding("config", "wandb", says, "note", "pip install 'firesteel[wandb]'")
    try:
        config.trackers.refuse_missing()
    except FiresteelError as error:
        yield Finding("config", "trackers", str(error), "problem")


def _model(name: str, subject: str) -> Iterator[Finding]:
    try:
        entry = load_catalog().resolve_model(name)
        folder = store.find(entry)
    except FiresteelError as error:
        yield Finding("config", subject, str(error), "problem")
        return
    if folder is None:
        yield _to_be_fetched(name, entry, subject)
        return
    taken = store.size_on_disk(folder)
    values = {"path": str(folder), "bytes": taken}
    yield Finding("config", subject, f"{name}: ready, {size(taken)}, {folder}", values=values)
    if not store.tokenizer_files(folder):
        says = f"there are no files of a tokenizer in {folder}"
        yield Finding("config", "tokenizer", says, "problem", "name a tokenizer_model, or add them")


def _to_be_fetched(name: str, entry: ModelEntry, subject: str) -> Finding:
    todo = f"firesteel models pull {name}"
    if entry.kind == "hub" and os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        says = f"{name} is not here, and HF_HUB_OFFLINE forbids to ask the hub for it"
        return Finding("config", subject, says, "problem", f"unset it, then {todo}")
    says = f"{name} is not here; a run fetches it first from {entry.source} (its size is known then)"
    return Finding("config", subject, says, "note", todo)


def _data(name: str, path: str, config: TrainingSettings) -> Finding:
    check = f"firesteel data check {path}"
    try:
        first = FirstRows.of(path, config.learner.rows)
    except FiresteelError as error:
        return Finding("config", name, str(error), "problem", check)
    values = {"bytes": os.path.getsize(path), "rows": first.count, "refused": len(first.refused)}
    if not first.refused:
        says = f"{path}: {size(values['bytes'])}, {first.named} can be read as {first.form}; `{check}` "
        says += "looks at lengths and template too" if first.whole else "reads all"
        return Finding("config", name, says, values=values)
    says = f"{path}: of {first.named} {len(first.refused)} cannot be used, the first: {first.refused[0]}"
    if first.stop(config.on_bad_row):
        todo = f"{check} lists them; mend them, or leave them out (on_bad_row: skip)"
        return Finding(
            "config", name, says, "problem", todo if first.form else f"{check} says what it holds", values
        )
    return Finding("config", name, f"{says}; on_bad_row skip leaves them out", "note", check, values)


def _run_folder(path: Path) -> Finding:
    there = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        says = f"{path}: {there} cannot be written to"
        return Finding("config", "log_path", says, "problem", "name a folder that can be written to")
    if not is_a_run(path / "config.json"):
        return Finding("config", "log_path", f"{path}: a new run")
    if is_held(path):
        says = f"{path}: another process is writing to it"
        return Finding("config", "log_path", says, "problem", "wait for it, or name another folder")
    says = f"{path} holds a run: it is gone on with, or moved to previous-<n>/ where it has no checkpoints"
    return Finding("config", "log_path", says, "note", f"firesteel runs show {path}")


def findings_on(config: TrainingSettings, device: Device) -> Iterator[Finding]:
    """Shapes, memory and disk, with a trainer in this process."""
    try:
        shapes = _shapes(config, device.kinds)
        folder = store.find(load_catalog().resolve_model(config.base_model))
        yield Finding("needs", "trainer", "; ".join(f"{shape.name}: {shape.dtype}" for shape in shapes))
        if folder is not None:
            estimate = RunNeeds.of(config, ModelSize.of(folder), shapes)
            yield estimate.memory(device.free)
            yield from estimate.disk(config, machine.disk_free(Path(config.log_path)))
    except FiresteelError as error:
        yield Finding("needs", "trainer", str(error), "problem")
        return
    if folder is None:
        yield Finding("needs", "memory", "known once the model is here", "note")


def _shapes(config: TrainingSettings, kinds: Sequence[str]) -> list[TrainingShape]:
    """Of the policy, and of a reference that is a model of its own."""
    catalog, named = load_catalog(), config.trainer
    model, longest = config.base_model, config.max_seq_len
    modes = (policy_mode(config.lora_rank),)
    found = [catalog.resolve_shape(named.training_shape_id, model, modes, longest, kinds)]
    strategy = decide_reference(config.lora_rank, named.reference_training_shape_id)
    if config.reference_settings is not None and strategy is ReferenceStrategy.SEPARATE:
        shape = named.reference_training_shape_id
        found.append(catalog.resolve_shape(shape, model, REFERENCE_MODES, longest, kinds))
    return found


@dataclass(frozen=True)
class RunNeeds:
    """Bytes."""

    weights: int
    """Frozen ones, and the reference's."""
    trained: int
    """Those that are trained, with their gradient and AdamW's moments."""
    activations: int
    """Kept between a forward and its backward, at most."""
    tokens: int
    """Of these."""
    state: int
    """Of a checkpoint."""
    exported: int

    @classmethod
    def of(cls, config: TrainingSettings, model: ModelSize, shapes: Sequence[TrainingShape]) -> RunNeeds:
        """By the numbers of parameters."""
        policy, *references = shapes
        item, frozen = ITEM_BYTES[policy.dtype], sum(ITEM_BYTES[shape.dtype] for shape in references)
        rank = config.lora_rank
        # An adapter is float32 on any base.
        trained = rank * model.per_rank * 4 if rank else model.parameters * item
        tokens = config.trainer.activation_token_budget or ACTIVATION_TOKEN_BUDGET[policy.device]
        return cls(
            weights=model.parameters * (frozen + (item if rank else 0)),
            trained=trained * TRAINED_COPIES,
            activations=tokens * model.activations_per_token * item,
            tokens=tokens,
            state=trained * STATE_COPIES,
            exported=trained,
        )

    def memory(self, free: int) -> Finding:
        """Compared with what is free."""
        stays = self.weights + self.trained + PROGRAM_BYTES
        most = stays + self.activations
        says = (
            f"up to {size(most)}, by arithmetic: {size(self.weights)} frozen weights, {size(self.trained)} trained "
            f"ones with gradient and optimizer, {size(self.activations)} activations of {self.tokens:,} tokens, "
            f"{size(PROGRAM_BYTES)} the program; {size(free)} are free"
        )
        values = {"most": most, "stays": stays, "free": free, "activations": self.activations}
        if stays > free:
            todo = "train an adapter (lora_rank), use a smaller model, or a larger machine"
            return Finding("needs", "memory", says, "problem", todo, values)
        if most > free:
            todo = "a smaller trainer.activation_token_budget, or max_seq_len"
            return Finding("needs", "memory", says, "note", todo, values)
        return Finding("needs", "memory", says, values=values)

    def disk(self, config: TrainingSettings, free: int) -> Iterator[Finding]:
        """Compared with what is free at the run's folder."""
        # A new one is there before an old one goes.
        kept = (config.keep_last or 0) + 1 + bool(config.keep_best) if config.dcp_save_interval else 0
        least = kept * self.state + self.exported
        says = f"{size(self.exported)} for the result"
        if config.dcp_save_interval:
            many = f"{config.keep_last} are kept" if config.keep_last else "all are kept (keep_last)"
            says += f", {size(self.state)} for each checkpoint, of which {many}"
        values = {"least": least, "each_checkpoint": self.state, "free": free}
        says += f"; {size(free)} are free"
        if least > free:
            todo = "make room, keep fewer checkpoints, or name another log_path"
            yield Finding("needs", "disk", says, "problem", todo, values)
        elif config.dcp_save_interval and (config.keep_last is None or config.keep_every):
            # How many there will be depends on the rows, which are not read here.
            todo = "`firesteel data check --estimate` counts them; keep_last bounds them"
            yield Finding("needs", "disk", says, "note", todo, values)
        else:
            yield Finding("needs", "disk", says, values=values)
