from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

import firesteel
from firesteel.engine.engine import Engine
from firesteel.sdk import ConfigError, FiresteelError, Provisioning
from training.utils.service import build_service_client

CLOUD = "https://api.fireworks.ai"
WHAT_TO_SET = ("FIREWORKS_BASE_URL=local", "FIRESTEEL_BASE_URL=local", 'base_url="local"')


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Where a call leads under these variables: `embedded`, or the error's type and text."""

    def connect(base_url: str | None = None, own: str | None = None, guide: str | None = None) -> str:
        for name, value in (("FIRESTEEL_BASE_URL", own), ("FIREWORKS_BASE_URL", guide)):
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        try:
            service = firesteel.connect(base_url)
        except FiresteelError as error:
            return f"{type(error).__name__} {error}"
        service.close()
        transport = service._transport
        return "embedded" if isinstance(transport, Engine) else transport._connection.url

    return connect


@pytest.mark.parametrize(
    ("base_url", "own", "guide"),
    [
        (None, None, None),
        ("local", None, None),
        (None, "local", None),
        (None, None, "local"),
        (None, "local", CLOUD),  # our variable before the guide's
        (None, "", "local"),  # an empty variable is none
        (None, "", ""),
        ("local", "http://there:8000", "http://elsewhere:8000"),  # the argument before both
        (CLOUD, "local", None),  # the guide's default is no choice of the user's
        (CLOUD + "/", "local", None),
        ("local/", None, None),
    ],
)
def test_a_trainer_in_this_process_is_reached(reached, base_url, own, guide) -> None:
    assert reached(base_url, own, guide) == "embedded"


@pytest.mark.parametrize(
    ("base_url", "own", "guide", "address"),
    [
        ("http://there:8000", None, None, "http://there:8000"),
        ("https://there/", None, None, "https://there"),
        ("http://there:8000", "local", "local", "http://there:8000"),
        (None, "http://there:8000", "local", "http://there:8000"),
        (None, None, "http://there:8000", "http://there:8000"),
        (CLOUD, "http://there:8000", None, "http://there:8000"),
    ],
)
def test_a_url_leads_to_the_server_there(reached, base_url, own, guide, address) -> None:
    assert reached(base_url, own, guide) == address


@pytest.mark.parametrize(
    ("base_url", "own", "guide"),
    [
        (CLOUD, None, None),
        (CLOUD, None, "local"),
        (None, None, CLOUD),
        (None, CLOUD, None),
        (CLOUD, CLOUD, None),
    ],
)
def test_the_cloud_is_refused_naming_it_and_what_to_set(reached, base_url, own, guide) -> None:
    said = reached(base_url, own, guide)
    assert said.startswith(f"ConfigError base_url: Firesteel does not train in the cloud at {CLOUD}")
    assert all(part in said for part in WHAT_TO_SET)


@pytest.mark.parametrize("base_url", ["there:8000", "LOCAL", "ftp://there", ""])
def test_what_is_no_url_is_refused_with_its_text(reached, base_url) -> None:
    said = reached(base_url)
    assert said.startswith(f"ConfigError base_url: {base_url!r} is neither")
    assert all(part in said for part in WHAT_TO_SET)


def test_leaving_the_guides_default_address_is_told_in_one_line(
    reached, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="firesteel"):
        reached(CLOUD, own="local")
        lines = [record for record in caplog.records if CLOUD in record.message]
        assert len(lines) == 1
        assert "FIRESTEEL_BASE_URL=local" in lines[0].message
        caplog.clear()
        reached("local", own="http://there:8000")
        reached(None, own="local", guide=CLOUD)
        assert caplog.records == []


def test_a_trainer_in_this_process_needs_no_key_and_ignores_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in (None, "", "fw_whatever"):
        firesteel.connect("local", key).close()
    monkeypatch.setenv("FIREWORKS_API_KEY", "fw_whatever")
    firesteel.connect("local", additional_headers={"X-Team": "a"}).close()


def test_the_provisioning_reaches_the_service() -> None:
    wanted = Provisioning(base_model="tiny-llama", lora_rank=4)
    with firesteel.connect("local", provisioning=wanted) as service:
        assert service.provisioning is wanted
    with firesteel.connect("local") as service:
        assert service.provisioning == Provisioning()


def test_the_guides_way_to_a_service_follows_the_same_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="FIREWORKS_BASE_URL=local"):
        build_service_client(base_model="tiny-llama", api_key="fw_whatever", base_url=CLOUD)
    monkeypatch.setenv("FIREWORKS_BASE_URL", "local")
    service = build_service_client(
        api_key="fw_whatever",
        base_model="tiny-llama",
        tokenizer_model="tiny-llama",
        lora_rank=0,
        max_context_length=None,
        learning_rate=1e-5,
        additional_headers=None,
        cleanup_trainer_on_close=True,
    )
    assert service.provisioning.lora_rank == 0
    service.close()


def test_the_two_names_of_the_rank_are_one_setting() -> None:
    for settings, rank in (({}, 0), ({"lora_rank": 8}, 8), ({"max_lora_rank": 8}, 8), ({"lora_rank": 0}, 0)):
        with build_service_client(base_model="tiny-llama", base_url="local", **settings) as service:  # type: ignore[arg-type]
            assert service.provisioning.lora_rank == rank
    with pytest.raises(ConfigError, match="lora_rank=8 and max_lora_rank=0"):
        build_service_client(base_model="tiny-llama", base_url="local", lora_rank=8, max_lora_rank=0)
    with pytest.raises(match="deployment"):
        build_service_client(base_model="tiny-llama", base_url="local", deployment=object())
