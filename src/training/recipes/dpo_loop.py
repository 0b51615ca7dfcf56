"""Direct Preference Optimization from pairs of a chosen and a rejected response (arXiv 2305.18290).

    loss = -log σ(β m),   m = (log π(chosen) - log ref(chosen)) - (log π(rejected) - log ref(rejected))

averaged over the pairs of an optimizer step; log-probabilities are summed over the response's tokens. `loss`
chooses another member of the family (`losses.DpoObjective`), one of which, `simpo`, needs no reference. The run, top
to bottom: read and render all rows once (every bad row is known before a model is loaded; of the others an index is
kept), load policy and frozen reference, take the reference's log-probabilities once (from the cache where it has
them), then per step one `forward_backward_custom` and one `optim_step`, while the next rows are rendered; evaluate
on held-out pairs, export. With `dcp_save_interval` a run that was killed goes on from its last checkpoint when it is
started again, and ends with the same bits.

Not here: ranked lists.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from firesteel.sdk import (
    AdamParams,
    CheckpointError,
    NonFiniteError,
    ServiceClient,
    TrainerLost,
    TrainerRewound,
)
from training.utils.checkpoints import Checkpoints, Identity, Position, ReferenceRecord, Retention
from training.utils.client import ReconnectableClient
from training.utils.config import TrainerConfig, WandBConfig
from training.utils.evaluation import Answers, Split, evaluate, split_by_prompt
from training.utils.loop import Loop, SavedRun
from training.utils.losses import DpoLoss, DpoObjective, make_dpo_loss
from training.utils.metrics import MetricsLog, StepWork, heldout_line, step_line, symptoms
from training.utils.pair_sets import PairSet, select_pairs
from training.utils.pairs import PreferencePair, Rendering, write_row_outcomes
from training.utils.progress import Display, Stage
from training.utils.reference_pass import (
    RECORDED_PAIRS,
    AnyReferences,
    NoReferences,
    ReferenceMode,
    References,
)
from training.utils.rendering import Renderer
from training.utils.resume import (
    Finished,
    GoOn,
    Losses,
    Start,
    Wanted,
    find_start,
    first_day,
    refuse_another_reference,
    rewind,
)
from training.utils.row_index import RowIndex, index_rows
from training.utils.run_folder import RunFolder
from training.utils.run_settings import RUN_SETTINGS_THAT_MAY_CHANGE, RunSettings, at_home
from training.utils.schedules import Batch, Epochs, Schedule
from training.utils.service import build_service_client
from training.utils.stopping import stopping_on_signals


class Config(RunSettings):
    """One DPO run. What every run has beside these, its folder and checkpoints, is in `RunSettings`."""

    base_model: str
    """Model to train: a catalogue name, Hugging Face id, folder or GGUF file."""
    dataset: str
    """JSONL file of preference pairs."""
    tokenizer_model: str = ""
    """Where the tokenizer and chat template come from; empty = `base_model`."""
    loss: DpoLoss = "sigmoid"
    """sigmoid, robust, hinge, ipo_sum, ipo_mean, sigmoid_norm, simpo or ld: see docs/losses.md."""
    beta: float = Field(default=0.1, gt=0)
    """How strongly the policy is held to the reference. Losses per token (…_mean, …_norm, simpo) want larger ones."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Probability that a label is the wrong way round: of sigmoid (conservative DPO) and robust."""
    simpo_gamma: float = Field(default=0.5, ge=0)
    """Of simpo: the margin to reach, absolute (not over beta)."""
    ld_alpha: float = Field(default=1.0, ge=0, le=1)
    """Of ld: what tokens beyond the shorter response's length count; 1 is sigmoid."""
    ld_reference: bool = True
    """Of ld: whether the reference's tokens are scaled, too."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Times the chosen response's mean negative log-likelihood per token, added to any loss."""
    learning_rate: float = Field(default=1e-5, gt=0)
    """Base rate; LoRA usually wants about ten times that of full-parameter training."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled, of all trained weights."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of AdamW's first moment."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of AdamW's second moment."""
    adam_eps: float = Field(default=1e-8, gt=0)
    """AdamW's ε."""
    grad_clip_norm: float = Field(default=0.0, ge=0)
    """Bound on the gradient norm; 0 = off."""
    lr_scheduler: Schedule = Schedule()
    """How the learning rate moves; a bare name (`cosine`) is its `type`."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the training pairs."""
    batch_size: int = Field(default=4, ge=1)
    """Pairs per optimizer step; a last, smaller batch is trained too."""
    max_seq_len: int | None = Field(default=None, ge=2)
    """Longest row in tokens, prompt and response; unset = what the trainer takes."""
    truncate: Literal["drop", "response_end"] = "drop"
    """Longer rows are dropped, or lose the end of their responses. Either is counted and listed."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """A row that cannot be used stops the run before it starts, or is skipped, counted and listed."""
    max_pairs: int | None = Field(default=None, ge=1)
    """Use only the first so many usable pairs."""
    lora_rank: int = Field(default=0, ge=0)
    """Rank of the adapter; 0 trains all weights."""
    lora_alpha: float = Field(default=32.0, gt=0)
    """The adapter is scaled by alpha / rank."""
    eval_dataset: str | None = None
    """JSONL file of held-out pairs."""
    eval_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Without `eval_dataset`: share of the dataset held out, whole prompts at a time; 0 = none."""
    eval_interval: int = Field(default=0, ge=0)
    """Evaluate every so many steps; 0 = only before and after training."""
    sample_prompts: tuple[str, ...] = ()
    """User messages that the model answers before and after training."""
    sample_max_tokens: int = Field(default=96, ge=1)
    """Longest such answer."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the row order, the adapter's start and the held-out split."""
    shuffle: bool = True
    """A new row order every epoch."""
    reference: Literal["initial", "base"] = "initial"
    """What the policy is held to: what training starts from, or the base model in any case."""
    reference_pass: ReferenceMode = "upfront"
    """When the reference is asked: for all pairs before training, or `lazy`, for each batch as it comes up."""
    verify: bool = False
    """Before training, compare the first batch with transformers' own forward; a difference ends the run."""
    keep_best: Literal["accuracy", "margin", "dpo_loss"] | None = None
    """With keep_last: keep also the one with the best value of this held-out metric."""
    trainer: TrainerConfig = TrainerConfig()
    """Training shapes."""
    wandb: WandBConfig = WandBConfig()
    """Weights & Biases."""

    def adam_params(self, learning_rate: float) -> AdamParams:
        """The optimizer's settings at this rate."""
        betas_and_eps = (self.adam_beta1, self.adam_beta2, self.adam_eps)
        return AdamParams(learning_rate, *betas_and_eps, self.weight_decay, self.grad_clip_norm)

    @property
    def objective(self) -> DpoObjective:
        """The loss of training and evaluation."""
        read = {name: getattr(self, name) for name, losses in OF_THE_OBJECTIVE.items() if self.loss in losses}
        return DpoObjective(self.beta, loss=self.loss, sft_weight=self.sft_weight, **read)

    def resolved(self) -> dict[str, Any]:
        """See `RunSettings.resolved`; without what this run does not read."""
        unread = {name for name, losses in READ_BY.items() if self.loss not in losses}
        unread |= set() if self.lora_rank else {"lora_alpha"}
        return {name: value for name, value in super().resolved().items() if name not in unread}

    @field_validator("loss", mode="before")
    @classmethod
    def _convention_is_named(cls, value: object) -> object:
        if value == "ipo":
            raise ValueError(
                "ipo is two losses: ipo_sum on summed log-ratios, or ipo_mean on means per token"
            )
        return value

    @field_validator("dataset", "eval_dataset")
    @classmethod
    def _at_home(cls, path: str | None) -> str | None:
        return at_home(path)

    @field_validator("lr_scheduler", mode="before")
    @classmethod
    def _name_is_a_schedule(cls, value: object) -> object:
        return {"type": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _possible(self) -> Config:
        if self.eval_dataset and self.eval_fraction:
            raise ValueError("give eval_dataset or eval_fraction, not both")
        if self.eval_interval and not (self.eval_dataset or self.eval_fraction):
            raise ValueError("eval_interval needs held-out pairs: eval_dataset or eval_fraction")
        if self.lora_rank == 0 and "lora_alpha" in self.model_fields_set:
            raise ValueError("lora_alpha is not read at lora_rank 0")
        for name, losses in READ_BY.items():
            if name in self.model_fields_set and self.loss not in losses:
                raise ValueError(f"{name} is not read by loss {self.loss}, only by {', '.join(losses)}")
        if self.loss == "ld" and "ld_alpha" not in self.model_fields_set:
            raise ValueError("loss ld needs its ld_alpha: what tokens beyond the shorter response count")
        if self.warm_start_from_adapter and not self.lora_rank:
            raise ValueError("warm_start_from_adapter needs a lora_rank: the adapter's own")
        if self.keep_best and self.keep_last is None:
            raise ValueError("keep_best says what stays beside keep_last; give that too")
        if self.keep_best and (not self.eval_interval or self.dcp_save_interval % self.eval_interval):
            raise ValueError(
                "keep_best: every checkpoint needs its evaluation; make dcp_save_interval a multiple of eval_interval"
            )
        return self


WITH_REFERENCE = tuple(loss for loss in get_args(DpoLoss) if DpoObjective(1.0, loss=loss).uses_reference)
OF_THE_OBJECTIVE = {
    "label_smoothing": ("sigmoid", "robust"),
    "simpo_gamma": ("simpo",),
    "ld_alpha": ("ld",),
    "ld_reference": ("ld",),
}
READ_BY = OF_THE_OBJECTIVE | {"reference": WITH_REFERENCE, "reference_pass": WITH_REFERENCE}
"""Settings that only some losses read. Given for another they would do nothing, and are refused."""

# fmt: off
MAY_CHANGE_WHEN_GOING_ON = RUN_SETTINGS_THAT_MAY_CHANGE | {
    # where things are and run: what they are is compared by content
    "base_model", "dataset", "tokenizer_model", "trainer", "reference_pass",
    # how the objective is followed from here on
    "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "grad_clip_norm", "lr_scheduler", "epochs",
    # what is looked at, shown and kept
    "eval_dataset", "eval_dataset content", "eval_interval", "sample_prompts", "sample_max_tokens", "verify", "wandb",
    "keep_best",
}
# fmt: on
"""Settings that may be others than before when a run goes on. A change of any other makes it another run."""


@dataclass(frozen=True)
class RunSummary:
    """What a run came to."""

    steps: int
    before: dict[str, float]
    """Held-out metrics before the first step; empty without held-out pairs."""
    after: dict[str, float]
    """Held-out metrics after the last step."""
    export_path: str
    """Folder of the PEFT adapter or the full model."""
    policy_job_id: str | None
    reference_job_id: str | None
    """None where the reference shared the policy's base."""
    skipped_steps: int
    """Steps that changed nothing because their loss or gradient was not finite."""
    reference_seconds: float
    """For the reference's log-probabilities, from the cache or computed; of a lazy reference, within the training."""
    training_seconds: float
    """From this process's first step to the last, its evaluation and those between included."""


def main(config: Config) -> RunSummary:
    """Train and export. Raises `UserError` for what the user can mend, before any model work where possible.

    A trainer behind HTTP that lost its state makes the run go back to its newest checkpoint.
    """
    losses = Losses(config.log_path, "dpo")
    while True:
        try:
            return run_once(config, losses.begun)
        except (TrainerLost, TrainerRewound) as lost:
            if losses.go_back(lost):
                # By the code of resume: what is held in memory is ahead of the checkpoint.
                config = config.model_copy(update={"resume": "auto"})


def run_once(config: Config, begun: Callable[[], None]) -> RunSummary:
    """The run from where its folder leaves it to its end. `begun` is called when that folder is this run's."""
    display = Display()
    day = first_day(config.log_path, config.resume)
    renderer = Renderer.load(config.tokenizer_model or config.base_model, day)
    files = [path for path in (config.dataset, config.eval_dataset) if path]
    indexes = [index_rows(path, renderer, config.on_bad_row, display.reading(path)) for path in files]
    for prompt in config.sample_prompts:
        renderer.question(prompt)  # refused now, not after the reference pass
    with build_service(config) as service, ExitStack() as stack:
        longest = service.longest_sequence()
        rules = Rendering(config.max_seq_len or longest, config.truncate)
        limits = (config.max_pairs, None)  # held-out pairs are all used
        selections = [
            stack.enter_context(closing(select_pairs(index, renderer, rules, most)))
            for index, most in zip(indexes, limits, strict=False)
        ]
        split = split_pairs([rows.pairs for rows in selections], config)
        folder = stack.enter_context(closing(RunFolder.open(config.log_path, config.takeover)))
        identity = Identity(config.resolved(), data_identity(indexes, renderer, rules, split))
        wanted = Wanted(identity, MAY_CHANGE_WHEN_GOING_ON, epochs_of(config, split).total_steps)
        start = find_start(folder, config.resume, wanted)
        if isinstance(start, Finished):
            return summary_of_finished(start, display, config)
        for rows in selections:
            display.say(rows.summary + (f" (listed in {folder.bad_rows})" if rows.lost else ""))
        if split.overlap:
            display.say(f"eval_dataset: {split.overlap} of its pairs have a prompt that is trained on")
        run = Run(config, split, renderer, folder, display, identity, start)
        stop = stack.enter_context(stopping_on_signals())
        trainers = stack.enter_context(closing(load(run, service)))
        # Up to here nothing in the folder has changed: whatever was wrong, an earlier run is as it was.
        for line in begin(folder, start, config):
            display.say(line)
        begun()
        metrics = stack.enter_context(closing(MetricsLog(folder.metrics, config.wandb, config.resolved())))
        for rows in selections:
            write_row_outcomes(folder.bad_rows, rows.path, rows.outcomes())
        kept = Retention(config.keep_last, config.keep_every, config.keep_best)
        loop = Loop(
            settings=config,
            saved=SavedRun(identity, trainers.record, run.epochs.total_steps),
            policy=trainers.policy,
            folder=folder,
            metrics=metrics,
            display=display,
            stop=stop,
            checkpoints=stack.enter_context(closing(Checkpoints(folder, kept))),
            position=Position.of_a_start({}, {}),
        )
        return train(run, trainers, loop, service)


def data_identity(
    indexes: Sequence[RowIndex], renderer: Renderer, rules: Rendering, split: Split
) -> dict[str, Any]:
    """What the tokens of this run follow from."""
    names = ("dataset content", "eval_dataset content")
    content = {name: index.sha256 for name, index in zip(names, indexes, strict=False)}
    longest = rules.max_seq_len  # where the setting leaves it to the trainer, another one may cut other rows
    return {
        **content,
        "tokenizer and template": renderer.identity,
        "longest row": longest,
        "day": renderer.today.isoformat(),
        "pairs": len(split.train),
    }


def summary_of_finished(start: Finished, display: Display, config: Config) -> RunSummary:
    """What a run came to that has nothing left to do."""
    for line in start.said:
        display.say(f"not read, the run is finished: {line}")
    display.say(f"{config.log_path}: finished, {start.summary['steps']} steps; more epochs continue it")
    try:
        return RunSummary(**start.summary)
    except TypeError as error:
        raise CheckpointError(f"{config.log_path}/summary.json is not one of this program: {error}") from None


def begin(folder: RunFolder, start: Start | GoOn, config: Config) -> Iterator[str]:
    """Make the folder ready; yields what people should know."""
    if isinstance(start, GoOn):
        yield f"going on from {start.checkpoint}"
        yield from start.said
        yield from rewind(folder, start)
    elif previous := folder.set_aside():
        yield f"{config.log_path} held an earlier run: moved to {previous}"
    folder.write_config(config.resolved())


def split_pairs(sets: Sequence[PairSet], config: Config) -> Split:
    """Training and held-out pairs: from a file each, or drawn from one."""
    train, *heldout = sets
    if heldout:
        return Split(train, heldout[0])
    return split_by_prompt(train, config.eval_fraction, config.seed)


def epochs_of(config: Config, split: Split) -> Epochs:
    """Every batch of a run."""
    return Epochs(len(split.train), config.batch_size, config.epochs, config.seed, config.shuffle)


@dataclass(frozen=True)
class Run:
    """What the phases of one run share."""

    config: Config
    split: Split
    renderer: Renderer
    folder: RunFolder
    display: Display
    identity: Identity
    start: Start | GoOn

    @property
    def objective(self) -> DpoObjective:
        """See `Config.objective`."""
        return self.config.objective

    @property
    def epochs(self) -> Epochs:
        """The order of the training pairs."""
        return epochs_of(self.config, self.split)


def build_service(config: Config) -> ServiceClient:
    """The trainers of this run; nothing is loaded yet."""
    return build_service_client(
        base_model=config.base_model,
        tokenizer_model=config.tokenizer_model or config.base_model,
        lora_rank=config.lora_rank,
        max_context_length=config.max_seq_len,
        learning_rate=config.learning_rate,
        trainer=config.trainer,
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
    if not run.objective.uses_reference:
        return NoReferences()
    weights = reference_weights(run, start)
    return References(service, run.renderer, run.config.reference_pass, weights)


def load_checkpoint(run: Run, start: GoOn, policy: ReconnectableClient) -> None:
    """Bring the policy to where the checkpoint left it."""
    loaded = policy.load_state_with_optimizer(str(start.checkpoint), start.position.step)
    if loaded.differences:
        run.display.say(f"not bit-equal to a run without a break: {'; '.join(loaded.differences)}")


def reference_weights(run: Run, start: str | None) -> str | None:
    """The folder of the reference's weights, None for the base model. `start` is where the policy starts now.

    A starting adapter is copied into the run folder. All weights are too large for that: they are read again where they
    were, and their hash is compared.
    """
    given = run.config.init_from_checkpoint or run.config.warm_start_from_adapter
    if run.config.reference == "base" or given is None:
        return None
    run.display.say(f"reference: what training started from, {given}, not the base model (reference: base)")
    if not isinstance(run.start, GoOn):
        return start
    return str(run.folder.reference) if run.config.lora_rank else run.start.notes.reference.path


def record_reference(run: Run, references: AnyReferences) -> ReferenceRecord:
    """What the reference is. Raises `CheckpointError` if that is not what the run began with."""
    saved = isinstance(run.start, GoOn) or run.config.dcp_save_interval > 0
    probes = range(min(RECORDED_PAIRS, len(run.split.train)) if saved else 0)
    now = references.record(run.split.train.take(probes))
    if not isinstance(run.start, GoOn):
        return now
    then = run.start.notes.reference
    refuse_another_reference(then, now, run.start.checkpoint, references.tolerance(then))
    if then.numerics != now.numerics:
        run.display.say(f"not bit-equal to a run without a break: {then.numerics}, now {now.numerics}")
    return then


def train(run: Run, trainers: Trainers, loop: Loop, service: ServiceClient) -> RunSummary:
    """Reference pass, evaluation, the steps, export."""
    config, folder = run.config, run.folder
    policy, references = trainers.policy, trainers.references
    answers = Answers(run.renderer, config.sample_prompts, config.sample_max_tokens)
    if not isinstance(run.start, GoOn) and config.lora_rank and references.start is not None:
        policy.save_weights(str(folder.reference))  # still as it started; see reference_weights
    references.prepare(
        (run.split.train, run.split.heldout), run.display, config.seed, loop.stop.exit_if_asked
    )
    if isinstance(run.start, GoOn):
        loop.position = run.start.position
        if evaluation_due(run, loop.position.step) and not loop.position.heldout:  # a signal came in between
            loop.evaluated(evaluate_heldout(run, trainers, loop, loop.position.step))
    else:
        before = evaluate_heldout(run, trainers, loop, step=0)
        loop.position = Position.of_a_start(before, answers.of(policy))
    loop.stop.exit_if_asked()
    training_seconds = train_epochs(run, trainers, loop)
    position = loop.position
    folder.refuse_if_taken_over()
    export = policy.save_weights(str(folder.export_path(adapter=config.lora_rank > 0))).path
    run.display.say(f"exported: {export}")
    after = position.heldout or evaluate_heldout(run, trainers, loop, position.step)
    references.finish(run.display)
    answered = answers.of(policy)
    folder.refuse_if_taken_over()
    for line in answers.write_comparison(folder.samples, position.answers_before, answered):
        run.display.say(line)
    summary = RunSummary(
        steps=position.step,
        before=dict(position.before),
        after=dict(after),
        export_path=export,
        policy_job_id=service.trainer_job_id,
        reference_job_id=references.job_id,
        skipped_steps=position.skipped_steps,
        reference_seconds=references.seconds,
        training_seconds=training_seconds,
    )
    folder.write_summary(asdict(summary))
    loop.stop.exit_if_asked()
    return summary


def train_epochs(run: Run, trainers: Trainers, loop: Loop) -> float:
    """All steps that are left, the next rows being rendered meanwhile; returns the seconds they took."""
    epochs, done, started = run.epochs, loop.position.step, time.monotonic()
    ahead = run.split.train.taken_ahead(batch.rows for batch in epochs.batches(done))
    stage = Stage("training", sum(len(batch.rows) for batch in epochs.batches(done)))
    with closing(ahead) as taken, run.display.bar(stage) as bar:
        for batch, rows in zip(epochs.batches(done), taken, strict=True):
            loop.checkpoints.list_if_written()
            try:
                metrics = train_step(run, trainers, batch, rows.pairs)
            except NonFiniteError as error:
                metrics = loop.skip_or_refuse(batch, [pair.line for pair in rows.pairs], error)
            for symptom in symptoms(batch.step, metrics):
                run.display.say(f"warning: step {batch.step}: {symptom}")
            loop.log(batch.step, metrics | {"train/data_wait_sec": rows.waited})
            line = step_line(batch.step, epochs.total_steps, metrics)
            bar.advance(len(batch.rows), int(metrics.get("train/step_tokens", 0)), line)
            due = evaluation_due(run, batch.step)
            loop.made(batch, evaluate_heldout(run, trainers, loop, batch.step) if due else {})
        run.display.say(f"trained: {epochs.total_steps - done} steps, {bar.pairs} pairs, {bar.rate()}")
    loop.checkpoints.finish()
    return time.monotonic() - started


def evaluation_due(run: Run, step: int) -> bool:
    """Whether the policy is evaluated after this step."""
    interval = run.config.eval_interval
    return step == run.epochs.total_steps or (interval > 0 and step % interval == 0)


def train_step(
    run: Run, trainers: Trainers, batch: Batch, pairs: Sequence[PreferencePair]
) -> dict[str, float]:
    """One forward, one backward, one AdamW step; the metrics of the batch before it."""
    config, policy, started = run.config, trainers.policy, time.monotonic()
    loss = make_dpo_loss(pairs, trainers.references.of(pairs), run.objective)
    rate = config.lr_scheduler.learning_rate(config.learning_rate, batch.step, run.epochs.total_steps)
    data = [datum for pair in pairs for datum in pair.datums]
    result = policy.forward_backward_custom(data, loss, weighted_only=True)
    optimizer = policy.optim_step(config.adam_params(rate)).metrics
    work = StepWork(
        sum(pair.tokens for pair in pairs), time.monotonic() - started, batch.epoch, result.metrics
    )
    measured = {"epoch": batch.epoch, "lr": rate, "loss": result.metrics["dpo_loss"], **optimizer}
    dpo = {name: value for name, value in result.metrics.items() if ":" not in name}
    # TRL's names (`rewards/…`, `logps/…`) stand as they are, the guide's under `train/`.
    named = {**measured, **dpo, **work.metrics}
    return {name if "/" in name else f"train/{name}": value for name, value in named.items()}


def verify_first_batch(run: Run, policy: ReconnectableClient, references: AnyReferences) -> None:
    """Show how far the fast path is from the plain one on the first batch. Raises `VerificationFailed`.

    Nothing is cached before: what a wrong path computes must not be there for the next run.
    """
    first = next(run.epochs.batches())
    pairs = run.split.train.take(first.rows)
    loss = make_dpo_loss(pairs, references.asked_now(pairs), run.objective)
    data = [datum for pair in pairs for datum in pair.datums]
    verification = policy.verify(data, loss, weighted_only=True)
    for line in verification.lines:
        run.display.say(line)
    verification.refuse_disagreement()


def evaluate_heldout(run: Run, trainers: Trainers, loop: Loop, step: int) -> dict[str, float]:
    """Metrics on the held-out pairs, logged and shown; empty without any, and where a signal ends the run."""
    heldout = run.split.heldout
    metrics = (
        evaluate(
            trainers.policy, heldout, trainers.references, run.objective, abandon=lambda: loop.stop.asked
        )
        if heldout
        else {}
    )
    if not metrics:
        return {}
    loop.log(step, {f"eval/{name}": value for name, value in metrics.items()})
    run.display.say(heldout_line(step, metrics))
    return metrics
