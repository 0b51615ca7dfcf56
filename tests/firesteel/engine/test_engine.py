from __future__ import annotations

import gc
import resource
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import make_datum, make_pairs
from firesteel import store
from firesteel.catalog import load_catalog
from firesteel.engine import trainer as trainer_module
from firesteel.engine.engine import Engine
from firesteel.engine.ordering import KEPT_ANSWERS, KEPT_BYTES, ModelOrder
from firesteel.sdk import (
    AdamParams,
    ClosedError,
    Datum,
    LoraConfig,
    ModelError,
    ModelInput,
    OperationError,
    OperationFailed,
    StorageError,
)
from firesteel.sdk.operations import (
    Backward,
    CreateBaseReference,
    CreateModel,
    DropGradient,
    Forward,
    ForwardBackward,
    IdentifyModel,
    ModelDescription,
    Operation,
    OptimStep,
    ReleaseForward,
    ResolveShape,
    Sample,
    SaveWeights,
    UnloadModel,
)
from firesteel.sdk.shapes import Mode
from firesteel.sdk.types import ForwardBackwardOutput, SamplingParams, TensorData

SGD_LIKE = AdamParams(learning_rate=1e-2, beta1=0.0, beta2=0.0, eps=1.0)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small lose more to threads than they gain, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine()
    yield made
    made.close()


def create(engine: Engine, folder: str, lora: LoraConfig | None = LoraConfig(rank=2, seed=1)) -> str:  # noqa: B008
    mode = Mode.LORA_TRAINER if lora else Mode.POLICY_TRAINER
    shape = engine.submit(ResolveShape(folder, (mode,))).result()
    description: ModelDescription = engine.submit(CreateModel(folder, shape, lora)).result()
    return description.model_id


@pytest.fixture
def policy(engine: Engine, llama_folder: str) -> str:
    return create(engine, llama_folder)


@pytest.fixture
def data(rng: np.random.Generator) -> tuple[Datum, ...]:
    return tuple(make_pairs(rng, 1))


def logprobs(engine: Engine, model: str, seq: int, data: tuple[Datum, ...]) -> np.ndarray:
    answer = engine.submit(Forward(model, seq, data)).result()
    return np.concatenate([o["logprobs"].to_numpy() for o in answer.loss_fn_outputs])


class Gate:
    """Keeps the engine's thread busy until opened: a real operation on data that take their time to be read."""

    def __init__(self, engine: Engine, model: str) -> None:
        self._opened = threading.Event()
        self.entered = threading.Event()
        gate = self

        class SlowPrompt(ModelInput):
            def to_ints(self) -> list[int]:
                gate.entered.set()
                assert gate._opened.wait(60)
                return [5, 6]

        self.future = engine.submit(Sample(model, SlowPrompt(), SamplingParams(max_tokens=1)))
        assert self.entered.wait(60)

    def open(self) -> None:
        self._opened.set()


# Order


def test_operations_run_by_number_however_they_arrive(engine, policy, llama_folder, data) -> None:
    other = create(engine, llama_folder)
    in_order = [
        ForwardBackward(other, 1, data),
        OptimStep(other, 2, SGD_LIKE),
        ForwardBackward(other, 3, data[:1]),
        OptimStep(other, 4, SGD_LIKE),
    ]
    for operation in in_order:
        engine.submit(operation)
    arriving = [replace(in_order[i], model_id=policy) for i in (3, 1, 2, 0)]
    futures = [engine.submit(operation) for operation in arriving[:3]]
    time.sleep(0.1)
    assert not any(future.done() for future in futures)
    engine.submit(arriving[3]).result()
    for future in futures:
        future.result(60)
    assert np.array_equal(logprobs(engine, policy, 5, data), logprobs(engine, other, 5, data))


def test_a_gap_holds_one_model_and_no_other(engine, policy, llama_folder, data) -> None:
    held = engine.submit(Forward(policy, 2, data))
    other = create(engine, llama_folder)
    engine.submit(Forward(other, 1, data)).result(60)
    engine.submit(IdentifyModel(policy)).result(60)
    assert not held.done()
    engine.submit(Forward(policy, 1, data))
    held.result(60)


