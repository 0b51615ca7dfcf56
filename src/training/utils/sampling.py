"""What a trained model answers: the newest weights of a run, or one of its checkpoints, beside its base model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import firesteel
from firesteel.catalog import load_catalog
from firesteel.sdk import (
    CheckpointError,
    ConfigError,
    LoraConfig,
    ModelError,
    Provisioning,
    SamplingParams,
    ServiceClient,
    TrainingClient,
)
from training.utils.client import ReconnectableClient
from training.utils.config import TrainerConfig
from training.utils.rendering import Renderer
from training.utils.run_folder import is_a_run
from training.utils.run_weights import RunModel, RunWeights, weights_of

MOST_TOKENS = 256
"""Of an answer, where nothing is asked for and the model's context has room."""


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn."""

    max_tokens: int | None = None
    """None = `MOST_TOKENS`, or as many as the model takes behind the prompt."""
    temperature: float = 0.0
    """0 = always the likeliest token."""
    seed: int | None = None
    """None = another answer each time. Not read at temperature 0."""

    def __post_init__(self) -> None:
        if self.seed is not None and self.temperature == 0:
            raise ConfigError(
                "seed is not read at temperature 0, where the answer is always the same; give a temperature too"
            )


GREEDY = Sampling()


@dataclass(frozen=True)
class SampledAnswer:
    """What a model said."""

    text: str
    tokens: int
    """That were drawn, the end of the turn included."""
    cut: bool
    """It had not ended when the limit came."""


def ask(
    client: ReconnectableClient, renderer: Renderer, prompt: str, sampling: Sampling = GREEDY
) -> SampledAnswer:
    """The answer to one user message, through the tokenizer's chat template."""
    question = renderer.question(prompt)
    left = client.description.max_context_length - len(question)
    params = SamplingParams(
        max_tokens=sampling.max_tokens or max(1, min(MOST_TOKENS, left)),
        temperature=sampling.temperature,
        stop=(renderer.end_of_turn,),
        seed=sampling.seed,
    )
    drawn = client.sample(question, 1, params).sequences[0]
    return SampledAnswer(renderer.answer_text(drawn.tokens), len(drawn.tokens), drawn.stop_reason == "length")


@dataclass(frozen=True)
class Exchange:
    """A prompt, and what was said to it."""

    prompt: str
    answer: SampledAnswer
    base: SampledAnswer | None
    """Of the base model, where that was asked, too."""


@dataclass(frozen=True)
class Subject:
    """What is tried: the weights of a run, or a model by itself."""

    base_model: str
    tokenizer: str
    weights: RunWeights | None = None
    lora: LoraConfig | None = None
    trainer: TrainerConfig | None = None
    run: Path | None = None
    step: int | None = None
    """That was asked for."""

    def as_it_is_now(self) -> Subject:
        """With the weights that are the newest by now: a run that is training saves others, and prunes."""
        return self if self.run is None else replace(self, weights=weights_of(self.run, self.step))

    @property
    def described(self) -> str:
        """`runs/mine/checkpoints/step-40, an adapter of rank 16 on smollm2-135m-instruct`."""
        if self.weights is None:
            return self.base_model
        what = f"an adapter of rank {self.lora.rank} on" if self.lora else "all weights trained of"
        return f"{self.weights.path}, {what} {self.base_model}"

    def provisioning(self) -> Provisioning:
        """An adapter's base is always shared; weights that nobody trains any more need a forward pass only."""
        shapes = self.trainer or TrainerConfig()
        return Provisioning(
            lora_rank=self.lora.rank if self.lora else 0,
            training_shape_id=shapes.training_shape_id if self.lora else None,
            reference_training_shape_id=None if self.lora else shapes.reference_training_shape_id,
        )

    def load(self, service: ServiceClient) -> TrainingClient:
        """The model that is tried."""
        if self.weights is None:
            return service.create_reference_client(self.base_model)
        start = str(self.weights.path)
        if self.lora is not None:
            return service.create_training_client(self.base_model, lora_config=self.lora, start=start)
        if self.weights.form == "model":
            return service.create_reference_client(start)
        return service.create_reference_client(self.base_model, start=start)


