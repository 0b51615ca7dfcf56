"""Learning from pairs: DPO, ORPO and whatever else is a loss of a pair's log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from firesteel.sdk import Datum, ForwardBackwardOutput, Verification
from training.utils.accuracy import Traits, pair_shares
from training.utils.client import ReconnectableClient
from training.utils.evaluation import evaluate
from training.utils.heldout_rows import HeldoutRows
from training.utils.losses import PairObjective, make_pair_loss
from training.utils.pairs import DistinctDatums, PreferencePair
from training.utils.preference_rows import PREFERENCES, PreferenceRows
from training.utils.reference_pass import AnyReferences
from training.utils.row_sets import RowSet


@dataclass(frozen=True)
class PairLearner:
    """See `learner.Learner`."""

    objective: PairObjective
    rows: PreferenceRows = PREFERENCES

    @property
    def loss_name(self) -> str:
        """See `PairObjective`."""
        return self.objective.loss_name

    @property
    def shown(self) -> tuple[str, ...]:
        """See `PairObjective`."""
        return self.objective.shown

    @property
    def best_by(self) -> tuple[str, ...]:
        """See `PairObjective`."""
        return self.objective.best_by

    def data(self, items: Sequence[PreferencePair]) -> list[Datum]:
        """Chosen, rejected, chosen, …; an answer of several pairs once."""
        return DistinctDatums.of(items).data

    def accumulate(
        self, policy: ReconnectableClient, items: Sequence[PreferencePair], references: AnyReferences
    ) -> ForwardBackwardOutput:
        """One forward and one backward."""
        loss = make_pair_loss(items, references.of(items), self.objective)
        result = policy.forward_backward_custom(self.data(items), loss, weighted_only=self._weighted_only)
        shares = pair_shares([Traits.of(pair) for pair in items])
        return replace(result, metrics={**result.metrics, **shares})

    def verify(
        self, policy: ReconnectableClient, items: Sequence[PreferencePair], references: AnyReferences
    ) -> Verification:
        """Nothing is cached before: what a wrong path computes must not be there for the next run."""
        loss = make_pair_loss(items, references.asked_now(items), self.objective)
        return policy.verify(self.data(items), loss, weighted_only=self._weighted_only)

    def evaluate(
        self,
        policy: ReconnectableClient,
        rows: RowSet[PreferencePair],
        references: AnyReferences,
        abandon: Callable[[], bool],
        keep: Callable[[HeldoutRows], None] = lambda rows: None,
    ) -> dict[str, float]:
        """See `evaluation.evaluate`."""
        return evaluate(policy, rows, references, self.objective, abandon=abandon, keep=keep)

    @property
    def _weighted_only(self) -> bool:
        return not self.objective.reads_prompt