def test_a_retry_gets_the_same_answer_and_is_applied_once(engine, policy, llama_folder, data) -> None:
    once = create(engine, llama_folder)
    steps: list[Callable[[str], Operation]] = [
        lambda m: ForwardBackward(m, 1, data),
        lambda m: OptimStep(m, 2, SGD_LIKE),
        lambda m: ForwardBackward(m, 3, data),
        lambda m: OptimStep(m, 4, SGD_LIKE),
    ]
    for step in steps:
        first = engine.submit(step(policy))
        early = engine.submit(step(policy))  # while the first waits or runs
        answer = first.result(60)
        late = engine.submit(step(policy))
        assert early.result(60) is answer
        assert late.result(60) is answer
        engine.submit(step(once)).result(60)
    assert np.array_equal(logprobs(engine, policy, 5, data), logprobs(engine, once, 5, data))


def test_a_retry_of_a_failure_fails_alike(engine, policy) -> None:
    first = engine.submit(OptimStep(policy, 1, SGD_LIKE))
    assert isinstance(first.exception(60), OperationError)
    assert engine.submit(OptimStep(policy, 1, SGD_LIKE)).exception(60) is first.exception()


@pytest.mark.parametrize("when", ["while it waits", "after it ran"])
def test_the_same_number_with_other_content_is_refused(when: str, engine, policy, data) -> None:
    seq = 2 if when == "while it waits" else 1
    first = engine.submit(ForwardBackward(policy, seq, data))
    if seq == 1:
        first.result(60)
    for other in (
        ForwardBackward(policy, seq, data[:1]),
        Forward(policy, seq, data),
        OptimStep(policy, seq, SGD_LIKE),
    ):
        with pytest.raises(OperationError, match=rf"seq {seq} of {policy}: this seq_id was already used"):
            engine.submit(other)
    if seq == 2:
        engine.submit(Forward(policy, 1, data))
    assert first.exception(60) is None


def test_a_number_that_failed_is_used_up(engine, policy, data) -> None:
    engine.submit(OptimStep(policy, 1, SGD_LIKE)).exception(60)
    assert engine.submit(Forward(policy, 2, data)).exception(60) is None


def test_a_number_below_the_first_is_refused(engine, policy, data) -> None:
    for seq in (0, -1):
        with pytest.raises(OperationError, match="the next seq_id is 1"):
            engine.submit(Forward(policy, seq, data))


def test_an_operation_for_an_unknown_model_is_refused(engine, policy, data) -> None:
    with pytest.raises(
        OperationError, match=r"forward seq 1 of nobody: .*'nobody'.*it was unloaded, or never made"
    ):
        engine.submit(Forward("nobody", 1, data))
    for operation in (
        IdentifyModel("nobody"),
        UnloadModel("nobody"),
        CreateBaseReference("nobody"),
        ReleaseForward("nobody", 1),
        Sample("nobody", ModelInput.from_ints([5]), SamplingParams()),
    ):
        error = engine.submit(operation).exception(60)
        assert isinstance(error, OperationError)
        assert "'nobody'" in str(error)


# Closing


def test_closing_fails_by_name_what_is_held_and_what_waits_and_lets_the_running_end(
    engine, policy, data
) -> None:
    gate = Gate(engine, policy)
    waiting = engine.submit(Forward(policy, 1, data))
    unnumbered = engine.submit(IdentifyModel(policy))
    held = engine.submit(OptimStep(policy, 3, SGD_LIKE))
    closing = threading.Thread(target=engine.close)
    closing.start()
    for future, name in (
        (waiting, f"forward seq 1 of {policy}"),
        (unnumbered, f"identify_model of {policy}"),
        (held, f"optim_step seq 3 of {policy}"),
    ):
        error = future.exception(60)
        assert isinstance(error, ClosedError)
        assert name in str(error)
    assert "waiting for seq_id 2" in str(held.exception())
    assert closing.is_alive()
    gate.open()
    closing.join(60)
    assert gate.future.result().sequences[0].tokens
    with pytest.raises(ClosedError, match="forward seq 2"):
        engine.submit(Forward(policy, 2, data))
    engine.close()
    assert not engine._thread.is_alive()


def test_closing_frees_the_models(llama_folder: str) -> None:
    engine = Engine()
    policy = create(engine, llama_folder)
    network = weakref.ref(engine._host.models[policy].trainer.base.network)
    engine.close()
    gc.collect()
    assert network() is None


