"""The reference cache never gives a value that the reference would not give now."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firesteel.sdk import (
    ConfigError,
    DataError,
    Datum,
    ForwardBackwardOutput,
    ServiceClient,
    TensorData,
    TrainingClient,
)
from firesteel.sdk.operations import ModelIdentity
from training.utils import reference_cache
from training.utils.losses import PairLogprobs
from training.utils.pairs import PreferencePair, build_dpo_datums
from training.utils.reference_cache import (
    BLOCK_PAIRS,
    CacheStatistics,
    ReferenceCache,
    largest_difference,
)
from training.utils.service import build_service_client

COUNT = 2 * BLOCK_PAIRS + 3


@dataclass
class CountingReference:
    """A real reference client that counts what it is asked for.

    `drift` is added to its answers: what a batch of other composition, or another thread count, may do.
    """

    client: TrainingClient
    forwards: int = 0
    sequences: int = 0
    drift: float = 0.0

    def forward(self, data: Sequence[Datum], *, weighted_only: bool = False) -> ForwardBackwardOutput:
        self.forwards += 1
        self.sequences += len(data)
        answer = self.client.forward(data, weighted_only=weighted_only).result()
        drifted = [
            {"logprobs": TensorData(output["logprobs"].to_numpy() + np.float32(self.drift), "float32")}
            for output in answer.loss_fn_outputs
        ]
        return replace(answer, loss_fn_outputs=drifted)


@dataclass
class Setting:
    """A cache file, a model, and pairs."""

    path: Path
    reference: CountingReference
    identity: ModelIdentity
    pairs: list[PreferencePair] = field(default_factory=list)

    def fill(
        self, pairs: Sequence[PreferencePair] | None = None, **changed: str
    ) -> tuple[list[PairLogprobs], CacheStatistics]:
        identity = ModelIdentity(
            changed.get("weights", self.identity.weights), changed.get("numerics", self.identity.numerics)
        )
        cache = ReferenceCache(self.path, identity, changed.get("tokenizer", "tokenizer"))
        try:
            return filled(cache, self.pairs if pairs is None else pairs, self.reference)
        finally:
            cache.close()


def filled(
    cache: ReferenceCache, pairs: Sequence[PreferencePair], reference: CountingReference
) -> tuple[list[PairLogprobs], CacheStatistics]:
    """All pairs in blocks, in order, and what the cache then says of them."""
    blocks = (pairs[start : start + BLOCK_PAIRS] for start in range(0, len(pairs), BLOCK_PAIRS))
    statistics = cache.fill(blocks, reference)
    return cache.read(pairs), statistics


def make_pair(index: int, response: int = 4) -> PreferencePair:
    rng = np.random.default_rng(index)
    prompt = rng.integers(2, 200, 6)
    sides = [np.concatenate([prompt, rng.integers(2, 200, response)]).tolist() for _ in range(2)]
    return PreferencePair(*build_dpo_datums(sides[0], sides[1], 6), 6, line=index + 1)


@pytest.fixture
def service(llama_folder: str) -> Iterator[ServiceClient]:
    with build_service_client(base_model=llama_folder, lora_rank=0) as service:
        yield service


@pytest.fixture
def setting(tmp_path: Path, service: ServiceClient) -> Setting:
    client = service.create_reference_client()
    identity = client.identify().result()
    pairs = [make_pair(index) for index in range(COUNT)]
    return Setting(tmp_path / "cache" / "reference.sqlite", CountingReference(client), identity, pairs)


def same(one: Sequence[PairLogprobs], other: Sequence[PairLogprobs]) -> bool:
    return len(one) == len(other) and all(
        np.array_equal(a.chosen, b.chosen) and np.array_equal(a.rejected, b.rejected)
        for a, b in zip(one, other, strict=True)
    )


def test_values_are_those_of_the_reference_at_the_scored_positions(setting: Setting) -> None:
    values, statistics = setting.fill()
    assert (statistics.hits, statistics.computed) == (0, COUNT)
    for pair, cached in zip(setting.pairs, values, strict=True):
        chosen, rejected = setting.reference.forward(pair.datums).loss_fn_outputs
        np.testing.assert_allclose(cached.chosen, chosen["logprobs"].to_numpy()[5:], atol=1e-5)
        np.testing.assert_allclose(cached.rejected, rejected["logprobs"].to_numpy()[5:], atol=1e-5)


def test_a_second_run_computes_nothing_but_its_probe_and_reads_the_same_bits(setting: Setting) -> None:
    first, _ = setting.fill()
    setting.reference.sequences = 0
    second, statistics = setting.fill()
    assert same(first, second)
    assert (statistics.hits, statistics.computed) == (COUNT, 0)
    assert setting.reference.sequences == 2 * statistics.probed == 8


def test_shuffles_and_subsets_hit(setting: Setting) -> None:
    values, _ = setting.fill()
    order = np.random.default_rng(0).permutation(COUNT)[:20]
    again, statistics = setting.fill([setting.pairs[i] for i in order])
    assert statistics.computed == 0
    assert same(again, [values[i] for i in order])


@pytest.mark.parametrize(
    "changed",
    [
        {"weights": "others"},
        {"numerics": "float32 cpu plain torch-2.13 transformers-5.23"},
        {"tokenizer": "other"},
    ],
    ids=["weights", "numerics", "tokenizer"],
)
def test_another_reference_or_tokenizer_misses(setting: Setting, changed: dict[str, str]) -> None:
    setting.fill()
    _, statistics = setting.fill(**changed)
    assert (statistics.hits, statistics.computed) == (0, COUNT)


def test_other_tokens_or_other_scored_positions_miss(setting: Setting) -> None:
    setting.fill()
    pair = setting.pairs[0]
    tokens = [[*d.model_input.to_ints(), d.loss_fn_inputs["target_tokens"].data[-1]] for d in pair.datums]
    other_mask = PreferencePair(*build_dpo_datums(tokens[0], tokens[1], 5), 5, 1)
    other_token = PreferencePair(*build_dpo_datums([*tokens[0][:-1], 3], tokens[1], 6), 6, 1)
    _, statistics = setting.fill([other_mask, other_token])
    assert (statistics.hits, statistics.computed) == (0, 2)


def test_a_damaged_entry_is_recomputed_and_counted(setting: Setting) -> None:
    first, _ = setting.fill()
    with sqlite3.connect(setting.path) as database:
        key, values = database.execute("SELECT key, vals FROM logprobs LIMIT 1").fetchone()
        damaged = bytes([values[0] ^ 1]) + values[1:]
        database.execute("UPDATE logprobs SET vals=? WHERE key=?", (damaged, key))
    second, statistics = setting.fill()
    assert (statistics.computed, statistics.damaged) == (1, 1)
    assert same(first, second)
    assert setting.fill()[1].damaged == 0


def test_wrong_values_with_a_right_checksum_stop_the_run(setting: Setting) -> None:
    few = setting.pairs[:3]
    setting.fill(few)
    with sqlite3.connect(setting.path) as database:
        for key, values in database.execute("SELECT key, vals FROM logprobs").fetchall():
            wrong = (np.frombuffer(values, "<f4") + np.float32(0.5)).tobytes()
            row = (wrong, reference_cache.zlib.crc32(wrong), key)
            database.execute("UPDATE logprobs SET vals=?, crc=? WHERE key=?", row)
    with pytest.raises(DataError, match=r"differs by 0\.5.*move the file away"):
        setting.fill(few)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"not a database, but long enough to look like something" * 20, "file is not a database")],
    ids=["other file"],
)
def test_a_file_that_is_no_cache_is_refused(setting: Setting, content: bytes, message: str) -> None:
    setting.path.parent.mkdir()
    setting.path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        setting.fill()


def test_a_cache_broken_in_its_middle_is_refused_by_its_name(setting: Setting) -> None:
    setting.fill()
    content = bytearray(setting.path.read_bytes())
    content[4096:] = bytes([255]) * (
        len(content) - 4096
    )  # all but the first page, which says that it is a database
    setting.path.write_bytes(content)
    with pytest.raises(DataError, match=r"reference cache .*malformed; move the file away"):
        setting.fill()


def test_a_home_that_cannot_be_written_to_is_named(setting: Setting) -> None:
    setting.path.parent.write_text("a file where the folder should be")
    with pytest.raises(ConfigError, match="set FIRESTEEL_HOME to a writable folder"):
        setting.fill()


def test_a_cache_of_another_version_is_refused(setting: Setting) -> None:
    setting.fill(setting.pairs[:1])
    with sqlite3.connect(setting.path) as database:
        database.execute("PRAGMA user_version=99")
    with pytest.raises(DataError, match="version 99; this program writes 1"):
        setting.fill()


KILLED_WHILE_IT_WRITES_ITS_SECOND_BLOCK = """
import os, signal, sys
from dataclasses import replace
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_reference_cache import COUNT, CountingReference, Setting, make_pair
from training.utils.service import build_service_client

