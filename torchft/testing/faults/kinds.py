"""The kinds of faults a plan can name: their options, and what each is done to.

One table, from which plans are parsed, checked and printed, and which error messages list.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torchft.testing.faults.process import exception_type

__all__ = ["KINDS", "Kind", "Option", "duration", "kind_named", "options_of", "show_duration"]

_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_SIZES = {"": 1, "b": 1}
_SIZES |= {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)}
_SIZES |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)}
_NUMBER = re.compile(r"\s*(\d+(?:\.\d+)?(?:e-?\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Option:
    """One option of a kind.

    Attributes:
        name: keyword.
        looks: what a value looks like, for people.
        parse: from text; a ValueError says what is wrong.
        needed: there is no default.
    """

    name: str
    looks: str
    parse: Callable[[str], Any]
    needed: bool = False


@dataclass(frozen=True)
class Kind:
    """One kind of fault.

    Attributes:
        name: in plans and logs.
        of: what it is done to: ``process`` (any, from outside too), ``self`` (the process that has the injector),
            ``other`` (from outside only), ``link``, or ``machine``.
        options: in the order in which they are written.
    """

    name: str
    of: str
    options: tuple[Option, ...] = ()

    def __str__(self) -> str:
        shown = [o.name if o.needed else f"[{o.name}]" for o in self.options]
        return f"{self.name}({', '.join(shown)})" if shown else self.name


def duration(text: str) -> float:
    """``2``, ``2s``, ``250ms``, ``1.5m``, ``1h`` as seconds.

    Raises:
        ValueError: it is none of these.
    """
    found = _NUMBER.fullmatch(text)
    unit = found[2].lower() or "s" if found else ""
    if found is None or unit not in _UNITS:
        raise ValueError(f"{text!r} is not a duration: expected for instance 2s or 250ms")
    return float(found[1]) * _UNITS[unit]


def show_duration(seconds: float) -> str:
    """As :func:`duration` reads it back."""
    return f"{seconds!r}s" if seconds != int(seconds) else f"{int(seconds)}s"


def kind_named(name: str) -> Kind:
    """One of :data:`KINDS`.

    Raises:
        ValueError: there is none of that name; the message lists all.
    """
    if name not in KINDS:
        raise ValueError(f"there is no kind {name!r}; there are: {', '.join(map(str, KINDS.values()))}")
    return KINDS[name]


def options_of(kind: str, given: Mapping[str, Any]) -> Kind:
    """The kind, after checking that it takes these options.

    Raises:
        ValueError: there is no such kind, an option is not one of its options, or one that it needs is missing.
    """
    found = kind_named(kind)
    names = [o.name for o in found.options]
    for name in given:
        if name not in names:
            raise ValueError(f"{kind} has no option {name!r}; it is written {found}")
    for option in found.options:
        if option.needed and given.get(option.name) is None:
            raise ValueError(f"{kind} needs its option {option.name!r}; it is written {found}")
    return found


def _size(text: str) -> int:
    found = _NUMBER.fullmatch(text)
    unit = found[2].lower() if found else "?"
    if found is None or unit not in _SIZES:
        raise ValueError(f"{text!r} is not a number of bytes: expected for instance 65536, 10MB or 1GiB")
    return int(float(found[1]) * _SIZES[unit])


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def _exit_code(text: str) -> int:
    code = _whole(text)
    if code > 255:
        raise ValueError(f"an exit code is between 0 and 255, not {code}")
    return code


def _exception(text: str) -> str:
    exception_type(text)
    return text


_FOR = Option("seconds", "a duration", duration)
_HOW_LONG = Option("seconds", "a duration", duration, needed=True)

KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("kill", "process"),
        Kind("stop", "process", (_FOR,)),
        Kind("continue", "other"),
        Kind("raise", "self", (Option("kind", "an exception", _exception), Option("message", "text", str))),
        Kind("exit", "self", (Option("code", "0 to 255", _exit_code),)),
        Kind("segfault", "self"),
        Kind("hold_gil", "self", (_HOW_LONG,)),
        Kind("busy", "machine", (_HOW_LONG, Option("processes", "a count", _whole))),
        Kind("cut", "link"),
        Kind("block", "link", (_FOR,)),
        Kind("refuse", "link", (_FOR,)),
        Kind("delay", "link", (Option("by", "a duration", duration, needed=True), _FOR)),
        Kind("throttle", "link", (Option("rate", "bytes per second", _size, needed=True), _FOR)),
        Kind(
            "fill_disk",
            "machine",
            (
                Option("path", "a folder", str, needed=True),
                _FOR,
                Option("leave", "bytes", _size),
                Option("limit", "bytes", _size),
            ),
        ),
        Kind("limit_file_size", "self", (Option("size", "bytes", _size, needed=True), _FOR)),
    )
}
"""By name."""
