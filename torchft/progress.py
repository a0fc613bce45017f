"""How far one replica is in its training. Its step moves with a commit, a heal, or a state that is loaded."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Progress"]


@dataclass
class Progress:
    """How far a replica is."""

    step: int = 0
    """Steps committed, and the index of the one under way."""
    batches_committed: int = 0
    """Over all participants."""
    failures: int = 0
    """Steps in a row that were not committed."""
    breaks: int = 0
    """Of these, from the last that was not only this group's own heal: so often did a quorum break."""
    timed_out: bool = False
    """In the last step it waited for the other groups in vain."""
    lineage: int = 0
    """The quorum in which the newest step was committed, here or where this state was healed from; 0: not known."""

    def state_dict(self) -> dict[str, int]:
        """What a healing replica takes over."""
        return {"step": self.step, "batches_committed": self.batches_committed}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.step = int(state_dict["step"])
        self.batches_committed = int(state_dict["batches_committed"])
        self.lineage = 0
