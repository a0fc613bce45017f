"""A state's tree as JSON, without pickle: which values can be sent, how each is written, and how each is read back.

The idea
    What training states really hold is a short list. Each kind has exactly one JSON form, and what is not on the
    list is refused at the source, with its path, before a byte is sent.

Forms
    ``None``, ``bool``, ``int``, ``str`` and finite ``float`` are themselves. Everything else is an array whose first
    item is a tag: ``dict`` ``["d", key, value, …]``, ``list`` ``["l", …]``, ``tuple`` ``["t", …]``, ``bytes``
    ``["b", base64]``, other floats ``["f", "nan"|"inf"|"-inf"]``, numpy scalars ``["np", dtype, value]``,
    ``torch.dtype`` ``["dtype", name]``, ``torch.device`` ``["device", name]``, ``torch.Size`` ``["size", …]``,
    ``OrderedDict`` ``["od", …]``, ``defaultdict`` ``["dd", factory, key, value, …]``, registered dataclasses
    ``["dc", name, field, value, …]``, pickled objects (only if both sides allow them) ``["pickle", base64]``.
    Tensors are ``["T", …]`` and ``["D", …]``, which :mod:`torchft.checkpointing.manifest` reads and writes.

Rules
    - Types are matched exactly: a subclass is not its base, because the receiver could not tell them apart.
      ``Parameter`` and ``Buffer`` are tensors; they arrive as plain tensors without gradient.
    - Reading calls nothing but the constructors named here and those of registered dataclasses.
    - Trees are at most ``MAX_DEPTH`` deep and paths ``MAX_PATH`` long; keys are ``str`` or ``int``, no key comes twice.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import reprlib
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch

from torchft.checkpointing.transport import ManifestError, UnsafeStateError

__all__ = [
    "DTYPES",
    "JSON",
    "MAX_DEPTH",
    "MAX_PATH",
    "MAX_PATHS",
    "PLAIN",
    "Decoder",
    "Encoder",
    "dtype_name",
    "register_dataclass",
    "tensors_by_path",
]

JSON = Any
"""What ``json`` reads and writes: None, bool, int, float, str, list, dict."""

MAX_DEPTH = 100
MAX_PATH = 4096
"""Characters of a value's path."""
MAX_PATHS = 256 << 20
"""Characters of the paths of all tensors: long keys above many of them are a few bytes each in a manifest."""
_MAX_INT_BITS = 4096

_DTYPE_NAMES = (
    "bool",
    "uint8",
    "int8",
    "uint16",
    "int16",
    "uint32",
    "int32",
    "uint64",
    "int64",
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "complex32",
    "complex64",
    "complex128",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
    "float4_e2m1fn_x2",
)
DTYPES: dict[str, torch.dtype] = {n: getattr(torch, n) for n in _DTYPE_NAMES if hasattr(torch, n)}
"""The tensor types of the format, by name."""
_NAME_OF_DTYPE = {d: n for n, d in DTYPES.items()}
_NAMED_DTYPES = {n: d for n, d in vars(torch).items() if isinstance(d, torch.dtype)}
"""All that torch has. Its attributes are not looked up by a name from the network: some import a module."""

PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
"""The types of tensors that are nothing but memory."""

_NUMPY_SCALARS: dict[str, Any] = {
    "bool_": np.bool_,
    "int8": np.int8,
    "int16": np.int16,
    "int32": np.int32,
    "int64": np.int64,
    "uint8": np.uint8,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "float16": np.float16,
    "float32": np.float32,
    "float64": np.float64,
}
_NAME_OF_NUMPY_SCALAR = {t: n for n, t in _NUMPY_SCALARS.items()}

_FACTORIES: dict[str, Any] = {
    "none": None,
    "dict": dict,
    "list": list,
    "int": int,
    "float": float,
    "str": str,
    "bool": bool,
    "tuple": tuple,
}
_DATACLASSES: dict[str, type] = {}
_C = TypeVar("_C", bound=type)


def dtype_name(dtype: torch.dtype) -> str | None:
    """The format's name of a dtype; None if the format does not carry it."""
    return _NAME_OF_DTYPE.get(dtype)


def register_dataclass(cls: _C, *, name: str | None = None) -> _C:
    """Lets instances of a dataclass be sent. Both sides register it; usable as a decorator.

    Args:
        cls: the dataclass. It is rebuilt by calling it with its ``init`` fields as keywords.
        name: what it is called in the format; by default its module and qualified name.

    Raises:
        TypeError: it is not a dataclass, or the name is taken by another class.
    """
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"{cls!r} is not a dataclass")
    key = name or f"{cls.__module__}.{cls.__qualname__}"
    if _DATACLASSES.setdefault(key, cls) is not cls:
        raise TypeError(f"{key!r} is already registered, for {_DATACLASSES[key]!r}")
    return cls