def subject_of(name: str, step: int | None = None, with_base: bool = False) -> Subject:
    """What a run folder, or else a model's name, stands for.

    Raises `CheckpointError` for a run without such weights and for a folder that is neither, `ModelError` for a name
    that is no model's, `ConfigError` where a model by itself is asked for a step or for its base.
    """
    run = Path(name)
    if is_a_run(run / "config.json"):
        model = RunModel.of(run)
        weights = weights_of(run, step)
        return Subject(model.base_model, model.tokenizer, weights, model.lora, model.trainer, run, step)
    if run.is_dir() and not (run / "config.json").is_file():
        raise CheckpointError(f"{run} is the folder neither of a run nor of a model{_meant(run)}")
    if step is not None or with_base:
        asked = "--step" if step is not None else "--base"
        raise ConfigError(f"{asked}: {name} is not the folder of a run; a model by itself has neither")
    try:
        load_catalog().resolve_model(name)
    except ModelError as error:
        raise ModelError(f"there is no run folder {name}, and as a model: {error}") from None
    return Subject(name, name)


def _meant(folder: Path) -> str:
    """A checkpoint or an adapter that is named by itself lies in its run."""
    runs = [parent for parent in folder.parents if is_a_run(parent / "config.json")]
    if not runs:
        return ""
    number = folder.name.removeprefix("step-")
    step = f" --step {number}" if number.isdigit() else ""
    return f"; its run is `firesteel sample {runs[0]}{step}`"


class Tried:
    """The models that are tried, loaded when they are first asked. See `trying`."""

    def __init__(self, service: ServiceClient, subject: Subject) -> None:
        self._service = service
        self._renderer = Renderer.load(subject.tokenizer)
        self._renderer.question("?")  # what the tokenizer lacks is known before a model is loaded
        self._trained: ReconnectableClient | None = None
        self._base: ReconnectableClient | None = None
        self.subject = subject.as_it_is_now()  # last: getting here has taken seconds

    def exchange(self, prompt: str, sampling: Sampling, with_base: bool) -> Exchange:
        """One prompt now. What was loaded stays: of a run that trained all weights that may be two models."""
        answer = ask(self._trained_client(), self._renderer, prompt, sampling)
        base = ask(self._base_client(), self._renderer, prompt, sampling) if with_base else None
        return Exchange(prompt, answer, base)

    def exchanges(self, prompts: Sequence[str], sampling: Sampling, with_base: bool) -> list[Exchange]:
        """All of these prompts. Where the base model is one of its own, it is loaded when the other is let go."""
        for prompt in prompts:
            self._renderer.question(prompt)  # refused before a model is loaded
        answers = [ask(self._trained_client(), self._renderer, prompt, sampling) for prompt in prompts]
        if not with_base:
            return [Exchange(prompt, answer, None) for prompt, answer in zip(prompts, answers, strict=True)]
        if self.subject.lora is None:
            self._service.release_references()
            self._trained = None
        others = [ask(self._base_client(), self._renderer, prompt, sampling) for prompt in prompts]
        return [Exchange(*parts) for parts in zip(prompts, answers, others, strict=True)]

    def _trained_client(self) -> ReconnectableClient:
        if self._trained is None:
            self._trained = ReconnectableClient.from_training_client(self.subject.load(self._service))
        return self._trained

    def _base_client(self) -> ReconnectableClient:
        if self._base is None:
            client = self._service.create_reference_client(self.subject.base_model)
            self._base = ReconnectableClient.from_training_client(client)
        return self._base


@contextmanager
def trying(subject: Subject) -> Iterator[Tried]:
    """In this process, or where FIRESTEEL_BASE_URL says."""
    with firesteel.connect(provisioning=subject.provisioning()) as service:
        yield Tried(service, subject)
