"""Programs that draw the numbers of runs: Weights & Biases, trackio, TensorBoard. Each is an extra, and asked for.

Nothing here needs a network. W&B without a key writes into the run folder, trackio into its own database on this
machine, TensorBoard event files into the run folder. A run that goes on from a checkpoint makes steps again that a
killed process has logged already. TensorBoard is told where that begins, and drops what it knew from there on. The
other two cannot take back a step: there it is a run of its own.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from firesteel.sdk.errors import ConfigError
from training.utils.config import TensorBoardConfig, TrackioConfig, WandBConfig
from training.utils.sinks import Sink, close_trackers

logger = logging.getLogger("firesteel")

TENSORBOARD = "tensorboard"
"""Its folder in that of the run."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run."""

    folder: Path
    config: Mapping[str, Any]
    done: int | None = None
    """The step after which it goes on; None where it begins."""


@dataclass(frozen=True)
class Trackers:
    """Those that a run is told to use."""

    wandb: WandBConfig
    trackio: TrackioConfig
    tensorboard: TensorBoardConfig

    def refuse_missing(self) -> None:
        """Raise `ConfigError` for one that is asked for and not installed. Only W&B may be missing: with a warning."""
        asked = {"trackio": self.trackio.project, "tensorboard": self.tensorboard.enabled}
        for name, wanted in asked.items():
            if wanted and importlib.util.find_spec(name) is None:
                raise ConfigError(
                    f"{name}: it is asked for, but not installed: pip install 'firesteel[{name}]', or leave it out"
                )

    def opened(self, run: TrackedRun) -> list[Sink]:
        """One sink for each. Raises `ConfigError` for one that cannot be opened; then none is open."""
        sinks: list[Sink] = []
        with ExitStack() as on_failure:
            on_failure.callback(close_trackers, sinks, logger.warning)
            for opener in self._openers():
                sink = opener.opened(run)
                sinks.append(sink)
            on_failure.pop_all()
        return sinks

    def _openers(self) -> Iterator[_Opener]:
        if self.wandb.project or self.wandb.entity:
            if importlib.util.find_spec("wandb") is None:
                logger.warning(
                    "wandb is configured but not installed (pip install 'firesteel[wandb]'); going on without"
                )
            else:
                offline = "set WANDB_MODE=offline to write into the run folder"
                yield _Opener("wandb", lambda run: WandBSink(run, self.wandb), offline)
        if project := self.trackio.project:
            yield _Opener("trackio", lambda run: TrackioSink(run, project, self.trackio.run_name))
        if self.tensorboard.enabled:
            yield _Opener("tensorboard", TensorBoardSink)


@dataclass(frozen=True)
class _Opener:
    name: str
    make: Callable[[TrackedRun], Sink]
    instead: str = "mend that"

    def opened(self, run: TrackedRun) -> Sink:
        try:
            return self.make(run)
        except Exception as error:  # whatever fails in somebody else's program: ADR 12
            raise ConfigError(
                f"{self.name}: it is asked for, but cannot be opened: {type(error).__name__}: {error}; {self.instead}, "
                "or leave it out"
            ) from error


class WandBSink:
    """A Weights & Biases run; offline when no key is configured."""

    def __init__(self, run: TrackedRun, settings: WandBConfig) -> None:
        import wandb

        told = os.environ.get("WANDB_MODE") or os.environ.get("WANDB_API_KEY") or wandb.login(prompt=False)
        mode: Literal["offline"] | None = None if told else "offline"
        self._run = wandb.init(
            entity=settings.entity,
            project=settings.project,
            name=settings.run_name,
            dir=str(run.folder),
            config=dict(run.config),
            mode=mode,
        )
        self._run.define_metric("*", step_metric="train/step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send one record."""
        self._run.log({"train/step": step, **metrics})

    def close(self) -> None:
        """Finish the W&B run."""
        self._run.finish()


class TrackioSink:
    """A run in trackio's own database on this machine, where `trackio show` looks."""

    def __init__(self, run: TrackedRun, project: str, run_name: str | None) -> None:
        import trackio

        name = run_name or run.folder.absolute().name
        with _hub_left_alone():
            self._run = trackio.init(
                project,
                name if run.done is None else f"{name} from step {run.done}",
                group=name,
                config=dict(run.config),
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queue one record; a thread of trackio's writes it."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Wait until all is written."""
        import trackio

        trackio.finish()  # rather than the run's own: at interpreter exit it would be finished once more


@contextmanager
def _hub_left_alone() -> Iterator[None]:
    """trackio asks the Hugging Face hub for the name that belongs to a token, if it finds one. A local run needs none.

    Whoever sends runs to a Space or a server of their own by trackio's variables is not held back.
    """
    if os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL"):
        yield
        return
    from huggingface_hub import constants

    offline, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


class TensorBoardSink:
    """An event file, written by torch's writer: it comes with torch, and can say which steps are made again."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        again_from = None if run.done is None else run.done + 1
        self._writer = SummaryWriter(str(run.folder / TENSORBOARD), purge_step=again_from, flush_secs=10)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queue one point for each number."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Wait until all is written."""
        self._writer.close()
