"""When a server whose session was lost counts as silent: stopped, or cut off.

The idea
    While a session stands, gRPC's pings watch the server: its C threads answer them, however busy its Python is, and
    a connection on which they do not is ended. Then the member tries to connect again. A server that lives answers
    sooner or later, one that is stopped or unreachable does not. It counts as silent when all of the attempts since
    the loss have failed, and its last sign is a heartbeat timeout ago.

Rules
    - Only an attempt that has failed says something. One that is under way is watched by pings: its server lives.
    - Whatever the server says is a sign, a refusal too.
    - A member that was itself stopped or starved has missed the signs. So silence takes ``_AGAIN`` of a heartbeat
      timeout from the loss on, in which a server that lives is found again.
    - It is said once, until the session stands again.

Nothing here looks at a clock: times are seconds of any one clock that does not jump.
"""

from __future__ import annotations

__all__ = ["Silence"]

_AGAIN = 0.2


class Silence:
    """Of one server, as one of its members hears it."""

    def __init__(self) -> None:
        self._timeout: float | None = None
        self._sign = 0.0
        self._lost: float | None = None
        self._told = False

    def sign(self, now: float) -> None:
        """The server said something."""
        self._sign = now

    def stands(self, now: float, heartbeat_timeout: float) -> bool:
        """The session stands. Returns whether the server was silent until now."""
        was_silent, self._told = self._told, False
        self._sign, self._lost, self._timeout = now, None, heartbeat_timeout
        return was_silent

    def failed(self, now: float) -> None:
        """The session was lost, or an attempt to open it again has failed."""
        if self._lost is None:
            self._lost = now

    def remaining(self, now: float) -> float | None:
        """Seconds until the server counts as silent if nothing comes; None: it is not missed, or it was said."""
        if self._lost is None or self._timeout is None or self._told:
            return None
        due = max(self._sign + self._timeout, self._lost + _AGAIN * self._timeout)
        return max(0.0, due - now)

    def begins(self, now: float) -> float | None:
        """To be asked when an attempt has failed. Seconds since the last sign, once, if the server is silent."""
        if self.remaining(now) != 0.0:
            return None
        self._told = True
        return now - self._sign
