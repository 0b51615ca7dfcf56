"""A run, whatever its recipe: what DPO, ORPO and SFT share. What differs is in `learner.Learner`.

Top to bottom: read and render all rows once (every bad row is known before a model is loaded; of the others an index is
kept), load the policy and, where the loss reads one, its frozen reference, take the reference's log-probabilities once
(from the cache where it has them), then per step one forward, one backward and one `optim_step`, while the next
rows are rendered; evaluate on held-out rows, export. With `dcp_save_interval` a run that was killed goes on from its
last checkpoint when it is started again, and ends with the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from typing import Any

from firesteel.sdk import (
    CheckpointError,
    NonFiniteError,
    ServiceClient,
    TrainerLost,
    TrainerRewound,
)
from training.utils.checkpoints import Checkpoints, Identity, Position, Retention
from training.utils.displacement import DisplacementWatch, since_start
from training.utils.environment import Environment
from training.utils.evaluation import Answers
from training.utils.heldout_rows import HeldoutRows, read_heldout, write_heldout
from training.utils.loop import Loop, SavedRun
from training.utils.metrics import Savings, StepWork, heldout_line, nonfinite_told, step_line, symptoms
from training.utils.progress import Display, Stage
from training.utils.rendering import Renderer
from training.utils.resume import (
    Finished,
    GoOn,
    Losses,
    Wanted,
    find_start,
    first_day,
    rewind,
)
from training.utils.row_index import index_rows
from training.utils.row_outcomes import Rendering, write_row_outcomes
from training.utils.row_sets import select_rows
from training.utils.run import Run, data_identity, doubts_of, epochs_of, refuse_prompts, split_pairs
from training.utils.run_folder import RunFolder
from training.utils.schedules import Batch
from training.utils.sinks import MetricsLog, Sink, close_trackers, logged
from training.utils.sources import sources_left_out
from training.utils.stopping import stopping_on_signals
from training.utils.trackers import TrackedRun
from training.utils.trainers import Trainers, build_service, load
from training.utils.training_settings import (
    MAY_CHANGE_WHEN_GOING_ON,
    TrainingSettings,
)


@dataclass(frozen=True)
class RunSummary:
    """What a run came to."""

    steps: int
    before: dict[str, float]
    """Held-out metrics before the first step; empty without held-out rows."""
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
    warnings: list[str] = field(default_factory=list)
    """What should be looked at before the result is used: in the data, and in how the policy has changed."""


def run_to_its_end(config: TrainingSettings) -> RunSummary:
    """Train and export. Raises `UserError` for what the user can mend, before any model work where possible.

    A trainer behind HTTP that lost its state makes the run go back to its newest checkpoint.
    """
    losses = Losses(config.log_path, config.recipe)
    while True:
        try:
            return run_once(config, losses.begun)
        except (TrainerLost, TrainerRewound) as lost:
            if losses.go_back(lost):
                # By the code of resume: what is held in memory is ahead of the checkpoint.
                config = config.model_copy(update={"resume": "auto"})


def run_once(config: TrainingSettings, begun: Callable[[], None]) -> RunSummary:
    """The run from where its folder leaves it to its end. `begun` is called when that folder is this run's."""
    config.trackers.refuse_missing()
    display = Display()
    day = first_day(config.log_path, config.resume)
    renderer = Renderer.load(config.tokenizer_model or config.base_model, day)
    files = [path for path in (config.dataset, config.eval_dataset) if path]
    kind = config.learner.rows
    indexes = [index_rows(path, renderer, kind, config.on_bad_row, display.reading(path)) for path in files]
    with build_service(config) as service, ExitStack() as stack:
        longest = service.longest_sequence()
        refuse_prompts(config, renderer, longest)
        rules = Rendering(config.max_seq_len or longest, config.truncate)
        limits = (config.most_rows, None)  # held-out rows are all used
        selections = [
            stack.enter_context(closing(select_rows(index, renderer, rules, most)))
            for index, most in zip(indexes, limits, strict=False)
        ]
        split = split_pairs([selected.rows for selected in selections], config)
        folder = stack.enter_context(closing(RunFolder.open(config.log_path, config.takeover)))
        data = {"recipe": config.recipe, **data_identity(indexes, renderer, rules, split)}
        identity = Identity(config.resolved(), data)
        wanted = Wanted(identity, MAY_CHANGE_WHEN_GOING_ON, epochs_of(config, split).total_steps)
        start = find_start(folder, config.resume, wanted)
        if isinstance(start, Finished):
            return summary_of_finished(start, display, config)
        for rows in selections:
            display.say(rows.summary + (f" (listed in {folder.bad_rows})" if rows.lost else ""))
        doubts = list(doubts_of(config, selections, split))
        for doubt in doubts:
            display.say(f"warning: {doubt}")
        run = Run(config, split, renderer, folder, display, identity, start, doubts)
        stop = stack.enter_context(stopping_on_signals())
        trainers = stack.enter_context(closing(load(run, service)))
        # Up to here nothing in the folder has changed: whatever was wrong, an earlier run is as it was.
        trackers = begin(run)
        metrics = stack.enter_context(closing(MetricsLog(folder.metrics, trackers, display.say)))
        Environment.of_a_run(run, trainers.policy.description).write(folder.environment)
        begun()
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


