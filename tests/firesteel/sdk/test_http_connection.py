"""A connection's patience: what is asked again, for how long, and what is not. Against real servers that misbehave."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from firesteel.sdk import ConfigError, OperationError, TrainerLost, TransportError
from firesteel.sdk.errors import ClosedError
from firesteel.sdk.http_connection import HTTPConnection, Reply, Request


@dataclass(frozen=True)
class Said:
    """One answer of a server."""

    status: int
    content: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)
    broken: bool = False
    """Ends the connection in the middle of the content."""


@dataclass
class Script:
    """Answers in order, the last one for ever; and when each was asked for, with which body."""

    answers: list[Said]
    asked: list[tuple[float, bytes]] = field(default_factory=list)


Serve = Callable[..., tuple[HTTPConnection, Script]]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """A server that follows a script, and a connection to it."""
    servers: list[ThreadingHTTPServer] = []
    connections: list[HTTPConnection] = []

    def start(*answers: Said, patience: float = 20.0) -> tuple[HTTPConnection, Script]:
        script = Script(list(answers))

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                script.asked.append((time.monotonic(), body))
                said = script.answers.pop(0) if len(script.answers) > 1 else script.answers[0]
                self.send_response(said.status)
                for name, value in {**said.headers, "content-length": str(len(said.content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(said.content[: len(said.content) // 2] if said.broken else said.content)
                self.close_connection = True

            do_GET = do_POST = do_PUT = answer  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        connections.append(HTTPConnection(f"http://127.0.0.1:{server.server_port}", {}, patience))
        return connections[-1], script

    yield start
    for connection in connections:
        connection.close()
    for server in servers:
        server.shutdown()
        server.server_close()


GET = Request("GET", "/x")
GOOD = Said(200, b'{"fine": true}')


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_what_may_pass_in_a_moment_is_asked_again_with_the_same_body(serve: Serve, status: int) -> None:
    connection, script = serve(Said(status), Said(status), GOOD)
    assert connection.ask(Request("POST", "/x", b"the same")).json() == {"fine": True}
    assert [body for _, body in script.asked] == [b"the same"] * 3


def test_an_answer_that_breaks_off_is_asked_for_again(serve: Serve) -> None:
    connection, script = serve(Said(200, b'{"fine": true}', broken=True), GOOD)
    assert connection.ask(GET).json() == {"fine": True}
    assert len(script.asked) == 2


def test_a_server_that_says_when_is_left_alone_until_then(serve: Serve) -> None:
    connection, script = serve(Said(429, headers={"retry-after": "1"}), GOOD)
    connection.ask(GET)
    (first, _), (second, _) = script.asked
    assert 0.95 <= second - first < 3


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b'{"error": {"code": "operation", "message": "no such thing"}}', OperationError),
        (b'{"error": {"code": "trainer.lost", "message": "gone"}}', TrainerLost),
        (b"<html>a proxy</html>", ConfigError),
    ],
)
def test_what_will_never_work_is_asked_once_and_raised_as_what_it_is(
    serve: Serve, content: bytes, error: type[Exception]
) -> None:
    connection, script = serve(Said(400, content))
    with pytest.raises(error) as caught:
        connection.ask(GET)
    assert len(script.asked) == 1
    if content.startswith(b"{"):
        assert json.loads(content)["error"]["message"] in str(caught.value)


def test_patience_ends_and_the_next_is_told_at_once(serve: Serve) -> None:
    connection, script = serve(Said(503), patience=1.0)
    started = time.monotonic()
    with pytest.raises(TransportError, match=r"has not answered for \d s \(HTTP 503\); is `firesteel serve`"):
        connection.ask(GET)
    assert time.monotonic() - started < 3
    asked = len(script.asked)
    assert asked >= 2
    with pytest.raises(TransportError):
        connection.ask(GET)
    assert len(script.asked) == asked + 1
    script.answers[:] = [Said(200), Said(503), Said(503), GOOD]
    connection.ask(GET)
    connection.ask(GET)  # it has answered in between: the patience is that of the start again


def test_a_server_that_is_not_there_is_named() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    connection = HTTPConnection(f"http://127.0.0.1:{port}", {}, patience=0.6)
    with pytest.raises(TransportError, match=f"http://127.0.0.1:{port} has not answered"):
        connection.ask(GET)
    connection.close()


def test_closing_ends_what_is_being_asked_again(serve: Serve) -> None:
    connection, script = serve(Said(503))
    errors: list[Exception] = []

    def ask() -> None:
        try:
            connection.ask(GET)
        except ClosedError as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    while not script.asked:
        time.sleep(0.01)
    connection.stop_trying()
    thread.join(5)
    assert [type(error) for error in errors] == [ClosedError]


def test_a_file_is_written_whole_and_hashed_however_often_it_broke_off(serve: Serve, tmp_path: Path) -> None:
    content = bytes(range(256)) * 40
    connection, _ = serve(Said(200, content, broken=True), Said(200, content))
    reply = connection.ask(Request("GET", "/file", into=tmp_path / "file"))
    assert (tmp_path / "file").read_bytes() == content
    assert reply.sha256 == hashlib.sha256(content).hexdigest()


def test_a_file_is_sent_anew_from_its_start(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"all of it")
    connection, script = serve(Said(503), GOOD)
    assert isinstance(connection.ask(Request("PUT", "/file", tmp_path / "file")), Reply)
    assert [body for _, body in script.asked] == [b"all of it"] * 2
