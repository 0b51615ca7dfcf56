"""The models that an engine holds, and what each operation does to them."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from firesteel import store
from firesteel.catalog import ModelEntry, load_catalog
from firesteel.engine.capacity import Need, capacity_of
from firesteel.engine.devices import devices_found
from firesteel.engine.logprobs import Asked
from firesteel.engine.models import (
    BaseModel,
    load_base,
    longest_sequence,
    numerics_identity,
    on_shape,
)
from firesteel.engine.packing import plan
from firesteel.engine.sampling import sample
from firesteel.engine.states import is_state, read_start, read_state, write_state
from firesteel.engine.trainer import (
    Retained,
    Scores,
    Sequences,
    Trainer,
    built_in_loss,
    slopes_of,
)
from firesteel.fetching import shown_on_stderr
from firesteel.model_size import ACTIVATION_TOKEN_BUDGET, TRAINED_COPIES
from firesteel.sdk.errors import CheckpointError, ModelError, OperationError
from firesteel.sdk.operations import (
    Backward,
    CreateBaseReference,
    CreateModel,
    DropGradient,
    Examine,
    Forward,
    ForwardBackward,
    IdentifyModel,
    LoadState,
    ModelDescription,
    ModelIdentity,
    Operation,
    OptimStep,
    Refused,
    ReleaseForward,
    ResolveShape,
    Sample,
    SaveState,
    SaveWeights,
    UnloadModel,
    operation_name,
)
from firesteel.sdk.shapes import TrainingShape
from firesteel.sdk.types import (
    Datum,
    Examined,
    FloatArray,
    ForwardBackwardOutput,
    LoadStateResponse,
    ModelInput,
    OptimStepResponse,
    SampleResponse,
    SaveStateResponse,
    SaveWeightsResponse,
    TensorData,
)
from firesteel.sdk.validation import check_data
from firesteel.sealed import FolderInUse, storage_errors, sync

KEPT_FORWARDS = 128
SHARED_BUDGETS = 4


@dataclass(frozen=True)
class RetainedForward:
    """What a `Backward` needs of the forward it belongs to."""

    retained: Retained
    answer: ForwardBackwardOutput
    offered: bool
    """To a `ForwardBackward` of the same data, instead of to a `Backward`."""


@dataclass
class HostedModel:
    """A model, its trainer, and forwards that a backward may follow."""

    description: ModelDescription
    trainer: Trainer
    retained: dict[int, RetainedForward] = field(default_factory=dict)

    def retain(self, seq_id: int, forward: RetainedForward) -> None:
        """Keep a forward; of too many, whose backwards never came, the oldest goes."""
        self.retained[seq_id] = forward
        if len(self.retained) > KEPT_FORWARDS:
            del self.retained[min(self.retained)]

    @property
    def graph_tokens(self) -> int:
        """Tokens of the graphs that wait for their backward."""
        return sum(forward.retained.tokens for forward in self.retained.values())

    def take_offered(self, sequences: Sequences) -> RetainedForward | None:
        """The forward that was offered to a call of these sequences, and is its own from now on."""
        for seq_id, forward in self.retained.items():
            if forward.offered and forward.retained.sequences.same_as(sequences):
                return self.retained.pop(seq_id)
        return None


class Host:
    """Runs one operation at a time. Knows no queue, no order and no thread.

    A base network is loaded once per folder, device and dtype and shared by all that leave it frozen.
    """

    def __init__(self) -> None:
        self._catalog = load_catalog()
        self.models: dict[str, HostedModel] = {}
        self._shared_bases: dict[tuple[str, str, str], BaseModel] = {}
        self._verified: set[Path] = set()
        self._in_use: dict[Path, FolderInUse] = {}
        self._capacity: dict[str, int] = {}
        self._numbers = itertools.count(1)
        # States are copied in their turn and written while training goes on, one after the other.
        self._writer = ThreadPoolExecutor(1, "firesteel-states")

    def run(self, operation: Operation) -> Any:
        """The operation's result, or the future of one that is still being written; raises its error."""
        match operation:
            case ResolveShape():
                return self._resolve_shape(operation)
            case CreateModel():
                return self._create_model(operation)
            case CreateBaseReference():
                return self._create_base_reference(operation)
            case UnloadModel():
                return self._unload(operation.model_id)
            case IdentifyModel():
                trainer = self._model(operation.model_id).trainer
                return ModelIdentity(trainer.identity(), numerics_identity(trainer.base))
            case Forward():
                return self._forward(operation)
            case ForwardBackward():
                return self._forward_backward(operation)
            case Backward():
                return self._backward(operation)
            case Examine():
                return self._examine(operation)
            case ReleaseForward():
                self._model(operation.model_id).retained.pop(operation.of, None)
                return None
            case OptimStep():
                model = self._model(operation.model_id)
                metrics = model.trainer.optim_step(operation.adam_params)
                model.retained.clear()  # their log-probabilities are of weights that are gone
                return OptimStepResponse(metrics)
            case DropGradient():
                self._model(operation.model_id).trainer.drop_gradient()
                return None
            case SaveWeights():
                return self._save_weights(operation)
            case SaveState():
                return self._save_state(operation)
            case LoadState():
                return self._load_state(operation)
            case Sample():
                return self._sample(operation)
            case Refused():
                raise OperationError(operation.reason)

    def _resolve_shape(self, operation: ResolveShape) -> TrainingShape:
        """The catalogue's shape, with the model's own limit where the shape sets none or a larger one."""
        wanted = (operation.base_model, operation.modes, operation.min_context)
        shape = self._catalog.resolve_shape(operation.name, *wanted, devices_found())
        longest = longest_sequence(operation.base_model, *self._fetch(operation.base_model), shape)
        if operation.min_context is not None and longest < operation.min_context:
            raise ModelError(
                f"{operation.base_model} takes {longest} tokens, {operation.min_context} were asked for; ask for "
                f"at most {longest} (max_seq_len, max_context_length)"
            )
        return replace(shape, max_context_length=longest)

    def _fetch(self, model: str) -> tuple[ModelEntry, Path]:
        entry = self._catalog.resolve_model(model)
        with shown_on_stderr(model) as progress:
            return entry, store.fetch(entry, progress)

    def _create_model(self, operation: CreateModel) -> ModelDescription:
        owns_weights = operation.lora is None and (operation.trainable or operation.start is not None)
        self._finish_writing()
        start = read_start(Path(operation.start), operation.lora) if operation.start is not None else None
        description = self._host(self._load(operation, owns_weights), operation)
        if (
            operation.lora is not None
            and self._held_bytes(operation.shape) > self._capacity[operation.shape.device]
        ):
            self._unload(description.model_id)
            raise ModelError(
                f"{operation.base_model}: an adapter of rank {operation.lora.rank} does not fit beside the models "
                "that are loaded; unload some, or choose a lower rank"
            )
        if start is not None:
            try:
                self.models[description.model_id].trainer.begin_with(*start)
            except CheckpointError:
                self._unload(description.model_id)
                raise
        return description

    def _load(self, operation: CreateModel, owns_weights: bool) -> BaseModel:
        """A frozen base is loaded once and shared; a policy that trains all weights has its own copy."""
        shape = operation.shape
        entry, folder = self._fetch(operation.base_model)
        if entry.kind != "folder" and folder not in self._in_use:
            self._in_use[folder] = FolderInUse(folder)  # its weights are mapped: `models rm` leaves them
        if entry.kind != "folder" and folder not in self._verified:
            # A flipped bit in the weights would train, and nobody would know.
            store.verify(folder, entry.name)
            self._verified.add(folder)
        if owns_weights:
            self._refuse_over_commit(Need.of(operation.base_model, folder, shape, operation.trainable), shape)
            return load_base(operation.base_model, entry, folder, shape)
        key = (str(folder), shape.device, shape.dtype)
        if key not in self._shared_bases:
            self._refuse_over_commit(Need.of(operation.base_model, folder, shape, trained=False), shape)
            self._shared_bases[key] = load_base(operation.base_model, entry, folder, shape)
        return on_shape(self._shared_bases[key], operation.base_model, shape)

    def _refuse_over_commit(self, need: Need, shape: TrainingShape) -> None:
        if shape.device not in self._capacity:  # as it was before the first model
            self._capacity[shape.device] = capacity_of(shape.device)
        need.refuse_if_more(self._capacity[shape.device], self._held_bytes(shape))

    def _held_bytes(self, shape: TrainingShape) -> int:
        """By models on the device of this shape; what an adapter takes is known once it is made."""
        bases = [*self._shared_bases.values(), *(model.trainer.base for model in self.models.values())]
        networks = {id(base.network): base.network for base in bases if base.device == shape.device}
        held: int = sum(p.nbytes for network in networks.values() for p in network.parameters())
        trained = (m.trainer for m in self.models.values() if m.description.trainable)
        return held + sum(
            (TRAINED_COPIES - 1) * t.trained_bytes for t in trained if t.base.device == shape.device
        )

    def _create_base_reference(self, operation: CreateBaseReference) -> ModelDescription:
        policy = self._model(operation.policy_id)
        if not policy.description.lora_rank:
            raise OperationError(
                f"{operation.policy_id} trains all its weights; nothing of its base is left to share as a reference"
            )
        description = policy.description
        return self._host(
            policy.trainer.base,
            CreateModel(
                description.base_model, description.shape, trainable=False, model_id=operation.model_id
            ),
        )

    def _host(self, base: BaseModel, operation: CreateModel) -> ModelDescription:
        model_id = operation.model_id or f"model-{next(self._numbers)}"
        if model_id in self.models:
            raise OperationError(f"create_model: there is a model {model_id!r} already")
        trainer = Trainer(
            base, model_id, operation.lora, operation.trainable, operation.activation_token_budget
        )
        description = ModelDescription(
            model_id=model_id,
            base_model=operation.base_model,
            shape=operation.shape,
            lora_rank=operation.lora.rank if operation.lora else 0,
            max_context_length=base.max_context_length,
            attention=base.attention,
            trainable=operation.trainable,
            activation_token_budget=trainer.activation_token_budget,
        )
        self.models[model_id] = HostedModel(description, trainer)
        return description

    def _unload(self, model_id: str) -> None:
        trainer = self._model(model_id).trainer
        trainer.unload()
        del self.models[model_id]
        network = trainer.base.network
        if all(model.trainer.base.network is not network for model in self.models.values()):
            self._shared_bases = {k: b for k, b in self._shared_bases.items() if b.network is not network}

    def _forward(self, operation: Forward) -> ForwardBackwardOutput:
        model = self._model(operation.model_id)
        check_data(operation.data, operation.loss_fn, operation.loss_fn_config, operation.weighted_only)
        loss = built_in_loss(operation.loss_fn, operation.data, operation.loss_fn_config)
        sequences = _sequences(model, operation.data, operation.weighted_only)
        offered = operation.offer and model.description.trainable
        if not (operation.retain or offered):
            return _answer(model.trainer.forward(sequences, loss))
        scores, retained = model.trainer.forward_retained(sequences, loss, self._graph_tokens_held(model))
        forward = RetainedForward(retained, _answer(scores), offered)
        model.retain(operation.seq_id, forward)
        return forward.answer

    def _graph_tokens_held(self, model: HostedModel) -> int:
        """Tokens whose graphs are kept, as far as they take from this model's budget.

        All models of a device share `SHARED_BUDGETS` times the default: each may use its own while others leave room.
        """
        own = model.graph_tokens
        device = model.description.shape.device
        beside = [m for m in self.models.values() if m is not model and m.description.shape.device == device]
        room_beside = (SHARED_BUDGETS - 1) * ACTIVATION_TOKEN_BUDGET[device]
        return own + max(0, sum(m.graph_tokens for m in beside) - room_beside)

    def _forward_backward(self, operation: ForwardBackward) -> ForwardBackwardOutput:
        model = self._model(operation.model_id)
        check_data(operation.data, operation.loss_fn, operation.loss_fn_config, operation.weighted_only)
        loss = built_in_loss(operation.loss_fn, operation.data, operation.loss_fn_config)
        sequences = _sequences(model, operation.data, operation.weighted_only)
        offered = model.take_offered(sequences)
        if offered is None:
            return _answer(model.trainer.forward_backward(sequences, loss))
        outputs = offered.answer.loss_fn_outputs
        total, slopes = slopes_of(loss, [output["logprobs"].to_numpy() for output in outputs])
        model.trainer.backward(offered.retained, slopes)
        return replace(offered.answer, metrics={**offered.answer.metrics, "loss:sum": total})

    def _backward(self, operation: Backward) -> ForwardBackwardOutput:
        model = self._model(operation.model_id)
        forward = model.retained.pop(operation.of, None)
        if forward is None:
            raise OperationError(
                f"{operation_name(operation)}: forward seq {operation.of} is not kept: it was not sent with retain, "
                f"its backward has run, the weights have changed since, or it waited too long for a backward"
            )
        _check_shapes(operation, forward.retained.sequences, operation.dloss_dlogprob)
        model.trainer.backward(forward.retained, operation.dloss_dlogprob)
        return forward.answer

    def _examine(self, operation: Examine) -> Examined:
        model = self._model(operation.model_id)
        check_data(operation.data, "cross_entropy", None, operation.weighted_only)
        sequences = _sequences(model, operation.data, operation.weighted_only)
        if operation.dloss_dlogprob is not None:
            _check_shapes(operation, sequences, operation.dloss_dlogprob)
        return Examined(*model.trainer.examine(sequences, operation.attention, operation.dloss_dlogprob))

    def _save_weights(self, operation: SaveWeights) -> SaveWeightsResponse:
        model = self._model(operation.model_id)
        if not model.description.trainable:
            raise OperationError("save_weights: this model is a frozen reference; it only runs forward")
        trainer, target = model.trainer, Path(operation.path)
        if target.exists():
            raise OperationError(f"save_weights: {target} exists already; name a folder that does not")
        partial = target.with_name(f".partial-{target.name}")
        with storage_errors(target, trainer.trained_bytes):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            try:
                trainer.write_weights(partial, operation.merged)
                if operation.merged or not trainer.adapted:
                    store.copy_tokenizer(trainer.base.folder, partial)
                for path in (*partial.iterdir(), partial):
                    sync(path)
                partial.rename(target)
                sync(target.parent)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return SaveWeightsResponse(str(target))

    def _save_state(self, operation: SaveState) -> Future[SaveStateResponse]:
        model, target = self._model(operation.model_id), Path(operation.path)
        if target.exists():
            raise OperationError(f"save_state: {target} exists already; name a folder that does not")
        state = model.trainer.state()

        def write() -> SaveStateResponse:
            write_state(state, target, operation.notes)
            return SaveStateResponse(str(target))

        return self._writer.submit(write)

    def _load_state(self, operation: LoadState) -> LoadStateResponse:
        model, folder = self._model(operation.model_id), Path(operation.path)
        self._finish_writing()
        if operation.optimizer or is_state(folder):
            differences = model.trainer.load_state(read_state(folder, operation.optimizer))
        else:
            differences = ()
            model.trainer.load_weights(*read_start(folder, model.trainer.lora))
        model.retained.clear()  # their log-probabilities are of weights that are gone
        return LoadStateResponse(str(folder), differences)

    def _sample(self, operation: Sample) -> SampleResponse:
        model, prompt = self._model(operation.model_id), operation.prompt
        with model.trainer.generating() as base:
            sequences = sample(base, prompt, operation.sampling_params, operation.num_samples)
        if not operation.prompt_logprobs:
            return SampleResponse(sequences)
        tokens = prompt.to_ints()
        scored: list[float] = []
        if len(tokens) > 1:  # nothing comes before the first
            inputs = {"target_tokens": TensorData(tokens[1:], "int64")}
            datum = Datum(ModelInput.from_ints(tokens[:-1]), inputs)
            loss = built_in_loss("cross_entropy", (datum,), None)
            scored = model.trainer.forward(_sequences(model, (datum,), False), loss).logprobs[0].tolist()
        return SampleResponse(sequences, [None, *scored])

    def _finish_writing(self) -> None:
        """Wait for the states that are being written: one of them may be what is read next."""
        self._writer.submit(lambda: None).result()

    def _model(self, model_id: str) -> HostedModel:
        if model_id not in self.models:
            raise OperationError(self.no_model(model_id))
        return self.models[model_id]

    def no_model(self, model_id: str) -> str:
        """What to say of a model that is not here."""
        return f"there is no model {model_id!r} here: it was unloaded, or never made"

    def close(self) -> None:
        """Finish writing, and let go of every model."""
        self._writer.shutdown()
        self.models.clear()
        self._shared_bases.clear()
        for folder in self._in_use.values():
            folder.close()
        self._in_use.clear()


