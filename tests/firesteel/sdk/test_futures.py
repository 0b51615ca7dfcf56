from __future__ import annotations

import asyncio
import copy
import gc
import logging
import os
import pickle
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from firesteel.sdk import APIFuture, OperationError, OptimStepResponse
from firesteel.sdk.futures import Ledger


def pending(
    name: str = "optim_step seq 1 of model-1",
) -> tuple[Future[OptimStepResponse], APIFuture[OptimStepResponse]]:
    future: Future[OptimStepResponse] = Future()
    return future, APIFuture(future, name)


def finished(
    value: object = None, error: BaseException | None = None, name: str = "forward seq 1 of m"
) -> APIFuture:
    future: Future[object] = Future()
    future.set_result(value) if error is None else future.set_exception(error)
    return APIFuture(future, name)


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    made = Ledger()
    yield made
    with suppress(BaseException):
        made.close()


# Reading


def test_a_future_reads_as_its_result_once_that_is_there() -> None:
    future, answer = pending()
    threading.Timer(0.05, future.set_result, [OptimStepResponse({"grad_norm": 2.0})]).start()
    assert answer.metrics["grad_norm"] == 2.0  # waits
    assert answer.result().metrics is answer.metrics
    assert answer.done()
    assert answer.exception() is None
    with pytest.raises(AttributeError, match="'OptimStepResponse' object has no attribute 'loss'"):
        answer.loss  # noqa: B018


def test_a_result_may_be_asked_for_with_a_time_limit_and_again() -> None:
    future, answer = pending()
    with pytest.raises(TimeoutError):
        answer.result(timeout=0.01)
    with pytest.raises(TimeoutError):
        answer.exception(timeout=0.01)
    future.set_result(OptimStepResponse({}))
    assert answer.result(timeout=0.01) == OptimStepResponse({})


def test_the_operations_error_is_raised_at_each_reading() -> None:
    answer = finished(error=OperationError("data[3]: too long"))
    for _ in range(2):
        with pytest.raises(OperationError, match=r"data\[3\]: too long"):
            answer.result()
    with pytest.raises(OperationError):
        answer.metrics  # noqa: B018
    assert isinstance(answer.exception(), OperationError)


def test_a_result_is_converted_for_the_reader() -> None:
    future: Future[int] = Future()
    answer: APIFuture[str] = APIFuture(future, "forward", str)
    future.set_result(12)
    assert answer.result() == "12"
    assert answer.isdigit()

    async def read() -> str:
        return await answer

    assert asyncio.run(read()) == "12"


def test_a_future_can_be_awaited_while_other_coroutines_run() -> None:
    future, answer = pending()

    async def finish() -> None:
        await asyncio.sleep(0.02)
        threading.Thread(target=future.set_result, args=[OptimStepResponse({"n": 1.0})]).start()

    async def both() -> OptimStepResponse:
        result, _ = await asyncio.gather(answer.result_async(), finish())
        assert (await answer) is result
        return result

    assert asyncio.run(both()).metrics == {"n": 1.0}


def test_a_time_limit_in_a_coroutine_leaves_the_operation_running() -> None:
    future, answer = pending()

    async def read() -> None:
        with pytest.raises(TimeoutError):
            await answer.result_async(timeout=0.01)
        assert not future.cancelled()
        future.set_result(OptimStepResponse({}))
        assert await answer == OptimStepResponse({})

    asyncio.run(read())


def test_an_awaited_failure_is_raised_and_leaves_no_complaint_behind(
    caplog: pytest.LogCaptureFixture,
) -> None:
    answer = finished(error=OperationError("no"))

    async def read() -> None:
        with pytest.raises(OperationError, match="no"):
            await answer

    with caplog.at_level(logging.DEBUG, logger="asyncio"):
        asyncio.run(read())
        gc.collect()
    assert "never retrieved" not in caplog.text
    assert answer.unread_failure() is None


def test_looking_at_a_future_does_not_wait_for_it() -> None:
    future, answer = pending()
    assert repr(answer) == "<APIFuture of optim_step seq 1 of model-1: pending>"
    assert not answer.done()
    assert answer.unread_failure() is None
    clone = copy.copy(answer)
    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(answer)
    with pytest.raises(TypeError, match="pickle"):
        copy.deepcopy(answer)
    for name in ("__array__", "_repr_html_", "__wrapped__", "_ipython_display_"):
        assert getattr(answer, name, None) is None
    future.set_result(OptimStepResponse({"n": 1.0}))
    assert clone.metrics == {"n": 1.0}
    assert repr(answer) == "<APIFuture of optim_step seq 1 of model-1: done>"


# What nobody read


def test_a_failure_that_nobody_read_is_raised_once_with_the_name_of_its_operation(ledger: Ledger) -> None:
    ledger.track(finished(1))
    ledger.track(finished(error=OperationError("no gradient"), name="optim_step seq 4 of m"))
    ledger.track(finished(2))
    with pytest.raises(OperationError, match="no gradient") as caught:
        ledger.raise_unread()
    assert "nobody read the result of optim_step seq 4 of m" in caught.value.__notes__[0]
    ledger.raise_unread()
    ledger.close()


def test_several_unread_failures_are_told_together(ledger: Ledger) -> None:
    for number in (4, 5, 6):
        ledger.track(finished(error=OperationError(f"reason {number}"), name=f"optim_step seq {number} of m"))
    with pytest.raises(OperationError, match="reason 4") as caught:
        ledger.raise_unread()
    notes = "\n".join(caught.value.__notes__)
    assert "optim_step seq 5 of m: reason 5" in notes
    assert "optim_step seq 6 of m: reason 6" in notes
    ledger.raise_unread()