class Deadly(list):
    # Some of the block is written already when this is reached.
    def __iter__(self):
        yield from self[: len(self) // 2]
        os.kill(os.getpid(), signal.SIGKILL)

class Killed(CountingReference):
    def forward(self, data, *, weighted_only=False):
        answer = super().forward(data, weighted_only=weighted_only)
        outputs = answer.loss_fn_outputs
        return replace(answer, loss_fn_outputs=Deadly(outputs)) if self.forwards == 2 else answer

service = build_service_client(base_model={model!r}, lora_rank=0)
client = service.create_reference_client()
pairs = [make_pair(index) for index in range(COUNT)]
Setting(Path({path!r}), Killed(client), client.identify().result(), pairs).fill()
"""


def test_a_killed_pass_leaves_whole_blocks_and_the_next_run_completes_it(
    setting: Setting, llama_folder: str
) -> None:
    script = KILLED_WHILE_IT_WRITES_ITS_SECOND_BLOCK.format(
        tests=str(Path(__file__).parent), model=llama_folder, path=str(setting.path)
    )
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    with sqlite3.connect(setting.path) as database:
        assert database.execute("SELECT count(*) FROM logprobs").fetchone() == (2 * BLOCK_PAIRS,)
    _, statistics = setting.fill()
    assert (statistics.hits, statistics.computed) == (BLOCK_PAIRS, COUNT - BLOCK_PAIRS)


ONE_OF_TWO = """
import hashlib, sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_reference_cache import COUNT, CountingReference, Setting, make_pair
from training.utils.service import build_service_client

client = build_service_client(base_model={model!r}, lora_rank=0).create_reference_client()
pairs = [make_pair(index) for index in range(COUNT)][::{step}]
reference = CountingReference(client, drift={step} * 1e-5)
setting = Setting(Path({path!r}), reference, client.identify().result(), pairs)
Path({path!r} + ".ready{step}").touch()
while not Path({path!r} + ".go").exists():
    time.sleep(0.001)
values, statistics = setting.fill()
print(statistics.computed, hashlib.sha256(
    b"".join(side.tobytes() for pair in values[::{step}] for side in (pair.chosen, pair.rejected))
).hexdigest())
"""


def test_two_processes_at_once_use_the_same_values_though_their_blocks_differ(
    setting: Setting, llama_folder: str
) -> None:
    setting.path.parent.mkdir()
    tests = str(Path(__file__).parent)
    scripts = [
        ONE_OF_TWO.format(tests=tests, model=llama_folder, path=str(setting.path), step=step)
        for step in (1, -1)
    ]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for script in scripts
    ]
    until = time.monotonic() + 60
    while len(list(setting.path.parent.glob("*.ready*"))) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    setting.path.with_name(setting.path.name + ".go").touch()
    said = [process.communicate(timeout=60) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    digests = [out.split()[1] for out, _ in said]
    assert digests[0] == digests[1]
    assert setting.fill()[1].computed == 0


def test_any_order_of_any_pairs_gives_each_the_same_values(setting: Setting) -> None:
    values, _ = setting.fill()

    @settings(deadline=None, max_examples=20)
    @given(st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=COUNT))
    def check(order: list[int]) -> None:
        again, statistics = setting.fill([setting.pairs[i] for i in order])
        assert (statistics.hits, statistics.computed) == (len(order), 0)
        assert same(again, [values[i] for i in order])

    check()


def test_a_new_file_that_another_run_is_just_making_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "reference.sqlite"
    # Not in write-ahead mode yet: SQLite itself does not wait for this lock, it says "locked" at once.
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    release = threading.Timer(0.2, other.execute, ["COMMIT"])
    release.start()
    ReferenceCache(path, ModelIdentity("weights", "float32 cpu"), "tokenizer").close()
    release.join()
    other.close()


def test_of_two_writers_the_first_wins_and_both_use_its_values(setting: Setting) -> None:
    one = ReferenceCache(setting.path, setting.identity, "tokenizer")
    other = ReferenceCache(setting.path, setting.identity, "tokenizer")
    # The same pair in blocks of different composition: the last bits may differ, what is used may not.
    first, _ = filled(one, setting.pairs[:BLOCK_PAIRS], setting.reference)
    setting.reference.drift = 1e-5
    second, _ = filled(other, [*setting.pairs[5:BLOCK_PAIRS], *setting.pairs[-3:]], setting.reference)
    assert same(second[: BLOCK_PAIRS - 5], first[5:])
    assert same(filled(one, setting.pairs[:BLOCK_PAIRS], setting.reference)[0], first)
    one.close()
    other.close()


def test_one_batch_at_a_time_gives_what_is_missing_and_checks_some_of_what_is_there(setting: Setting) -> None:
    cache = ReferenceCache(setting.path, setting.identity, "tokenizer")
    batches = [setting.pairs[start : start + 3] for start in range(0, 9, 3)]
    for batch in batches:
        assert cache.complete(batch, setting.reference).computed == 3
    values = cache.read(setting.pairs[:9])
    # What this run has computed itself is not compared with what it computes.
    assert cache.complete(batches[1], setting.reference, probes=2).probed == 0
    cache.close()
    cache = ReferenceCache(setting.path, setting.identity, "tokenizer")
    setting.reference.sequences = 0
    again = cache.complete(batches[1], setting.reference, probes=2)
    assert (again.hits, again.computed, again.probed) == (3, 0, 2)
    assert setting.reference.sequences == 2 * 2
    assert same(cache.read(setting.pairs[:9]), values)
    setting.reference.drift = 0.5
    with pytest.raises(DataError, match=r"differs by 0\.5"):
        cache.complete(batches[2], setting.reference, probes=1)
    cache.close()


def test_pairs_that_nobody_asked_the_reference_about_are_not_there(setting: Setting) -> None:
    cache = ReferenceCache(setting.path, setting.identity, "tokenizer")
    with pytest.raises(DataError, match="vanished"):
        cache.read(setting.pairs[:1])
    cache.close()


def test_a_row_that_is_not_finite_is_the_same_wherever_it_is_not() -> None:
    """An attention weight of 0 times NaN is NaN: how far it spreads in its row depends on how that is packed."""
    finite, one, two = (np.array(row, np.float32) for row in ([1, 2], [1, np.nan], [np.nan, -np.inf]))
    assert largest_difference(one, two) == largest_difference(finite, finite) == 0
    assert largest_difference(finite, one) == largest_difference(two, finite) == np.inf
    assert largest_difference(finite, finite + np.float32(0.5)) == 0.5
    assert largest_difference(finite[:0], finite[:0]) == 0
