"""What recipes are assembled from. The names of the guide, in one place."""

from training.utils.client import ReconnectableClient
from training.utils.config import TensorBoardConfig, TrackioConfig, TrainerConfig, WandBConfig
from training.utils.losses import DpoObjective, make_pair_loss, sigmoid_dpo
from training.utils.odds_ratio import OrpoObjective
from training.utils.pairs import PreferencePair, build_dpo_datums
from training.utils.reference_cache import ReferenceCache
from training.utils.schedules import Schedule
from training.utils.service import build_service_client

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
