"""The models of a run: the policy where the run takes it up, and the reference that it has."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

from firesteel.sdk import ServiceClient
from training.utils.checkpoints import ReferenceRecord
from training.utils.client import ReconnectableClient
from training.utils.reference_pass import RECORDED_PAIRS, AnyReferences, NoReferences, References
from training.utils.resume import (
    GoOn,
    refuse_another_reference,
)
from training.utils.run import Run
from training.utils.service import build_service_client
from training.utils.training_settings import (
    ReferenceSettings,
    TrainingSettings,
)


@dataclass(frozen=True)
class Trainers:
    """The policy where this run takes it up, and the reference that the run has."""

    policy: ReconnectableClient
    references: AnyReferences
    record: ReferenceRecord

    def close(self) -> None:
        """Close the reference's cache; the models are the service's."""
        self.references.close()


def build_service(config: TrainingSettings) -> ServiceClient:
    """The trainers of this run; nothing is loaded yet."""
    return build_service_client(
        base_model=config.base_model,
        tokenizer_model=config.tokenizer_model or config.base_model,
        lora_rank=config.lora_rank,
        max_context_length=config.max_seq_len,
        learning_rate=config.learning_rate,
        trainer=config.trainer,
    )


def load(run: Run, service: ServiceClient) -> Trainers:
    """Load policy and reference, and compare them with what the run had if it goes on. Raises `CheckpointError`."""
    config, going_on = run.config, run.start if isinstance(run.start, GoOn) else None
    start = None if going_on else config.start
    client = service.create_training_client(
        config.base_model,
        config.lora_rank,
        lora_alpha=config.lora_alpha,
        seed=config.seed,
        # One that was chosen for the device is that of the whole run, wherever it goes on.
        activation_token_budget=going_on.notes.activation_token_budget if going_on else None,
        start=start,
    )
    policy = ReconnectableClient.from_training_client(client, service=service)
    if going_on:
        load_checkpoint(run, going_on, policy)
    elif config.init_optimizer:
        policy.load_state_with_optimizer(str(start))
    with ExitStack() as on_failure:
        references = load_references(run, service, start)
        on_failure.callback(references.close)
        if config.verify:
            verify_first_batch(run, policy, references)
        trainers = Trainers(policy, references, record_reference(run, references))
        on_failure.pop_all()
    return trainers


def load_references(run: Run, service: ServiceClient, start: str | None) -> AnyReferences:
    """The reference that the loss reads, if it reads one. `start` is where the policy starts now."""
    settings = run.config.reference_settings
    if settings is None:
        return NoReferences()
    return References(service, run.renderer, settings.mode, reference_weights(run, settings, start))


def load_checkpoint(run: Run, start: GoOn, policy: ReconnectableClient) -> None:
    """Bring the policy to where the checkpoint left it."""
    loaded = policy.load_state_with_optimizer(str(start.checkpoint), start.position.step)
    if loaded.differences:
        run.display.say(f"not bit-equal to a run without a break: {'; '.join(loaded.differences)}")


def reference_weights(run: Run, settings: ReferenceSettings, start: str | None) -> str | None:
    """The folder of the reference's weights, None for the base model. `start` is where the policy starts now.

    A starting adapter is copied into the run folder. All weights are too large for that: they are read again where they
    were, and their hash is compared.
    """
    given = run.config.init_from_checkpoint or run.config.warm_start_from_adapter
    if settings.held_to == "base" or given is None:
        return None
    run.display.say(f"reference: what training started from, {given}, not the base model (reference: base)")
    if not isinstance(run.start, GoOn):
        return start
    return str(run.folder.reference) if run.config.lora_rank else run.start.notes.reference.path


def record_reference(run: Run, references: AnyReferences) -> ReferenceRecord:
    """What the reference is. Raises `CheckpointError` if that is not what the run began with."""
    saved = isinstance(run.start, GoOn) or run.config.dcp_save_interval > 0
    probes = range(min(RECORDED_PAIRS, len(run.split.train)) if saved else 0)
    now = references.record(run.split.train.take(probes)[:RECORDED_PAIRS])
    if not isinstance(run.start, GoOn):
        return now
    then = run.start.notes.reference
    refuse_another_reference(then, now, run.start.checkpoint, references.tolerance(then))
    if then.numerics != now.numerics:
        run.display.say(f"not bit-equal to a run without a break: {then.numerics}, now {now.numerics}")
    return then


def verify_first_batch(run: Run, policy: ReconnectableClient, references: AnyReferences) -> None:
    """Show how far the fast path is from the plain one on the first batch. Raises `VerificationFailed`."""
    first = next(run.epochs.batches())
    verification = run.learner.verify(policy, run.split.train.take(first.rows), references)
    for line in verification.lines:
        run.display.say(line)
    verification.refuse_disagreement()