def _registered_name(cls: type) -> str | None:
    return next((name for name, known in _DATACLASSES.items() if known is cls), None)


def _init_fields(cls: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(cls) if f.init]


def tensors_by_path(value: object, path: str = "state") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a tree with its path. Values the format refuses are passed over."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors_by_path(item, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from tensors_by_path(item, f"{path}[{i}]")
    elif type(value) in _DATACLASSES.values():
        for field in _init_fields(value):
            yield from tensors_by_path(getattr(value, field), f"{path}.{field}")


class Encoder:
    """Writes a tree.

    Args:
        tensor: writes a tensor, given its path.
        allow_pickle: write what the format refuses with ``torch.save``.
    """

    def __init__(self, tensor: Callable[[torch.Tensor, str], JSON], allow_pickle: bool = False) -> None:
        self._tensor = tensor
        self._allow_pickle = allow_pickle

    def encode(self, value: object, path: str = "state", depth: int = 0) -> JSON:
        """The JSON form of ``value``.

        Raises:
            UnsafeStateError: something at or below ``path`` cannot be sent.
        """
        if len(path) > MAX_PATH:
            raise UnsafeStateError(f"{path[:200]}… is a path of more than {MAX_PATH} characters: use shorter keys")
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if depth > MAX_DEPTH:
            raise UnsafeStateError(f"{path[:200]}… is nested more than {MAX_DEPTH} deep (does it hold itself?)")
        kind = type(value)
        if value is None or kind is bool or kind is str:
            return value
        if kind is int:
            assert isinstance(value, int)
            return value if value.bit_length() <= _MAX_INT_BITS else self._refuse(value, path)
        if kind is float:
            assert isinstance(value, float)
            return value if math.isfinite(value) else ["f", repr(value)]
        if kind is dict:
            return ["d", *self._items(value, path, depth)]
        if kind is list or kind is tuple or kind is torch.Size:
            tag = "l" if kind is list else "t" if kind is tuple else "size"
            return [tag, *(self.encode(v, f"{path}[{i}]", depth + 1) for i, v in enumerate(value))]  # type: ignore[var-annotated, arg-type]
        if kind is OrderedDict:
            return ["od", *self._items(value, path, depth)]
        if isinstance(value, defaultdict) and kind is defaultdict:
            for name, factory in _FACTORIES.items():
                if value.default_factory is factory:
                    return ["dd", name, *self._items(value, path, depth)]
            return self._refuse(value, path)
        if isinstance(value, bytes) and kind is bytes:
            return ["b", base64.b64encode(value).decode()]
        if isinstance(value, torch.dtype):
            return ["dtype", str(value).removeprefix("torch.")]
        if isinstance(value, torch.device):
            return ["device", str(value)]
        if kind in _NAME_OF_NUMPY_SCALAR:
            return ["np", _NAME_OF_NUMPY_SCALAR[kind], self.encode(value.item(), path, depth + 1)]  # type: ignore[attr-defined]
        name_of_dataclass = _registered_name(kind)
        if name_of_dataclass is not None:
            out: list[JSON] = ["dc", name_of_dataclass]
            for field in _init_fields(value):
                out += [field, self.encode(getattr(value, field), f"{path}.{field}", depth + 1)]
            return out
        return self._refuse(value, path)

    def _items(self, value: Any, path: str, depth: int) -> list[JSON]:
        out: list[JSON] = []
        for key, item in value.items():
            if type(key) not in (str, int):
                raise UnsafeStateError(
                    f"{path} has a key {key!r} of type {type(key).__name__}, which cannot be sent safely: "
                    "dict keys must be str or int"
                )
            if type(key) is int and key.bit_length() > _MAX_INT_BITS:
                raise UnsafeStateError(f"{path} has a key of more than {_MAX_INT_BITS} bits, which cannot be sent")
            out += [key, self.encode(item, f"{path}[{key!r}]", depth + 1)]
        return out

    def _refuse(self, value: object, path: str) -> JSON:
        if self._allow_pickle:
            buffer = io.BytesIO()
            torch.save(value, buffer)
            return ["pickle", base64.b64encode(buffer.getvalue()).decode()]
        kind = type(value)
        raise UnsafeStateError(
            f"{path} holds a <{kind.__module__}.{kind.__qualname__}>, which cannot be sent safely. Save what it "
            "needs as dicts, lists, numbers, strings and tensors (its state_dict()), register its class with "
            "torchft.checkpointing.register_dataclass if it is a dataclass, or pass allow_pickle=True to the "
            "transports of both sides."
        )


