"""How a policy learns from the rows of a kind: what a recipe's loss makes of a batch, and of held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from firesteel.sdk import Datum, ForwardBackwardOutput, Verification
from training.utils.client import ReconnectableClient
from training.utils.heldout_rows import HeldoutRows
from training.utils.reference_pass import AnyReferences
from training.utils.row_check import RowKind
from training.utils.row_sets import RowSet

T = TypeVar("T")


class Learner(Protocol[T]):
    """One object for training, evaluation and verification, so that the three cannot differ."""

    @property
    def rows(self) -> RowKind[T]:
        """What the rows of its files are."""

    @property
    def loss_name(self) -> str:
        """The metric that is optimised."""

    @property
    def shown(self) -> tuple[str, ...]:
        """The metrics of a line for people."""

    @property
    def best_by(self) -> tuple[str, ...]:
        """The held-out metrics that a checkpoint may be kept for."""

    def data(self, items: Sequence[T]) -> list[Datum]:
        """The sequences of a batch, each once."""

    def accumulate(
        self, policy: ReconnectableClient, items: Sequence[T], references: AnyReferences
    ) -> ForwardBackwardOutput:
        """Add the gradient of one optimizer step's loss; metrics of the batch, those of a loss by plain names."""

    def verify(
        self, policy: ReconnectableClient, items: Sequence[T], references: AnyReferences
    ) -> Verification:
        """Compare this batch with transformers' own forward."""

    def evaluate(
        self,
        policy: ReconnectableClient,
        rows: RowSet[T],
        references: AnyReferences,
        abandon: Callable[[], bool],
        keep: Callable[[HeldoutRows], None],
    ) -> dict[str, float]:
        """Metrics over held-out rows, each counted once, however they are batched; empty if `abandon` says so.

        `keep` is told what there is of each row.
        """