def _sequences(model: HostedModel, data: tuple[Datum, ...], weighted_only: bool) -> Sequences:
    """A call's data as arrays, checked against the model, and its micro-batch plan."""
    tokens = tuple(np.asarray(datum.model_input.to_ints(), dtype=np.int64) for datum in data)
    targets = tuple(datum.loss_fn_inputs["target_tokens"].to_numpy() for datum in data)
    vocabulary = model.trainer.base.vocabulary
    for index, (read, scored) in enumerate(zip(tokens, targets, strict=True)):
        if len(read) + 1 > model.description.max_context_length:
            raise OperationError(
                f"data[{index}]: {len(read)} input tokens and their last target exceed the "
                f"{model.description.max_context_length} tokens of {model.description.base_model} on this shape"
            )
        lowest, highest = min(read.min(), scored.min()), max(read.max(), scored.max())
        if lowest < 0 or highest >= vocabulary:
            raise OperationError(
                f"data[{index}]: token id {highest if highest >= vocabulary else lowest}; "
                f"{model.description.base_model} knows 0 to {vocabulary - 1}"
            )
    asked = tuple(
        Asked(t, datum.loss_fn_inputs["weights"].to_numpy() != 0 if weighted_only else None)
        for t, datum in zip(targets, data, strict=True)
    )
    return Sequences(tokens, asked, plan(tokens, model.trainer.tokens_per_pass))


def _check_shapes(operation: Operation, sequences: Sequences, slopes: Sequence[FloatArray]) -> None:
    if [asked.targets.shape for asked in sequences.asked] != [slope.shape for slope in slopes]:
        raise OperationError(
            f"{operation_name(operation)}: dloss_dlogprob does not match the targets' shapes"
        )


def _answer(scores: Scores) -> ForwardBackwardOutput:
    outputs = [{"logprobs": TensorData(values, "float32")} for values in scores.logprobs]
    work = scores.work
    metrics = {
        "loss:sum": scores.loss,
        "tokens:sum": float(work.tokens),
        "computed_tokens:sum": float(work.computed_tokens),
        "scored_tokens:sum": float(work.scored_tokens),
        "micro_batches:sum": float(work.passes),
        "activation_bytes:max": float(work.activation_bytes),
    }
    return ForwardBackwardOutput(outputs, metrics)
