"""What recipes are assembled from. The names of the guide, in one place."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from training.utils.client import ReconnectableClient
from training.utils.config import TensorBoardConfig, TrackioConfig, TrainerConfig, WandBConfig
from training.utils.losses import DpoObjective, make_pair_loss, sigmoid_dpo
from training.utils.odds_ratio import OrpoObjective
from training.utils.schedules import Schedule
from training.utils.service import build_service_client

if TYPE_CHECKING:
    from training.utils.pairs import PreferencePair, build_dpo_datums
    from training.utils.reference_cache import ReferenceCache

__all__ = [
    "DpoObjective",
    "OrpoObjective",
    "PreferencePair",
    "ReconnectableClient",
    "ReferenceCache",
    "Schedule",
    "TensorBoardConfig",
    "TrackioConfig",
    "TrainerConfig",
    "WandBConfig",
    "build_dpo_datums",
    "build_service_client",
    "make_pair_loss",
    "sigmoid_dpo",
]

# What reads and renders rows is imported when it is asked for: settings, and so `--help`, need none of it.
_ASKED_FOR = {"PreferencePair": "pairs", "build_dpo_datums": "pairs", "ReferenceCache": "reference_cache"}


def __getattr__(name: str) -> Any:
    if name not in _ASKED_FOR:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ASKED_FOR[name]}"), name)
