"""How long rows may be: what a run would take, known before any model is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from firesteel import store
from firesteel.catalog import load_catalog
from firesteel.connection import chosen_address
from firesteel.sdk.errors import ModelError
from training.utils.service import build_service_client
from training.utils.trainers import build_service
from training.utils.training_settings import TrainingSettings


@dataclass(frozen=True)
class RowLimit:
    """The longest row in tokens, None for any length; and for people where that is from."""

    tokens: int | None
    says: str

    @classmethod
    def of_run(cls, config: TrainingSettings) -> RowLimit:
        """That of the settings, or of the trainer that this run would get."""
        if config.max_seq_len is not None:
            return cls(config.max_seq_len, "by max_seq_len of the run")
        with build_service(config) as service:
            return cls(service.longest_sequence(), "what the trainer of the run takes")

    @classmethod
    def of_model(cls, name: str) -> RowLimit:
        """That of a run on a model whose settings leave it open; it is not fetched for that."""
        if chosen_address() != "local":
            return cls(None, "it is that of a trainer at a server, which is not asked here")
        try:
            if store.find(load_catalog().resolve_model(name)) is None:
                return cls(None, f"{name} is not here (`firesteel models pull {name}`)")
            with build_service_client(base_model=name) as service:
                return cls(service.longest_sequence(), f"what {name} takes; --max-seq-len sets another")
        except ModelError as error:
            return cls(None, str(error))

    @property
    def line(self) -> str:
        """For people."""
        if self.tokens is None:
            return f"longest row: no limit was checked: {self.says}; --max-seq-len sets one"
        return f"longest row: {self.tokens:,} tokens, {self.says}"
