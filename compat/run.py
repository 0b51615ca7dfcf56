"""Run pinned foreign clients against a real `firesteel serve` and compare what they see with the engine here.

    python compat/run.py [--only tinker_0_23]

Each client has a virtual environment of its own under .compat/, without Firesteel; the first run makes them.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parent / ".compat"
# Script under clients/ (and constraints-<name>.txt) -> what is installed for it.
CLIENTS = {
    "fireworks_1_2_9": ["fireworks-ai[training]==1.2.9", "tinker==0.23.0", "torch"],
    "fireworks_1_2_30": ["fireworks-ai[training-sdk]==1.2.30", "torch"],
    "tinker_0_23": ["tinker==0.23.0", "torch"],
}
START_SECONDS, CLIENT_SECONDS, STOP_SECONDS = 60.0, 600.0, 20.0
OURS = ("FIRESTEEL_", "FIREWORKS_", "TINKER_", "PYTHON", "VIRTUAL_ENV")


@dataclass(frozen=True)
class Server:
    """A running `firesteel serve`."""

    url: str
    key: str


@dataclass(frozen=True)
class Outcome:
    """How one client fared."""

    client: str
    passed: bool
    summary: str
    seconds: float


def main() -> None:
    """Make the environments, start the server, run the clients one after another, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=CLIENTS, help="run this client; may be repeated")
    chosen = parser.parse_args().only or list(CLIENTS)
    for client in chosen:
        make_environment(client)
    with tempfile.TemporaryDirectory(prefix="firesteel-compat-") as folder:
        home = Path(folder)
        expected = home / "compat-expected.json"
        print("computing the expected numbers with the engine in this process ...", flush=True)
        engine = {**os.environ, "FIRESTEEL_HOME": str(home / "engine")}
        subprocess.run([sys.executable, HERE / "expected.py", expected], env=engine, check=True)
        with serving(home) as server:
            outcomes = [run_client(client, server, expected) for client in chosen]
    print_table(outcomes)
    sys.exit(0 if all(outcome.passed for outcome in outcomes) else 1)


def make_environment(client: str) -> None:
    """A virtual environment with the pinned client; nothing happens if it is there with these versions."""
    constraints = HERE / f"constraints-{client}.txt"
    wanted = "\n".join([*CLIENTS[client], constraints.read_text()])
    folder = ENVIRONMENTS / client
    stamp = folder / ".installed"
    digest = hashlib.sha256(wanted.encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return
    ENVIRONMENTS.mkdir(exist_ok=True)
    (ENVIRONMENTS / ".gitignore").write_text("*\n")
    print(f"installing {', '.join(CLIENTS[client])} (a few minutes the first time) ...", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    pip = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "--constraint", constraints, *CLIENTS[client]], check=True)
    stamp.write_text(digest)


@contextmanager
def serving(home: Path) -> Iterator[Server]:
    """A server on a free port of this machine, ended afterwards; its output is shown if anything goes wrong."""
    command = [
        *(Path(sys.executable).with_name("firesteel"), "serve", "--host", "127.0.0.1", "--port", "0"),
        *("--home", home / "served", "--base-model", "tiny-llama"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said: list[str] = []
    lines: queue.Queue[str | None] = queue.Queue()
    reader = threading.Thread(target=read_lines, args=(process.stdout, said, lines.put), daemon=True)
    reader.start()
    try:
        yield wait_for_address(lines)
    except BaseException:
        print("the server said:", *said[-100:], sep="\n", flush=True)
        raise
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            print(f"the server did not end within {STOP_SECONDS:.0f} s of SIGTERM; killed", flush=True)


def read_lines(output: IO[str], said: list[str], tell: Callable[[str | None], None]) -> None:
    """Keep reading, so that the server never waits for its output to be read; None at the end."""
    for line in output:
        said.append(line.rstrip("\n"))
        tell(line)
    tell(None)


def wait_for_address(lines: queue.Queue[str | None]) -> Server:
    """Read the server's output until it has said where it is and what key it takes."""
    found: dict[str, str] = {}
    deadline = time.monotonic() + START_SECONDS
    while not {"url", "key"} <= set(found):
        try:
            line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            sys.exit(f"firesteel serve said no address and key within {START_SECONDS:.0f} s")
        if line is None:
            sys.exit("firesteel serve ended before it said its address and key")
        found |= parse_line(line)
    return Server(found["url"], found["key"])


def parse_line(line: str) -> dict[str, str]:
    """What one line of the server's output tells: its address, its key or nothing."""
    told = re.search(r"firesteel serve: (?P<url>https?://\S+)|\bkey: (?P<key>\S+)", line)
    return {name: value for name, value in told.groupdict().items() if value} if told else {}


def run_client(client: str, server: Server, expected: Path) -> Outcome:
    """One client's script in its own environment, its output as it comes."""
    print(f"\n{client}", flush=True)
    begin = time.monotonic()
    command = [
        *(ENVIRONMENTS / client / "bin" / "python", "-u", HERE / "clients" / f"{client}.py"),
        *("--url", server.url, "--key", server.key, "--expected", expected),
    ]
    process = subprocess.Popen(
        command, env=client_environment(server), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    # A client that waits for ever is a failure of the server's like any other.
    alarm = threading.Timer(CLIENT_SECONDS, process.kill)
    alarm.start()
    last = ""
    for line in process.stdout:
        print(f"  {line}", end="", flush=True)
        last = line.strip() or last
    status = process.wait()
    alarm.cancel()
    seconds = time.monotonic() - begin
    killed = f"killed after {CLIENT_SECONDS:.0f} s; " if seconds >= CLIENT_SECONDS else ""
    return Outcome(client, status == 0, killed + last, seconds)


def client_environment(server: Server) -> dict[str, str]:
    """Nothing of Firesteel's own surroundings, and the two ways in which clients are told where to go."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    return {
        **kept,
        "FIREWORKS_BASE_URL": server.url,
        "FIREWORKS_API_KEY": server.key,
        "TINKER_BASE_URL": server.url,
        "TINKER_API_KEY": f"tml-{server.key}",
        "TINKER_TELEMETRY": "0",
        "HF_HUB_OFFLINE": "1",
        "NO_PROXY": "127.0.0.1",
    }


def print_table(outcomes: list[Outcome]) -> None:
    """One line for each client."""
    print()
    for outcome in outcomes:
        verdict = "passed" if outcome.passed else "FAILED"
        print(f"{verdict}  {outcome.client:<17} {outcome.seconds:4.0f} s  {outcome.summary}")


if __name__ == "__main__":
    main()