def test_unloading_a_model_fails_what_it_held_and_frees_it(engine, policy, data) -> None:
    network = weakref.ref(engine._host.models[policy].trainer.base.network)
    held = engine.submit(Forward(policy, 2, data))
    engine.submit(UnloadModel(policy)).result(60)
    assert isinstance(held.exception(60), ClosedError)
    with pytest.raises(OperationError, match="no model"):
        engine.submit(Forward(policy, 1, data))
    assert isinstance(engine.submit(UnloadModel(policy)).exception(60), OperationError)
    gc.collect()
    assert network() is None


def test_what_was_queued_before_an_unload_runs_and_what_comes_after_fails(engine, policy, data) -> None:
    gate = Gate(engine, policy)
    before = engine.submit(Forward(policy, 1, data))
    unload = engine.submit(UnloadModel(policy))
    after = engine.submit(Forward(policy, 2, data))
    gate.open()
    assert before.exception(60) is None
    assert unload.exception(60) is None
    assert isinstance(after.exception(60), OperationError)


# Failures


def test_a_failure_of_the_caller_fails_its_own_future_only(engine, policy, llama_folder, data) -> None:
    calm = create(engine, llama_folder)
    for model in (policy, calm):
        engine.submit(ForwardBackward(model, 1, data))
    unknown = (make_datum(np.asarray([2, 3, 5000]), 1),)
    error = engine.submit(ForwardBackward(policy, 2, unknown)).exception(60)
    assert isinstance(error, OperationError)
    assert error.category == "user"
    engine.submit(Forward(calm, 2, data))
    for model in (policy, calm):
        engine.submit(OptimStep(model, 3, SGD_LIKE)).result(60)
    assert np.array_equal(logprobs(engine, policy, 4, data), logprobs(engine, calm, 4, data))


def test_the_engine_checks_data_itself(engine, policy) -> None:
    bad = (Datum(ModelInput.from_ints([1, 2]), {"target_tokens": TensorData([1])}),)
    for operation in (
        Forward(policy, 1, bad),
        ForwardBackward(policy, 2, bad),
        Forward(policy, 3, (), "dpo"),
    ):  # type: ignore[arg-type]
        error = engine.submit(operation).exception(60)
        assert isinstance(error, OperationError), error


