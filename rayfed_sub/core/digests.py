"""Digests of Python objects: of values by what they hold, of functions and classes by what they do.

They are the same in every process of one version of Python, which pickles are not.  A function counts with its
bytecode, defaults, closure, and with what it reads by a global name: constants, objects, and own functions, also
through the name of a module of the caller's; comments do not, nor what it imports when it is called.
"""

from __future__ import annotations

import argparse
import enum
import functools
import hashlib
import inspect
import logging
import numbers
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path, PurePath
from typing import Any

import cloudpickle
import numpy as np
import torch
from torch import Tensor, nn

_LIBRARIES = ("site-packages", "dist-packages")
_PLAIN = (bool, int, float, complex, str, bytes, bytearray, type(None))
_CONSTANTS = (
    *(*_PLAIN, numbers.Number, range, re.Pattern, PurePath, enum.Enum, torch.dtype, torch.device),
    *(Tensor, np.ndarray, np.generic, nn.Module, types.SimpleNamespace, argparse.Namespace),
)


def digest(value: Any) -> bytes:
    """The 16-byte digest of a value.

    Numbers, text, bytes, lists, mappings, arrays, tensors, images, dataclasses and functions count by their content;
    other objects by their class and attributes, or by their pickle; what has none, such as a lock, by its class.

    >>> digest({"a": 1, "b": [2.0]}) == digest({"b": [2.0], "a": 1}), digest(1) == digest(True)
    (True, False)
    """
    return _Digests().of(value)


def module_digest(module: nn.Module) -> bytes:
    """The digest of a module without the numbers in its tensors: classes, structure, plain attributes, and the code of
    classes that no library brings."""
    return _Digests().of_module(module)


class _Digests:
    """Digests of one object and all that it refers to, which may refer back to it."""

    def __init__(self) -> None:
        self._open: set[int] = set()  # objects on the way down
        self._known: dict[int, tuple[Any, bytes]] = {}  # those behind, which stay alive, so that no other has their id

    def of(self, value: Any) -> bytes:
        if id(value) in self._open:
            return b"again"
        if isinstance(value, _PLAIN):
            return _sum(type(value).__name__, repr(value).encode("utf-8", "surrogatepass"))
        if id(value) not in self._known:
            self._open.add(id(value))
            found = self._compound(value)
            self._open.discard(id(value))
            self._known[id(value)] = value, found
        return self._known[id(value)][1]

    def of_module(self, module: nn.Module) -> bytes:
        parts = [repr(module).encode()]
        for name, child in module.named_modules():
            own = {key: x for key, x in sorted(vars(child).items()) if not key.startswith("_") and key != "training"}
            # Tensors are told apart by the checksum of the weights, and submodules come by themselves.
            plain = {key: x for key, x in own.items() if not isinstance(x, Tensor | nn.Module)}
            parts += [name.encode(), self.of(type(child)), *(key.encode() + self.of(x) for key, x in plain.items())]
        for name, tensor in module.state_dict().items():
            parts += [name.encode(), f"{tensor.dtype} {tuple(tensor.shape)}".encode()]
        return _sum("module", *parts)

    def _compound(self, value: Any) -> bytes:
        if isinstance(value, list | tuple):
            return _sum(_name(type(value)), *map(self.of, value))
        if isinstance(value, set | frozenset):
            return _sum(_name(type(value)), *sorted(map(self.of, value)))
        if isinstance(value, Mapping):
            return _sum("mapping", *sorted(_sum("item", self.of(key), self.of(item)) for key, item in value.items()))
        if isinstance(value, Tensor):
            plain = value.detach().cpu().contiguous()
            bits = plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain
            return _sum("tensor", str(plain.dtype).encode(), str(tuple(plain.shape)).encode(), bits.numpy().tobytes())
        if isinstance(value, np.ndarray | np.generic):
            if value.dtype.hasobject:
                return _sum("objects", str(value.shape).encode(), self.of(value.tolist()))
            return _sum("array", value.dtype.str.encode(), str(value.shape).encode(), value.tobytes())
        if isinstance(value, functools.partial):
            return _sum("partial", self.of(value.func), self.of(value.args), self.of(value.keywords))
        if isinstance(value, types.MethodType):
            return _sum("method", self.of(value.__func__), self.of(value.__self__))
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.BuiltinFunctionType | types.ModuleType):
            return _sum("name", _name(value).encode())
        if isinstance(value, logging.Logger):  # which holds all others
            return _sum("logger", value.name.encode())
        if isinstance(value, functools._lru_cache_wrapper):
            return _sum("cached", self.of(value.__wrapped__))
        if isinstance(value, nn.Module):
            return _sum("weighted", self.of_module(value), self.of(dict(value.state_dict())))
        if hasattr(value, "tobytes") and hasattr(value, "mode"):  # a PIL image
            return _sum("image", str((value.mode, value.size)).encode(), value.tobytes())
        if is_dataclass(value):
            held = {field.name: getattr(value, field.name) for field in fields(value)}
            return _sum("record", self.of(type(value)), self.of(held))
        held = getattr(value, "__dict__", {})
        if not _is_own(type(value)):  # which may keep what changes from process to process
            held = {name: x for name, x in held.items() if not name.startswith("_")}
        if held:  # pickles of such objects follow the order of their sets
            return _sum("object", self.of(type(value)), self.of(held))
        try:
            if _is_own(type(value)):  # the pickle of a class of a script's is another one in each process
                return _sum("made", self.of(value.__reduce_ex__(4)))
            return _sum("pickle", cloudpickle.dumps(value))
        except Exception:  # objects such as locks raise anything
            return _sum("name", _name(type(value)).encode())

    def _function(self, function: types.FunctionType) -> bytes:
        if not _is_own(function):
            inner = getattr(function, "__wrapped__", None)  # of a library's decorator
            return _sum("name", _name(function).encode(), *([] if inner is None else [self.of(inner)]))
        held = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
        read = _read(function.__globals__, set(_names(function.__code__)))
        return _sum(
            "function",
            self._bytecode(function.__code__),
            self.of(function.__defaults__),
            self.of(function.__kwdefaults__),
            self.of(held),
            *(self.of(name) + self.of(value) for name, value in sorted(read.items()) if _counts(value)),
        )

    def _bytecode(self, code: types.CodeType) -> bytes:
        constants = [self._bytecode(x) if isinstance(x, types.CodeType) else self.of(x) for x in code.co_consts]
        return _sum("code", code.co_code, repr(code.co_names).encode(), repr(code.co_varnames).encode(), *constants)

    def _class(self, cls: type) -> bytes:
        if not _is_own(cls):
            return _sum("name", _name(cls).encode())
        skipped = ("__dict__", "__weakref__", "__doc__", "__module__", "__firstlineno__", "__static_attributes__")
        held = {key: _plain_function(x) for key, x in vars(cls).items() if key not in skipped}
        kept = {key: x for key, x in sorted(held.items()) if _counts(x)}
        return _sum("class", cls.__qualname__.encode(), *map(self.of, cls.__bases__), self.of(kept))


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018  # a name that is not bound yet raises
    except ValueError:
        return False
    return True


