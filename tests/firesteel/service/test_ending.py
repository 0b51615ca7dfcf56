"""How a server ends: what it has promised is kept, what waits is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2

from firesteel.sealed import damage
from firesteel.service.records import Records
from transports import Server, service_in, serving


def post(server: Server, route: str, **body: Any) -> dict[str, Any]:
    answer = httpx2.post(f"{server.url}/api/v1/{route}", json=body, headers={"x-api-key": server.key})
    assert answer.status_code == 200, answer.text
    content: dict[str, Any] = answer.json()
    return content


def test_a_checkpoint_that_was_asked_for_is_whole_and_listed_when_the_server_has_ended(
    tmp_path: Path,
) -> None:
    with service_in(tmp_path, "tiny-llama") as service, serving(service) as server:
        account = service.records.keys()[0].account
        session = post(server, "create_session")["session_id"]
        model = {
            "session_id": session,
            "model_seq_id": 0,
            "base_model": "tiny-llama",
            "lora_config": {"rank": 2},
        }
        promise = post(server, "create_model", **model)
        model_id = post(server, "retrieve_future", **promise)["model_id"]
        for number in range(1, 4):
            post(server, "save_weights", model_id=model_id, seq_id=number, path=f"step-{number}")
        # Nobody asks for the results: the server is told to end now.
    records = Records.open(f"sqlite:///{tmp_path}/records.sqlite")
    listed = records.checkpoints(account)
    records.close()
    # The running one at least; those that still waited may have been told that it ended.
    assert [checkpoint.name for checkpoint in listed] == ["step-1", "step-2", "step-3"][: len(listed)]
    assert listed
    assert [damage(Path(checkpoint.folder)) for checkpoint in listed] == [None] * len(listed)
    folders = {path.name for path in (tmp_path / "checkpoints").rglob("step-*")}
    assert folders == {checkpoint.name for checkpoint in listed}
