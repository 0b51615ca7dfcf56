"""What a training loop is written in: types, futures, clients. Knows no model and imports no torch.

``from firesteel import sdk as tinker`` serves where a loop expects the `tinker` package's types.
"""

from firesteel.sdk.errors import (
    AuthError,
    CheckpointError,
    ClosedError,
    ConfigError,
    DataError,
    FiresteelError,
    ModelError,
    NonFiniteError,
    NotBuiltYetError,
    OperationError,
    OperationFailed,
    RowError,
    StorageError,
    TrainerLost,
    TrainerRewound,
    TransportError,
    UserError,
    VerificationFailed,
)
from firesteel.sdk.futures import APIFuture
from firesteel.sdk.service_client import Provisioning, ServiceClient
from firesteel.sdk.training_client import TrainingClient
from firesteel.sdk.transport import Transport
from firesteel.sdk.types import (
    AdamParams,
    Datum,
    EncodedTextChunk,
    ForwardBackwardOutput,
    LoadStateResponse,
    LoraConfig,
    ModelInput,
    OptimStepResponse,
    SampledSequence,
    SampleResponse,
    SamplingParams,
    SaveStateResponse,
    SaveWeightsResponse,
    TensorData,
)
from firesteel.sdk.verification import Verification

__all__ = [
    "APIFuture",
    "AdamParams",
    "AuthError",
    "CheckpointError",
    "ClosedError",
    "ConfigError",
    "DataError",
    "Datum",
    "EncodedTextChunk",
    "FiresteelError",
    "ForwardBackwardOutput",
    "LoadStateResponse",
    "LoraConfig",
    "ModelError",
    "ModelInput",
    "NonFiniteError",
    "NotBuiltYetError",
    "OperationError",
    "OperationFailed",
    "OptimStepResponse",
    "Provisioning",
    "RowError",
    "SampleResponse",
    "SampledSequence",
    "SamplingParams",
    "SaveStateResponse",
    "SaveWeightsResponse",
    "ServiceClient",
    "StorageError",
    "TensorData",
    "TrainerLost",
    "TrainerRewound",
    "TrainingClient",
    "Transport",
    "TransportError",
    "UserError",
    "Verification",
    "VerificationFailed",
]
