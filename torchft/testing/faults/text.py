"""Plans as text: ``kind(options)@when; …``, read and written.

The grammar is in :meth:`Plan.parse`. Reading and writing are each other's inverse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchft.testing.faults.kinds import Kind, duration, kind_named, options_of, show_duration

__all__ = ["Written", "read_plan", "write_fault"]

_WHEN = "step=7, every=3s, every=10steps, seed=4, life=0, life=first, once=FILE, who=PATTERN"
_SPECIAL = set(" ,;()@='\"")


@dataclass(frozen=True)
class Written:
    """A fault as it is written: ``when`` has the remaining arguments of :class:`Fault`."""

    kind: str
    options: Mapping[str, Any]
    when: Mapping[str, Any]


def read_plan(text: str) -> list[tuple[str, Written]]:
    """Each fault of a plan with its text.

    Raises:
        ValueError: the message has the part that is wrong and lists what there is.
    """
    found: list[tuple[str, Written]] = []
    for raw in _split(text, ";\n"):
        part = raw.strip()
        if not part:
            continue
        try:
            found.append((part, _read_fault(part)))
        except ValueError as e:
            raise ValueError(f"in {part!r}: {e}") from None
    return found


def write_fault(fault: Written) -> str:
    """As :func:`read_plan` reads it."""
    kind = options_of(fault.kind, fault.options)
    options: list[str] = []
    gap = False
    for option in kind.options:
        value = fault.options.get(option.name)
        if value is None:
            gap = True  # those after it need their names
            continue
        shown = show_duration(value) if option.parse is duration else _quoted(str(value))
        options.append(f"{option.name}={shown}" if gap else shown)
    when = {k: v for k, v in fault.when.items() if v is not None}
    shown_when = [f"step={when['at_step']}"] if "at_step" in when else []
    shown_when += [f"every={show_duration(when['every'])}"] if "every" in when else []
    shown_when += [f"every={when['every_steps']}steps"] if "every_steps" in when else []
    shown_when += [f"{name}={_quoted(str(when[name]))}" for name in ("seed", "life", "once", "who") if name in when]
    brackets = f"({', '.join(options)})" if options else ""
    return f"{fault.kind}{brackets}@{','.join(shown_when)}"


def _read_fault(part: str) -> Written:
    left, *rest = _split(part, "@")
    if len(rest) != 1:
        raise ValueError(f"it is written kind(options)@when, and when is some of {_WHEN}")
    name, bracket, inside = left.strip().partition("(")
    if bracket and not inside.endswith(")"):
        raise ValueError(f"{left.strip()!r} has a bracket too many or too few")
    name = name.strip()
    return Written(name, _read_options(kind_named(name), inside[:-1]), _read_when(rest[0]))


def _read_options(kind: Kind, text: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    by_name = {option.name: option for option in kind.options}
    for position, item in enumerate(_split(text, ",") if text.strip() else []):
        name, *value = _split(item, "=", 1)
        if value:
            name, shown = name.strip(), _plain(value[0])
        elif position < len(kind.options):
            name, shown = kind.options[position].name, _plain(item)
        else:
            raise ValueError(f"{item.strip()!r} is one option too many; it is written {kind}")
        if name not in by_name:
            raise ValueError(f"{kind.name} has no option {name!r}; it is written {kind}")
        if name in options:
            raise ValueError(f"option {name!r} is given twice; it is written {kind}")
        options[name] = by_name[name].parse(shown)
    return options


def _read_when(text: str) -> dict[str, Any]:
    when: dict[str, Any] = {}
    for item in _split(text, ","):
        name, *value = _split(item, "=", 1)
        name, shown = name.strip(), _plain(value[0]) if value else ""
        if not shown or name not in ("step", "every", "seed", "life", "once", "who"):
            raise ValueError(f"{item.strip()!r} is not a time; there are: {_WHEN}")
        key: str
        read: str | int | float
        if name == "every" and (steps := shown.removesuffix("steps").removesuffix("step").strip()) != shown:
            key, read = "every_steps", _number(steps, item)
        elif name == "every":
            key, read = "every", duration(shown)
        elif name in ("once", "who"):
            key, read = name, shown
        elif name == "life" and shown == "first":
            key, read = name, 0
        else:
            key, read = "at_step" if name == "step" else name, _number(shown, item)
        if key in when:
            raise ValueError(f"{item.strip()!r} is the second {name}=; one fault has one")
        when[key] = read
    return when


def _number(text: str, item: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{item.strip()!r} needs a whole number of at least 0; there are: {_WHEN}")
    return int(text)


def _split(text: str, separators: str, most: int = -1) -> list[str]:
    """At each of these characters that stands neither in quotes nor in brackets."""
    parts: list[str] = []
    quote, depth, begin = "", 0, 0
    for i, c in enumerate(text):
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        elif c in "()":
            depth += 1 if c == "(" else -1
        elif c in separators and depth == 0 and len(parts) != most:
            parts.append(text[begin:i])
            begin = i + 1
    if quote or depth:
        raise ValueError(f"in {text.strip()!r}: there is a {'quote' if quote else 'bracket'} too many or too few")
    return [*parts, text[begin:]]


def _plain(text: str) -> str:
    text = text.strip()
    return text[1:-1] if len(text) > 1 and text[0] in "'\"" and text[-1] == text[0] else text


def _quoted(text: str) -> str:
    if text and not _SPECIAL & set(text):
        return text
    mark = "'" if '"' in text else '"'
    if mark in text or "\n" in text:
        raise ValueError(f"{text!r} cannot be written: it has both kinds of quotes, or a line break")
    return f"{mark}{text}{mark}"