def test_a_place_that_cannot_be_written_to_is_named_and_poisons_nothing(
    engine, policy, data, tmp_path: Path
) -> None:
    (tmp_path / "a file").write_text("")
    error = engine.submit(SaveWeights(policy, 1, str(tmp_path / "a file" / "inside"))).exception(60)
    assert isinstance(error, StorageError)
    assert "a file/inside was not written, " in str(error)
    assert isinstance(error.__cause__, NotADirectoryError)
    engine.submit(ForwardBackward(policy, 2, data)).result(60)
    engine.submit(OptimStep(policy, 3, SGD_LIKE)).result(60)
    saved = engine.submit(SaveWeights(policy, 4, str(tmp_path / "inside"))).result(60)
    assert sorted(p.name for p in Path(saved.path).iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    again = engine.submit(SaveWeights(policy, 5, str(tmp_path / "inside"))).exception(60)
    assert isinstance(again, OperationError)
    assert "exists already" in str(again)


def failing_in_the_middle(monkeypatch: pytest.MonkeyPatch, calls_before: int) -> list[weakref.ref]:
    """Let torch fail in the middle of a pass, as it does when memory runs out; what it then held is returned."""
    held: list[weakref.ref] = []
    real, left = torch.maximum, [calls_before]  # the running softmax of the head: once a pass in a tiny model

    def out_of_memory(so_far: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
        if left[0]:
            left[0] -= 1
            return real(so_far, largest)
        held.append(weakref.ref(largest))
        raise MemoryError("injected")

    monkeypatch.setattr(torch, "maximum", out_of_memory)
    return held


def test_a_pass_that_fails_keeps_no_memory_although_its_error_is_kept(
    engine, policy, data, monkeypatch
) -> None:
    held = failing_in_the_middle(monkeypatch, 0)
    future = engine.submit(ForwardBackward(policy, 1, data))
    error = future.exception(60)
    monkeypatch.undo()
    assert isinstance(error, OperationFailed)
    assert "MemoryError: injected" in str(error)
    assert "head.py" in "".join(traceback.format_exception(error))  # where it failed can still be read
    assert len(held) == 1
    gc.collect()
    assert held[0]() is None
    assert engine.submit(ForwardBackward(policy, 1, data)).exception() is error


def test_half_a_gradient_is_dropped_and_the_next_step_refused_once(
    engine, policy, llama_folder, monkeypatch
) -> None:
    monkeypatch.setitem(trainer_module.TOKENS_PER_PASS, "cpu", 16)
    data = tuple(make_pairs(np.random.default_rng(1), 3))  # three passes
    calm = create(engine, llama_folder)
    failing_in_the_middle(monkeypatch, 2)
    assert isinstance(engine.submit(ForwardBackward(policy, 1, data)).exception(60), OperationFailed)
    monkeypatch.undo()
    engine.submit(ForwardBackward(policy, 2, data[:2])).result(60)  # a loop that pipelines goes on
    refused = engine.submit(OptimStep(policy, 3, SGD_LIKE)).exception(60)
    assert isinstance(refused, OperationError)
    assert "the gradient was dropped" in str(refused)
    assert "injected" in str(refused)
    for model, seq in ((policy, 4), (calm, 1)):
        engine.submit(ForwardBackward(model, seq, data)).result(60)
        engine.submit(OptimStep(model, seq + 1, SGD_LIKE)).result(60)
    assert np.array_equal(logprobs(engine, policy, 6, data), logprobs(engine, calm, 3, data))


def test_a_gradient_that_is_dropped_leaves_nothing_behind(engine, policy, llama_folder, data) -> None:
    calm = create(engine, llama_folder)
    before = logprobs(engine, policy, 1, data)
    engine.submit(ForwardBackward(policy, 2, data)).result(60)
    assert engine.submit(DropGradient(policy, 3)).result(60) is None
    assert "no gradient" in str(engine.submit(OptimStep(policy, 4, SGD_LIKE)).exception(60))
    assert np.array_equal(logprobs(engine, policy, 5, data), before)
    for model, seq in ((policy, 6), (calm, 1)):
        engine.submit(ForwardBackward(model, seq, data[:2])).result(60)
        engine.submit(OptimStep(model, seq + 1, SGD_LIKE)).result(60)
    assert np.array_equal(logprobs(engine, policy, 8, data), logprobs(engine, calm, 3, data))


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(engine, policy, data) -> None:
    before = logprobs(engine, policy, 1, data)
    engine.submit(Forward(policy, 2, data, retain=True)).result(60)
    gradient = [np.zeros(len(d.loss_fn_inputs["target_tokens"]), np.float32) for d in data]
    gradient[0][-1] = np.nan
    engine.submit(Backward(policy, 3, 2, tuple(gradient))).result(60)
    error = engine.submit(OptimStep(policy, 4, SGD_LIKE)).exception(60)
    assert isinstance(error, OperationError)
    assert "nan" in str(error)
    assert np.array_equal(logprobs(engine, policy, 5, data), before)
    assert "no gradient" in str(engine.submit(OptimStep(policy, 6, SGD_LIKE)).exception(60))


def test_what_was_submitted_cannot_be_cancelled(engine, policy, data) -> None:
    gate = Gate(engine, policy)
    futures = [engine.submit(Forward(policy, 1, data)), engine.submit(IdentifyModel(policy))]
    assert not any(future.cancel() for future in futures)
    gate.open()
    assert [future.exception(60) for future in futures] == [None, None]


# Forward and backward


def test_a_backward_needs_a_forward_that_is_kept(engine, policy, data) -> None:
    zeros = tuple(np.ones(d.loss_fn_inputs["target_tokens"].shape, np.float32) for d in data)
    engine.submit(Forward(policy, 1, data, retain=True))
    engine.submit(Forward(policy, 2, data, retain=False))
    assert engine.submit(Backward(policy, 3, 1, zeros)).exception(60) is None
    for seq, of in ((4, 1), (5, 2), (6, 99)):  # has run; was not kept; never was
        error = engine.submit(Backward(policy, seq, of, zeros)).exception(60)
        assert isinstance(error, OperationError)
        assert f"forward seq {of} is not kept" in str(error)
    engine.submit(Forward(policy, 7, data, retain=True))
    engine.submit(ReleaseForward(policy, 7)).result(60)
    engine.submit(ReleaseForward(policy, 7)).result(60)  # once more is nothing
    assert isinstance(engine.submit(Backward(policy, 8, 7, zeros)).exception(60), OperationError)


def test_a_backward_after_a_step_is_refused_and_after_another_backward_is_not(engine, policy, data) -> None:
    ones = tuple(np.ones(d.loss_fn_inputs["target_tokens"].shape, np.float32) for d in data)
    for seq in (1, 2):
        engine.submit(Forward(policy, seq, data, retain=True))
    engine.submit(Backward(policy, 3, 1, ones))
    engine.submit(OptimStep(policy, 4, SGD_LIKE)).result(60)
    error = engine.submit(Backward(policy, 5, 2, ones)).exception(60)
    assert isinstance(error, OperationError)
    assert "the weights have changed" in str(error)


def test_a_backward_of_other_shapes_is_refused(engine, policy, data) -> None:
    engine.submit(Forward(policy, 1, data, retain=True))
    short = tuple(np.ones(2, np.float32) for _ in data)
    error = engine.submit(Backward(policy, 2, 1, short)).exception(60)
    assert isinstance(error, OperationError)
    assert "shapes" in str(error)


def test_a_backward_gives_the_gradient_of_any_loss_with_these_derivatives(
    engine, policy, llama_folder, data
) -> None:
    built_in = create(engine, llama_folder)
    engine.submit(ForwardBackward(built_in, 1, data))
    engine.submit(Forward(policy, 1, data, retain=True))
    engine.submit(Backward(policy, 2, 1, tuple(-d.loss_fn_inputs["weights"].to_numpy() for d in data)))
    norms = [
        engine.submit(OptimStep(model, seq, SGD_LIKE)).result(60).metrics["grad_norm"]
        for model, seq in ((policy, 3), (built_in, 2))
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


# Several models


def test_two_policies_on_one_base_do_not_touch_each_other(engine, llama_folder, rng) -> None:
    loras = [LoraConfig(rank=2, seed=1), LoraConfig(rank=3, seed=2, train_mlp=False)]
    batches = [tuple(make_pairs(rng, 1)) for _ in loras]

    def trained(*which: int) -> list[np.ndarray]:
        """Policies trained side by side, then what each says of its own batch."""
        models = {index: create(engine, llama_folder, loras[index]) for index in which}
        for seq in (1, 3, 5):
            for index, model in models.items():
                engine.submit(ForwardBackward(model, seq, batches[index]))
            for model in models.values():
                engine.submit(OptimStep(model, seq + 1, SGD_LIKE))
        assert len({id(engine._host.models[model].trainer.base.network) for model in models.values()}) == 1
        return [logprobs(engine, model, 7, batches[index]) for index, model in models.items()]

    for together, alone in zip(trained(0, 1), [*trained(0), *trained(1)], strict=True):
        assert np.array_equal(together, alone)


def test_unloading_one_policy_leaves_the_others_and_the_base_as_they_were(engine, llama_folder, data) -> None:
    staying, leaving = create(engine, llama_folder), create(engine, llama_folder, LoraConfig(rank=4, seed=5))
    reference = engine.submit(CreateBaseReference(staying)).result(60).model_id
    for model in (staying, leaving):
        engine.submit(ForwardBackward(model, 1, data))
        engine.submit(OptimStep(model, 2, SGD_LIKE)).result(60)
    before = [logprobs(engine, staying, 3, data), logprobs(engine, reference, 1, data)]
    assert not np.array_equal(*before)
    engine.submit(UnloadModel(leaving)).result(60)
    assert np.array_equal(logprobs(engine, staying, 4, data), before[0])
    assert np.array_equal(logprobs(engine, reference, 2, data), before[1])
    engine.submit(ForwardBackward(staying, 5, data))
    assert engine.submit(OptimStep(staying, 6, SGD_LIKE)).result(60).metrics["grad_norm"] > 0


def test_two_full_policies_of_one_name_have_weights_of_their_own(engine, llama_folder, data) -> None:
    trained, untouched = create(engine, llama_folder, None), create(engine, llama_folder, None)
    before = logprobs(engine, untouched, 1, data)
    engine.submit(ForwardBackward(trained, 1, data))
    engine.submit(OptimStep(trained, 2, SGD_LIKE)).result(60)
    assert np.array_equal(logprobs(engine, untouched, 2, data), before)
    assert not np.array_equal(logprobs(engine, trained, 3, data), before)


def test_threads_may_submit_to_several_models_at_once(engine, llama_folder, data) -> None:
    models = [create(engine, llama_folder) for _ in range(3)]
    answers: list[Future[Any]] = []

    def work(model: str) -> None:
        for seq in range(1, 11, 2):
            answers.append(engine.submit(ForwardBackward(model, seq, data)))
            answers.append(engine.submit(OptimStep(model, seq + 1, SGD_LIKE)))

    threads = [threading.Thread(target=work, args=[model]) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 30
    assert all(answer.exception(60) is None for answer in answers)
    numbers = [logprobs(engine, model, 11, data) for model in models]
    assert np.array_equal(numbers[0], numbers[1])
    assert np.array_equal(numbers[0], numbers[2])


# Memory


def test_memory_is_flat_over_thousands_of_operations(engine, policy) -> None:
    tiny = (make_datum(np.asarray([2, 3, 4]), 1),)
    order = engine._orders[policy]

    def steps(first: int, count: int) -> int:
        for seq in range(first, first + count, 2):
            engine.submit(ForwardBackward(policy, seq, tiny))
            engine.submit(OptimStep(policy, seq + 1, SGD_LIKE)).result(60)
            assert len(order._known) <= KEPT_ANSWERS + 2
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    before = steps(1, 400)
    after = steps(401, 1600)
    assert len(order._held) == 0
    assert len(engine._host.models[policy].retained) == 0
    assert after - before < 16 * 2**20  # 10 KiB an operation
    with pytest.raises(OperationError, match="no longer kept"):
        engine.submit(OptimStep(policy, 2, SGD_LIKE))
    assert engine.submit(OptimStep(policy, 2000, SGD_LIKE)).result(60)


def test_kept_answers_are_bounded_in_bytes_and_pending_ones_are_never_forgotten() -> None:
    order = ModelOrder()
    big = ForwardBackwardOutput([{"logprobs": TensorData(np.zeros(2**22, np.float32))}], {})  # 16 MiB
    first, _ = order.accept(Forward("m", 1, ()))
    for seq in range(2, 40):
        future, ready = order.accept(Forward("m", seq, ()))
        assert [s.operation.seq_id for s in ready] == [seq]
        future.set_result(big)
    kept = [known.future for known in order._known.values() if known.future.done()]
    assert 16 * 2**20 * (len(kept) - 1) <= KEPT_BYTES
    assert kept  # the last can still be asked for
    assert order.accept(Forward("m", 1, ()))[0] is first


def test_nothing_of_an_operation_stays_alive_while_the_engine_waits(engine, policy) -> None:
    prompt = ModelInput.from_ints([5, 6, 7])
    engine.submit(Sample(policy, prompt, SamplingParams(max_tokens=2))).result(60)
    asked = weakref.ref(prompt)
    del prompt
    answer = weakref.ref(
        engine.submit(Sample(policy, ModelInput.from_ints([5]), SamplingParams(max_tokens=2))).result(60)
    )
    time.sleep(0.05)
    gc.collect()
    assert asked() is None
    assert answer() is None


def test_a_panic_fails_its_operation_and_the_engine_goes_on(engine, policy, data, monkeypatch) -> None:
    """Panics of libraries written in Rust are no `Exception`; one ended the thread, and all futures hung."""

    class Panic(BaseException):
        pass

    def panic(*arguments: object, **settings: object) -> None:
        raise Panic("rust panicked")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "maximum", panic)
        future = engine.submit(Forward(policy, 1, data))
        with pytest.raises(OperationFailed, match="Panic: rust panicked"):
            future.result(30)
    assert engine.submit(Forward(policy, 2, data)).result(30).metrics


def test_a_stored_model_with_a_flipped_bit_is_refused_before_it_is_used(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIRESTEEL_HOME", str(tmp_path))
    folder = store.fetch(load_catalog().resolve_model("tiny-llama"))
    (weights,) = folder.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(content)
    with pytest.raises(ModelError, match="does not have the content it was stored with"):
        create(engine, "tiny-llama")


def test_what_stands_behind_a_number_that_was_given_up_runs(engine: Engine, llama_folder: str, rng) -> None:
    """Once it waited for itself."""
    model, data = create(engine, llama_folder), tuple(make_pairs(rng, 1))
    early = engine.submit(Forward(model, 2, data))
    time.sleep(0.15)
    late = engine.submit(Forward(model, 3, data))
    engine.give_up_gaps(0.1)
    with pytest.raises(OperationError, match=r"seq_id 1 has not come within 0\.1 s"):
        early.result(10)
    assert late.result(10).metrics["loss:sum"] > 0