def _plain_function(value: Any) -> Any:
    """The function behind a property, a class method or a static method."""
    if isinstance(value, property):
        return value.fget
    if isinstance(value, functools.cached_property):
        return value.func
    return getattr(value, "__func__", value)


def _counts(value: Any) -> bool:
    """True for a value that is part of what code does that reads it: constants, records, and objects, functions and
    classes of the caller's own; whole libraries and open resources are not."""
    if isinstance(value, _CONSTANTS):
        return True
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_counts, value))
    if isinstance(value, Mapping):
        return all(map(_counts, value.values()))
    if isinstance(value, types.MethodType):
        return _counts(value.__self__)
    if isinstance(value, type | functools.partial):
        return _is_own(value)
    if isinstance(value, types.FunctionType | functools._lru_cache_wrapper):
        return _is_own(value) or _is_own(inspect.unwrap(value))
    return is_dataclass(value) or _is_own(type(value))


def _read(space: Mapping[str, Any], names: set[str], within: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The values of a module that code which mentions these names may read: globals, and those of the caller's own
    modules among them, `module.name`.  within: names of the modules on the way."""
    found = {}
    for name in sorted(names & space.keys()):
        value = space[name]
        if not isinstance(value, types.ModuleType):
            found[name] = value
        elif value.__name__ not in within and _is_own_module(value):
            inner = _read(vars(value), names, within | {value.__name__})
            found |= {f"{name}.{key}": x for key, x in inner.items()}
    return found


def _names(code: types.CodeType) -> Iterator[str]:
    """The global names that code and the functions inside it read."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _is_own(value: Callable[..., Any] | type) -> bool:
    """True for code that neither Python nor an installed library brings."""
    if isinstance(value, functools.partial):
        return True
    module = getattr(value, "__module__", None) or ""
    if module == "__main__":
        return True
    if _is_of_a_package(module):
        return False
    try:
        file = inspect.getfile(value)
    except (TypeError, OSError):  # made by exec, or of an extension
        return bool(module) and not module.startswith("torch")
    return _is_own_file(file)


def _is_own_module(module: types.ModuleType) -> bool:
    """True for a module that neither Python nor an installed library brings."""
    if _is_of_a_package(module.__name__):
        return False
    files = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    return all(_is_own_file(file) for file in files if file)


def _is_of_a_package(module: str) -> bool:
    """True for names of this package's modules and of Python's, some of which have no file."""
    root = module.partition(".")[0]
    return root == __name__.partition(".")[0] or root in sys.stdlib_module_names


def _is_own_file(file: str) -> bool:
    path = Path(file)
    return not (set(path.parts) & set(_LIBRARIES)) and not path.is_relative_to(Path(inspect.__file__).parent)


def _name(value: Any) -> str:
    name = getattr(value, "__qualname__", None) or value.__name__
    return f"{getattr(value, '__module__', '')}.{name}"


def _sum(kind: str, *parts: bytes) -> bytes:
    """Each part with its length before it, so that no two sequences of parts read the same."""
    found = hashlib.blake2b(kind.encode(), digest_size=16)
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.digest()
