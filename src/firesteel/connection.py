"""`firesteel.connect`: the composition root. Only here does the client side reach an engine, and lazily."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from firesteel.sdk.errors import ConfigError

if TYPE_CHECKING:
    from firesteel.sdk.service_client import Provisioning, ServiceClient

logger = logging.getLogger("firesteel")

# The guide's code falls back to this address when the environment names none.
GUIDE_CLOUD = "https://api.fireworks.ai"


def connect(
    base_url: str | None = None,
    api_key: str | None = None,
    *,
    additional_headers: Mapping[str, str] | None = None,
    provisioning: Provisioning | None = None,
) -> ServiceClient:
    """A service client on the trainer that `base_url` names.

    `None` reads the environment (`FIRESTEEL_BASE_URL`, then `FIREWORKS_BASE_URL`); nothing there, or
    `"local"`, means a trainer in this process, which needs no key and ignores `api_key`. An explicit
    argument wins over the environment, with one exception: the guide's default cloud address gives way
    to `FIRESTEEL_BASE_URL`, and a line says so. For a URL the key is `api_key`, or that of the environment
    (`FIRESTEEL_API_KEY`, then `FIREWORKS_API_KEY`); `additional_headers` go with every request.
    """
    from firesteel.sdk.service_client import ServiceClient

    address = chosen_address(base_url)
    if address != "local":
        _refuse_no_server(address)
        from firesteel.sdk.http_transport import HTTPTransport

        return ServiceClient(HTTPTransport(address, chosen_key(api_key), additional_headers), provisioning)
    from firesteel.engine.engine import Engine

    return ServiceClient(Engine(), provisioning)


def chosen_address(base_url: str | None = None) -> str:
    """Where the model work runs: an address, or `local`. By argument, or by the environment."""
    own = os.environ.get("FIRESTEEL_BASE_URL") or None
    if base_url is None:
        return (own or os.environ.get("FIREWORKS_BASE_URL") or "local").rstrip("/")
    if base_url.rstrip("/") == GUIDE_CLOUD and own:
        logger.warning(
            "base_url=%s is the guide's default; using FIRESTEEL_BASE_URL=%s instead", base_url, own
        )
        return own.rstrip("/")
    return base_url.rstrip("/")


def chosen_key(api_key: str | None = None) -> str | None:
    """The key for it, likewise."""
    return api_key or os.environ.get("FIRESTEEL_API_KEY") or os.environ.get("FIREWORKS_API_KEY") or None


def _refuse_no_server(address: str) -> None:
    """Raise `ConfigError` for an address at which no server of ours can be."""
    embedded = (
        'base_url="local", or FIREWORKS_BASE_URL=local (or FIRESTEEL_BASE_URL=local) in the environment'
    )
    if address == GUIDE_CLOUD:
        raise ConfigError(
            f"base_url: Firesteel does not train in the cloud at {address}. To train in this process, set {embedded}"
        )
    if not address.startswith(("http://", "https://")):
        raise ConfigError(
            f'base_url: {address!r} is neither "local" nor a URL. To train in this process, set {embedded}'
        )
