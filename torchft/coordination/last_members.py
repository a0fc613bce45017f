"""The members of the last quorum of an earlier reign, as far as they do not come back by themselves.

The idea
    They may be training, cut off from the lighthouse but not from each other, so nobody takes their place until their
    leases have run out (:mod:`torchft.core.standing`). That is 300 s, which a job that was started anew as a whole
    would wait for nothing. Two things shorten it: a look at their life addresses, and the word of an operator.

Rules
    - Whose address refuses has ended: it is told to the core at once.
    - An operator *forgets* a quorum by its id. That holds for this quorum and no later one, so the order may stay in a
      command line that is run again and again.
    - Who is forgotten counts as dead, unless its address accepts connections: then it lives, whatever was said, and is
      waited for as before.
    - Who is forgotten and lives all the same, out of reach, is fenced when it is back as anybody who comes too late:
      its quorum is over, it asks, and whoever is further gives the others its state (decision 16).

Everything runs on the loop.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable

from torchft.core.election import LastQuorum
from torchft.runtime.life import Sign, examine

__all__ = ["LastMembers"]

logger = logging.getLogger(__name__)

_LOOKS = (0.0, 0.1, 0.3, 1.0, 3.0)
"""Pauses in seconds between the looks at those that do not come."""
_LOOKED_AT_ONCE = 64
_NAMED = 8


class LastMembers:
    """See the module's docstring.

    Args:
        last: the quorum.
        patience: seconds for which its members are waited for, at the longest.
        forget: an operator says that they are gone.
        missing: whether a member has not come yet; False also when this reign is over.
        gone: told of each that is known to be dead, and how.
    """

    def __init__(
        self,
        last: LastQuorum,
        *,
        patience: float,
        forget: bool,
        missing: Callable[[str], bool],
        gone: Callable[[str, str], None],
    ) -> None:
        self._last = last
        self._patience = patience
        self._forget = forget
        self._missing = missing
        self._gone = gone

    def announce(self) -> None:
        """Says in the log what begins."""
        ids = [replica_id for replica_id, _ in self._last.members]
        logger.info(
            "the last quorum before this start was %d: %s%s. %s",
            self._last.quorum_id,
            ", ".join(ids[:_NAMED]),
            " …" if len(ids) > _NAMED else "",
            "It is to be forgotten: who of it cannot be reached is not waited for."
            if self._forget
            else "Its members may be training: nobody takes their place until one of them asks, all are seen to have "
            f"ended, or {self._patience:g} s have passed.",
        )

    async def run(self) -> None:
        """Looks at them until all are here or known to be dead, or need not be waited for any more."""
        until = time.monotonic() + self._patience
        if self._forget:
            self._bury_unseen([replica_id for replica_id, life in self._last.members if not life])
        lives = {replica_id: life for replica_id, life in self._last.members if life}
        for pause in itertools.chain(_LOOKS, itertools.repeat(_LOOKS[-1])):
            await asyncio.sleep(pause)
            lives = {replica_id: life for replica_id, life in lives.items() if self._missing(replica_id)}
            if not lives or time.monotonic() > until:
                return
            looking = list(lives.items())
            for some in (looking[i : i + _LOOKED_AT_ONCE] for i in range(0, len(looking), _LOOKED_AT_ONCE)):
                signs = await asyncio.gather(*(examine(life) for _, life in some))
                for (replica_id, life), sign in zip(some, signs, strict=True):
                    if self._saw(replica_id, life, sign, first=pause == 0):
                        del lives[replica_id]

    def _saw(self, replica_id: str, life: str, sign: Sign, first: bool) -> bool:
        """Returns whether there is nothing more to find out about it."""
        if not self._missing(replica_id):
            return True
        if sign is Sign.GONE:
            logger.info("replica %s of the last quorum is gone: its process has ended", replica_id)
            self._gone(replica_id, "its process has ended")
            return True
        if not self._forget:
            return False
        if sign is Sign.UNKNOWN:
            self._bury_unseen([replica_id])
            return True
        if first:
            logger.warning(
                "replica %s of the last quorum is not forgotten: its process lives, %s accepts connections. End it, "
                "or wait until it asks or its lease has run out.",
                replica_id,
                life,
            )
        return False

    def _bury_unseen(self, replica_ids: list[str]) -> None:
        for replica_id in replica_ids:
            if self._missing(replica_id):
                logger.info("replica %s of the last quorum is forgotten, as was ordered", replica_id)
                self._gone(replica_id, "an operator says that it is gone")