def summary_of_finished(start: Finished, display: Display, config: TrainingSettings) -> RunSummary:
    """What a run came to that has nothing left to do."""
    for line in start.said:
        display.say(f"not read, the run is finished: {line}")
    display.say(f"{config.log_path}: finished, {start.summary['steps']} steps; more epochs continue it")
    try:
        return RunSummary(**start.summary)
    except TypeError as error:
        raise CheckpointError(f"{config.log_path}/summary.json is not one of this program: {error}") from None


def begin(run: Run) -> list[Sink]:
    """Make the folder this run's, and open its trackers; if one refuses, an earlier run is there as before."""
    folder, start, config = run.folder, run.start, run.config
    with ExitStack() as on_failure:
        if isinstance(start, GoOn):
            # First, for what comes after it is not undone; and it moves nothing that trackers write to.
            trackers = config.trackers.opened(TrackedRun(folder.path, config.resolved(), start.position.step))
            on_failure.callback(close_trackers, trackers, run.display.say)
            for line in (f"going on from {start.checkpoint}", *start.said, *rewind(folder, start)):
                run.display.say(line)
            folder.write_config(config.resolved())
        else:
            previous = folder.set_aside()
            on_failure.callback(folder.put_back, previous)
            folder.write_config(config.resolved())
            trackers = config.trackers.opened(TrackedRun(folder.path, config.resolved()))
            if previous:
                run.display.say(f"{config.log_path} held an earlier run: moved to {previous}")
        on_failure.pop_all()
    return trackers


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
    watch = displacement_watch(run)
    training_seconds = train_epochs(run, trainers, loop, watch)
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
    warnings = watch.verdict(position.before, after if run.split.heldout else None)
    for warning in warnings:
        run.display.say(f"warning: at the end of the run: {warning}")
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
        warnings=[*map(str, run.doubts), *warnings],
    )
    folder.write_summary(asdict(summary))
    loop.stop.exit_if_asked()
    if config.report:  # the run is finished: whatever becomes of its picture, nothing of it is lost
        from training.utils.report import report_at_the_end

        run.display.say(report_at_the_end(folder.path))
    return summary


def displacement_watch(run: Run) -> DisplacementWatch:
    """It goes by training steps where no pairs are held out: also by those of before, in a run that goes on."""
    earlier = isinstance(run.start, GoOn) and not run.split.heldout
    return DisplacementWatch(logged(run.folder.metrics) if earlier else ())


