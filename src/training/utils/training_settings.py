"""The settings that recipes share: model, data, optimizer, evaluation, and what is shown."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from firesteel.sdk import AdamParams
from training.utils.config import TensorBoardConfig, TrackioConfig, TrainerConfig, WandBConfig
from training.utils.run_settings import RUN_SETTINGS_THAT_MAY_CHANGE, RunSettings, at_home
from training.utils.schedules import Schedule
from training.utils.trackers import Trackers

if TYPE_CHECKING:
    from training.utils.doubts import Doubt
    from training.utils.learner import Learner
    from training.utils.row_records import RowArray

ReferenceMode = Literal["upfront", "lazy"]
"""When the reference is asked: for all rows before training, or for each batch as it comes up."""


@dataclass(frozen=True)
class ReferenceSettings:
    """Which reference a run has, and when it is asked."""

    held_to: Literal["initial", "base"]
    mode: ReferenceMode


class TrainingSettings(RunSettings):
    """Base of the `Config` of a recipe that trains on rows. What every run has beside these is in `RunSettings`."""

    recipe: ClassVar[str]
    """Its verb on the command line."""

    base_model: str
    """Model to train: a catalogue name, Hugging Face id, folder or GGUF file."""
    dataset: str
    """JSONL file of what is trained on."""
    tokenizer_model: str = ""
    """Where the tokenizer and chat template come from; empty = `base_model`."""
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
    """Passes over the training rows."""
    batch_size: int = Field(default=4, ge=1)
    """Rows per optimizer step; a last, smaller batch is trained too."""
    max_seq_len: int | None = Field(default=None, ge=2)
    """Longest row in tokens, prompt and response; unset = what the trainer takes."""
    truncate: Literal["drop", "response_end"] = "drop"
    """Longer rows are dropped, or lose the end of their responses. Either is counted and listed."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """A row that cannot be used stops the run before it starts, or is skipped, counted and listed."""
    lora_rank: int = Field(default=0, ge=0)
    """Rank of the adapter; 0 trains all weights."""
    lora_alpha: float = Field(default=32.0, gt=0)
    """The adapter is scaled by alpha / rank."""
    eval_dataset: str | None = None
    """JSONL file of held-out rows."""
    eval_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Without `eval_dataset`: share of the dataset held out, whole prompts at a time; 0 = none."""
    eval_interval: int = Field(default=0, ge=0)
    """Evaluate every so many steps; 0 = only before and after training."""
    sample_prompts: tuple[str, ...] = ()
    """User messages that the model answers before and after training: one, or a list as `['Hello?', 'And you?']`."""
    sample_max_tokens: int = Field(default=96, ge=1)
    """Longest such answer."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the row order, the adapter's start and the held-out split."""
    shuffle: bool = True
    """A new row order every epoch."""
    verify: bool = False
    """Before training, compare the first batch with transformers' own forward; a difference ends the run."""
    keep_best: str | None = None
    """With keep_last: keep also the one with the best value of this held-out metric, as accuracy or the loss."""
    trainer: TrainerConfig = TrainerConfig()
    """Training shapes."""
    wandb: WandBConfig = WandBConfig()
    """Weights & Biases."""
    trackio: TrackioConfig = TrackioConfig()
    """trackio."""
    tensorboard: TensorBoardConfig = TensorBoardConfig()
    """TensorBoard."""

    @property
    def trackers(self) -> Trackers:
        """Where numbers go beside `metrics.jsonl`."""
        return Trackers(self.wandb, self.trackio, self.tensorboard)

    def adam_params(self, learning_rate: float) -> AdamParams:
        """The optimizer's settings at this rate."""
        betas_and_eps = (self.adam_beta1, self.adam_beta2, self.adam_eps)
        return AdamParams(learning_rate, *betas_and_eps, self.weight_decay, self.grad_clip_norm)

    @property
    def learner(self) -> Learner[Any]:
        """What its rows are, and what the loss makes of them."""
        raise NotImplementedError

    @property
    def most_rows(self) -> int | None:
        """Use only the first so many usable rows."""
        raise NotImplementedError

    @property
    def reference_settings(self) -> ReferenceSettings | None:
        """How a reference is had, if the loss reads one."""
        return None

    def unread(self) -> Collection[str]:
        """Settings that this run does not read."""
        return () if self.lora_rank else ("lora_alpha",)

    def doubts(self, rows: RowArray) -> Iterator[Doubt]:
        """What of these settings comes to nothing with such training rows: said before a model is loaded."""
        yield from ()

    def resolved(self) -> dict[str, Any]:
        """See `RunSettings.resolved`; without what this run does not read."""
        return {name: value for name, value in super().resolved().items() if name not in self.unread()}

    @field_validator("dataset", "eval_dataset")
    @classmethod
    def _at_home(cls, path: str | None) -> str | None:
        return at_home(path)

    @field_validator("sample_prompts", mode="before")
    @classmethod
    def _text_is_a_prompt(cls, value: object) -> object:
        if isinstance(value, str):
            return (value,)
        if not isinstance(value, list | tuple):
            raise ValueError("expected one text, or a list of texts as ['Hello?', 'And you?']")
        return value

    @field_validator("lr_scheduler", mode="before")
    @classmethod
    def _name_is_a_schedule(cls, value: object) -> object:
        return {"type": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _possible(self) -> TrainingSettings:
        if self.eval_dataset and self.eval_fraction:
            raise ValueError("give eval_dataset or eval_fraction, not both")
        if self.eval_interval and not (self.eval_dataset or self.eval_fraction):
            raise ValueError("eval_interval needs held-out rows: eval_dataset or eval_fraction")
        if self.trainer.reference_training_shape_id and self.reference_settings is None:
            raise ValueError("trainer.reference_training_shape_id: this loss reads no reference")
        if self.lora_rank == 0 and "lora_alpha" in self.model_fields_set:
            raise ValueError("lora_alpha is not read at lora_rank 0")
        if self.warm_start_from_adapter and not self.lora_rank:
            raise ValueError("warm_start_from_adapter needs a lora_rank: the adapter's own")
        if self.keep_best and self.keep_best not in (known := self.learner.best_by):
            raise ValueError(f"keep_best: {self.keep_best!r}; there is {', '.join(known)}")
        if self.keep_best and self.keep_last is None:
            raise ValueError("keep_best says what stays beside keep_last; give that too")
        if self.keep_best and (not self.eval_interval or self.dcp_save_interval % self.eval_interval):
            raise ValueError(
                "keep_best: every checkpoint needs its evaluation; make dcp_save_interval a multiple of eval_interval"
            )
        return self


# fmt: off
MAY_CHANGE_WHEN_GOING_ON = RUN_SETTINGS_THAT_MAY_CHANGE | {
    # where things are and run: what they are is compared by content
    "base_model", "dataset", "tokenizer_model", "trainer", "reference_pass",
    # how the objective is followed from here on
    "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "grad_clip_norm", "lr_scheduler", "epochs",
    # what is looked at, shown and kept
    "eval_dataset", "eval_dataset content", "eval_interval", "sample_prompts", "sample_max_tokens", "verify", "wandb",
    "trackio", "tensorboard", "keep_best",
}
# fmt: on
"""Settings that may be others than before when a run goes on. A change of any other makes it another run."""
