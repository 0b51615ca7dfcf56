"""The kinds of device that this machine has."""

from __future__ import annotations

import os

import torch

from firesteel.sdk.errors import ConfigError

DEVICE_VARIABLE = "FIRESTEEL_DEVICE"


def devices_found() -> tuple[str, ...]:
    """The preferred one first; `FIRESTEEL_DEVICE` names the only one to use. `ConfigError` if it is not there."""
    found = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    chosen = os.environ.get(DEVICE_VARIABLE)
    if not chosen:
        return found
    if chosen not in found:
        raise ConfigError(f"{DEVICE_VARIABLE}={chosen}: this machine has {' and '.join(found)}")
    return (chosen,)
