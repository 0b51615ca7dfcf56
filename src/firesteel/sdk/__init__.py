"""What a training loop is written in: types, futures, clients. Knows no model and imports no torch.

``from firesteel import sdk as tinker`` serves where a loop expects the `tinker` package's types.
"""

from firesteel.sdk.errors import (
    ClosedError,
    ConfigError,
    DataError,
    FiresteelError,
    ModelError,
    NotBuiltYetError,
    OperationError,
    OperationFailed,
    RowError,
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
    LoraConfig,
    ModelInput,
    OptimStepResponse,
    SampledSequence,
    SampleResponse,
    SamplingParams,
    SaveWeightsResponse,
    TensorData,
)
from firesteel.sdk.verification import Verification

__all__ = [
    "APIFuture",
    "AdamParams",
    "ClosedError",
    "ConfigError",
    "DataError",
    "Datum",
    "EncodedTextChunk",
    "FiresteelError",
    "ForwardBackwardOutput",
    "LoraConfig",
    "ModelError",
    "ModelInput",
    "NotBuiltYetError",
    "OperationError",
    "OperationFailed",
    "OptimStepResponse",
    "Provisioning",
    "RowError",
    "SampleResponse",
    "SampledSequence",
    "SamplingParams",
    "SaveWeightsResponse",
    "ServiceClient",
    "TensorData",
    "TrainingClient",
    "Transport",
    "UserError",
    "Verification",
    "VerificationFailed",
]