def train_epochs(run: Run, trainers: Trainers, loop: Loop, watch: DisplacementWatch) -> float:
    """All steps that are left, the next rows being rendered meanwhile; returns the seconds they took."""
    savings = Savings()
    epochs, done, started = run.epochs, loop.position.step, time.monotonic()
    ahead = run.split.train.taken_ahead(batch.rows for batch in epochs.batches(done))
    kind = run.learner.rows
    made_by = kind.counts(run.split.train.records)
    left = sum(int(made_by[list(batch.rows)].sum()) for batch in epochs.batches(done))
    stage = Stage("training", left, f"{kind.item}s")
    with closing(ahead) as taken, run.display.bar(stage) as bar:
        for batch, rows in zip(epochs.batches(done), taken, strict=True):
            loop.checkpoints.list_if_written()
            try:
                metrics = train_step(run, trainers, batch, rows.items)
            except NonFiniteError as error:
                metrics = loop.skip_or_refuse(
                    batch, list(dict.fromkeys(item.line for item in rows.items)), error
                )
            for symptom in symptoms(batch.step, metrics):
                run.display.say_once(f"warning: step {batch.step}: {symptom}", about=symptom)
            loop.log(batch.step, metrics | {"train/data_wait_sec": rows.waited})
            line = step_line(batch.step, epochs.total_steps, metrics, run.learner.shown)
            bar.advance(len(rows.items), int(metrics.get("train/step_tokens", 0)), line)
            savings.add(metrics)
            watch.step(metrics)
            due = evaluation_due(run, batch.step)
            heldout = evaluate_heldout(run, trainers, loop, batch.step) if due else {}
            for warning in watch.warnings(loop.position.before, heldout if run.split.heldout else None):
                run.display.say(f"warning: step {batch.step}: {warning}")
            loop.made(batch, heldout)
        run.display.say(f"trained: {epochs.total_steps - done} steps, {bar.count} {stage.unit}, {bar.rate()}")
        run.display.say(savings.line(trainers.references.counts))
    loop.checkpoints.finish()
    return time.monotonic() - started


def evaluation_due(run: Run, step: int) -> bool:
    """Whether the policy is evaluated after this step."""
    interval = run.config.eval_interval
    return step == run.epochs.total_steps or (interval > 0 and step % interval == 0)


def train_step(run: Run, trainers: Trainers, batch: Batch, items: Sequence[Any]) -> dict[str, float]:
    """One forward, one backward, one AdamW step; the metrics of the batch before it."""
    config, policy, started = run.config, trainers.policy, time.monotonic()
    rate = config.lr_scheduler.learning_rate(config.learning_rate, batch.step, run.epochs.total_steps)
    result = run.learner.accumulate(policy, items, trainers.references)
    optimizer = policy.optim_step(config.adam_params(rate)).metrics
    work = StepWork(
        tokens=sum(datum.model_input.length + 1 for datum in run.learner.data(items)),
        seconds=time.monotonic() - started,
        with_reference=config.reference_settings is not None and batch.epoch == 1,
        computed=result.metrics,
    )
    told = {name: value for name, value in result.metrics.items() if ":" not in name}
    measured = {"epoch": batch.epoch, "lr": rate, "loss": told[run.learner.loss_name], **optimizer}
    # TRL's names (`rewards/…`, `logps/…`) stand as they are, the guide's under `train/`.
    named = {**measured, **told, **work.metrics, **trainers.references.counts}
    return {name if "/" in name else f"train/{name}": value for name, value in named.items()}


def evaluate_heldout(run: Run, trainers: Trainers, loop: Loop, step: int) -> dict[str, float]:
    """Metrics on the held-out rows, logged and shown; empty without any, and where a signal ends the run."""
    heldout, kept = run.split.heldout, list[HeldoutRows]()
    if not len(heldout):
        return {}
    metrics = run.learner.evaluate(
        trainers.policy, heldout, trainers.references, lambda: loop.stop.asked, kept.append
    )
    if not metrics:
        return {}
    for rows in kept:
        if step and rows.has_sides and "delta_logp/chosen" not in metrics:
            changes = since_start(read_heldout(run.folder.path, 0), rows)
            metrics |= changes
            if not changes and rows.finite:
                run.display.say_once(
                    "held out: what the pairs were before training is not known, so likelihood displacement is not "
                    "looked for"
                )
        if lost := rows.nonfinite_lines:
            run.display.say(f"warning: held out after step {step}: {nonfinite_told(lost)}")
        run.folder.refuse_if_taken_over()
        write_heldout(run.folder.path, step, rows)
    loop.log(step, {f"eval/{name}": value for name, value in metrics.items()})
    run.display.say(heldout_line(step, metrics, run.learner.shown))
    if left_out := sources_left_out(metrics):
        run.display.say_once(left_out)
    return metrics