@pytest.mark.parametrize("read", [APIFuture.result, APIFuture.exception, lambda future: future.metrics])
def test_a_failure_that_was_read_is_not_raised_again(ledger: Ledger, read) -> None:
    answer = ledger.track(finished(error=OperationError("no")))
    with suppress(OperationError):
        read(answer)
    ledger.raise_unread()
    ledger.close()


def test_a_reading_that_timed_out_is_no_reading(ledger: Ledger) -> None:
    future, answer = pending()
    ledger.track(answer)
    with pytest.raises(TimeoutError):
        answer.result(timeout=0.01)
    ledger.raise_unread()
    future.set_exception(OperationError("late"))
    with pytest.raises(OperationError, match="late"):
        ledger.raise_unread()


def test_closing_waits_for_what_runs_and_raises_what_nobody_read(ledger: Ledger) -> None:
    future, answer = pending()
    ledger.track(answer)
    threading.Timer(0.05, future.set_exception, [OperationError("late")]).start()
    with pytest.raises(OperationError, match="late"):
        ledger.close()
    ledger.close()


def test_an_unread_failure_outlives_any_number_of_later_calls(ledger: Ledger) -> None:
    ledger.track(finished(error=OperationError("first")))
    for _ in range(100):
        ledger.track(finished(1))
    with pytest.raises(OperationError, match="first"):
        ledger.raise_unread()


@pytest.mark.parametrize("after_each", [Ledger.raise_unread, lambda ledger: None])
def test_the_ledger_does_not_grow_with_the_number_of_calls(ledger: Ledger, after_each) -> None:
    def calls(count: int) -> int:
        for _ in range(count):
            ledger.track(finished(OptimStepResponse({"grad_norm": 1.0})))
            after_each(ledger)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = calls(100)
        assert calls(10_000) - before < 20_000  # 2 bytes a call
    finally:
        tracemalloc.stop()


# At the end of the interpreter. One real engine each; all scripts run at once, each test looks at its own.


@dataclass(frozen=True)
class Outcome:
    status: int
    stdout: str
    stderr: str


_START = """
import sys, firesteel
from firesteel.sdk import AdamParams, Datum, ModelInput
folder = sys.argv[1]
service = firesteel.connect("local")
client = service.create_training_client(sys.argv[2], lora_rank=2)
data = [Datum(ModelInput.from_ints([5, 6, 7]), {"target_tokens": [6, 7, 8]})]
def steps(count):
    for _ in range(count):
        client.forward_backward(data)
        client.optim_step(AdamParams())
"""
_SCRIPTS = {
    "reads its failure and forgets to close": """
try:
    client.optim_step(AdamParams()).result()
except firesteel.sdk.OperationError:
    print("seen")
steps(5)
client.save_weights(folder)
""",
    "never looks at a failure": "client.optim_step(AdamParams()); print('end of script')",
    "dies": "steps(5); client.save_weights(folder); raise KeyError('mine')",
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, llama_folder: str) -> dict[str, tuple[Outcome, Path]]:
    folders = {name: tmp_path_factory.mktemp("exit") / "exported" for name in _SCRIPTS}
    running = {
        name: subprocess.Popen(
            [sys.executable, "-c", _START + script, str(folders[name]), llama_folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for name, script in _SCRIPTS.items()
    }
    try:
        done = {}
        for name, process in running.items():
            stdout, stderr = process.communicate(timeout=120)
            done[name] = Outcome(process.returncode, stdout, stderr), folders[name]
        return done
    finally:
        for process in running.values():
            process.kill()


def test_a_script_that_forgets_to_close_exits_well_after_its_queue_is_done(outcomes) -> None:
    outcome, folder = outcomes["reads its failure and forgets to close"]
    assert (outcome.status, outcome.stdout) == (0, "seen\n"), outcome.stderr
    assert (folder / "adapter_model.safetensors").is_file()
    assert "error[" not in outcome.stderr  # the failure was read


def test_a_failure_that_nobody_read_is_printed_at_exit_and_makes_the_status_1(outcomes) -> None:
    outcome, _ = outcomes["never looks at a failure"]
    assert outcome.status == 1
    assert outcome.stdout == "end of script\n"  # buffered output is not lost
    assert "error[operation]: optim_step seq 1 of model-1 failed and nobody read its result" in outcome.stderr
    assert "there is no gradient" in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_an_uncaught_exception_still_exits_1_after_the_queue_is_done(outcomes) -> None:
    outcome, folder = outcomes["dies"]
    assert outcome.status == 1
    assert "KeyError: 'mine'" in outcome.stderr
    assert (folder / "adapter_model.safetensors").is_file()


def test_a_failure_is_raised_in_the_thread_that_caused_it_and_in_no_other() -> None:
    ledger = Ledger()
    failing: Future[None] = Future()
    ledger.track(APIFuture(failing, "bad"))
    failing.set_exception(OperationError("of the first thread"))
    raised: list[BaseException] = []

    def call() -> None:
        try:
            ledger.raise_unread()
        except OperationError as error:
            raised.append(error)

    other = threading.Thread(target=call)
    other.start()
    other.join()
    assert raised == []
    with pytest.raises(OperationError, match="of the first thread"):
        ledger.raise_unread()
    ledger.close()


def test_closing_raises_the_failures_of_every_thread() -> None:
    ledger = Ledger()
    failing: Future[None] = Future()
    failing.set_exception(OperationError("of another thread"))
    other = threading.Thread(target=lambda: ledger.track(APIFuture(failing, "bad")))
    other.start()
    other.join()
    with pytest.raises(OperationError, match="of another thread"):
        ledger.close()