class Decoder:
    """Reads a tree that came from the network: every form is checked.

    Args:
        tensor: reads a tensor's array, given its path.
        allow_pickle: load pickled objects with ``torch.load(weights_only=True)``.
        load: False only checks: pickled objects are not loaded and dataclasses are not built.
    """

    def __init__(
        self, tensor: Callable[[list[JSON], str], object], allow_pickle: bool = False, load: bool = True
    ) -> None:
        self._tensor = tensor
        self._allow_pickle = allow_pickle
        self._load = load

    def decode(self, node: JSON, path: str = "state", depth: int = 0) -> object:
        """The value of ``node``.

        Raises:
            ManifestError: it is not one of the forms.
        """
        if len(path) > MAX_PATH:
            raise ManifestError(f"{path[:200]}… is a path of more than {MAX_PATH} characters")
        if isinstance(node, list) and node and node[0] in ("T", "D"):
            return self._tensor(node, path)
        if node is None or isinstance(node, (bool, int, float, str)):
            return node
        if depth > MAX_DEPTH:
            raise ManifestError(f"{path[:200]}… is nested more than {MAX_DEPTH} deep")
        if not isinstance(node, list) or not node or not isinstance(node[0], str):
            raise ManifestError(f"{path} is neither a value nor a tagged array")
        tag = node[0]
        if tag == "d":
            return self._items(node, 1, path, depth, {})
        if tag in ("l", "t"):
            items = [self.decode(v, f"{path}[{i}]", depth + 1) for i, v in enumerate(node[1:])]
            return items if tag == "l" else tuple(items)
        if tag == "od":
            return self._items(node, 1, path, depth, OrderedDict())
        if tag == "dd" and len(node) >= 2 and isinstance(node[1], str) and node[1] in _FACTORIES:
            return self._items(node, 2, path, depth, defaultdict(_FACTORIES[node[1]]))
        if tag == "size" and all(type(v) is int and 0 <= v < 2**63 for v in node[1:]):
            return torch.Size(node[1:])
        if tag == "dc" and len(node) >= 2 and isinstance(node[1], str):
            return self._dataclass(node, path, depth)
        if len(node) == 2 and isinstance(node[1], str):
            return self._tagged_text(tag, node[1], path)
        if tag == "np" and len(node) == 3 and isinstance(node[1], str) and node[1] in _NUMPY_SCALARS:
            value = self.decode(node[2], path, depth + 1)
            if isinstance(value, (bool, int, float)):
                try:
                    return _NUMPY_SCALARS[node[1]](value)
                except (OverflowError, ValueError) as e:
                    raise ManifestError(f"{path} is not a numpy {node[1]}") from e
        raise ManifestError(f"{path} has an unknown or malformed form {reprlib.repr(node)}")

    def _tagged_text(self, tag: str, text: str, path: str) -> object:
        try:
            if tag == "f" and text in ("nan", "inf", "-inf"):
                return float(text)
            if tag == "b":
                return base64.b64decode(text, validate=True)
            if tag == "dtype" and text in _NAMED_DTYPES:
                return _NAMED_DTYPES[text]
            if tag == "device" and len(text) < 100:
                return torch.device(text)
            if tag == "pickle":
                return self._unpickle(base64.b64decode(text, validate=True), path)
        except ManifestError:
            raise
        except (ValueError, RuntimeError) as e:
            raise ManifestError(f"{path} is not a readable {tag}: {str(e)[:200]}") from e
        raise ManifestError(f"{path} has an unknown or malformed form {reprlib.repr(tag)}")

    def _unpickle(self, data: bytes, path: str) -> object:
        if not self._allow_pickle:
            raise ManifestError(
                f"{path} is a pickled object, which this receiver does not load. Send it in a safe form, or pass "
                "allow_pickle=True here too."
            )
        if not self._load:
            return None
        try:
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as e:
            raise ManifestError(
                f"{path}: this pickled object was refused ({e}). If you trust its class, call "
                "torch.serialization.add_safe_globals([ThatClass])."
            ) from e

    def _dataclass(self, node: list[JSON], path: str, depth: int) -> object:
        cls = _DATACLASSES.get(node[1])
        if cls is None:
            raise ManifestError(
                f"{path} is a {node[1][:100]!r}, which is not registered here: call "
                "torchft.checkpointing.register_dataclass on it before receiving"
            )
        fields: dict[Any, object] = {}
        self._items(node, 2, path, depth, fields)
        if set(fields) != set(_init_fields(cls)):
            raise ManifestError(f"{path}: the fields of {node[1]!r} differ between source and receiver")
        if not self._load:
            return None
        try:
            return cls(**fields)
        except Exception as e:
            raise ManifestError(f"{path}: {node[1]!r} could not be built: {e}") from e

    def _items(self, node: list[JSON], first: int, path: str, depth: int, into: dict[Any, Any]) -> object:
        if (len(node) - first) % 2:
            raise ManifestError(f"{path} has a key without a value")
        for i in range(first, len(node), 2):
            key = node[i]
            if type(key) not in (str, int) or key in into:
                raise ManifestError(f"{path} has an unusable or repeated key")
            into[key] = self.decode(node[i + 1], f"{path}[{key!r}]", depth + 1)
        return into
