"""Nested mappings into frozen dataclasses: an unknown key is answered with the nearest valid one.

A dataclass says in ``RANGES`` which values its numbers may have, as intervals: ``{"steps": "[1, 1000]"}``; and in
``VARIANTS``, for a field that may be of several dataclasses, a function from the mapping to the one that it means.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import numbers
import os
import types
import typing
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ard_kernels.common.arguments import described

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")

SEED = f"[0, {2**63 - 1}]"  # what NumPy's and PyTorch's generators both take
COUNT = "[1, 1000000000]"
LATER = {"later": True}  # metadata of a field that was added later: fingerprints of before it stay as they were


def require_ranges(where: str, values: Mapping[str, Any], ranges: Mapping[str, str]) -> None:
    """Raises ValueError naming the first number, or entry of a list, outside its interval; None is in all of them."""
    for name, interval in ranges.items():
        value = values.get(name)
        entries = value if isinstance(value, (list, tuple)) else () if value is None else (value,)
        for i, number in enumerate(entries):
            if not _within(number, interval):
                place = f"{name}[{i}]" if entries is value else name
                raise ValueError(f"{_join(where, place)} is {described(number)}; expected within {interval}")


class Ranged:
    """Base of settings: their numbers are within the class's ``RANGES``, however an instance is made."""

    RANGES: typing.ClassVar[dict[str, str]]

    def __post_init__(self) -> None:
        require_ranges(type(self).__name__, vars(self), self.RANGES)


def _within(number: Any, interval: str) -> bool:
    """Whether a number is in an interval such as "[0, 1)"; NaN is in none, infinity in "(0, inf]" only."""
    real = isinstance(number, numbers.Real) and not isinstance(number, bool)
    if not real:
        return False
    least, most = (float(end) if end.endswith("inf") else int(end) for end in interval[1:-1].split(", "))
    above = number >= least if interval[0] == "[" else number > least
    return above and (number <= most if interval[-1] == "]" else number < most)


def expand_paths(config: Any, where: str, names: Sequence[str]) -> None:
    """For ``__post_init__``: ``~`` of these settings becomes the home folder. Raises ValueError on an empty path."""
    for name in names:
        value = getattr(config, name)
        if value == "":
            raise ValueError(f"{where}.{name} is ''; expected a path, or null for none")
        if value is not None:
            object.__setattr__(config, name, os.path.expanduser(value))


def require_known(cls: type, name: Any, where: str) -> None:
    """Raises ValueError unless ``name`` is a field of dataclass ``cls``, with one like it, or all of them."""
    fields = [field.name for field in dataclasses.fields(cls)]
    if name not in fields:
        nearest = difflib.get_close_matches(str(name)[:80], fields, n=1, cutoff=0.5)
        meant = f"did you mean {_join(where, nearest[0])!r}?" if nearest else f"expected one of {', '.join(fields)}"
        raise ValueError(f"config: unknown key {described(_join(where, name))}; {meant}")


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes`` laid over it, mapping by mapping; lists are replaced whole."""
    merged = dict(base)
    for key, value in changes.items():
        both_mappings = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both_mappings else value
    return merged


def build(cls: type[Config], values: object, where: str = "") -> Config:
    """An instance of dataclass ``cls`` from a mapping; dataclass fields are built from nested mappings.

    where: dotted place of ``values``, for messages. Raises ValueError on unknown or missing keys and on values of
    another type than the field's; an int is taken where a float is expected, a list where a tuple is expected.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"config: {where or 'the file'} is {described(values)}; expected a mapping")
    kinds = {name: field_kind(cls, name, values.get(name)) for name in typing.get_type_hints(cls)}
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in values:
        require_known(cls, key, where)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ValueError(f"config: missing key {_join(where, name)!r}")
    converted = {key: _convert(kinds[key], value, _join(where, key)) for key, value in values.items()}
    require_ranges(where, converted, getattr(cls, "RANGES", {}))
    return cls(**converted)


def field_kind(cls: type, name: str, value: object) -> Any:
    """The type of a field; where the class's ``VARIANTS`` has a function for it, the one that says for this mapping."""
    choose = getattr(cls, "VARIANTS", {}).get(name)
    return choose(value) if choose and isinstance(value, Mapping) else typing.get_type_hints(cls)[name]


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return build(kind, value, where)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        kinds = [argument for argument in arguments if argument is not type(None)]
        listed = isinstance(value, (list, tuple))  # int | tuple[int, int]: a list is meant for the tuple
        chosen = next((kind for kind in kinds if (typing.get_origin(kind) is tuple) == listed), kinds[0])
        return _convert(chosen, value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"config: {where} is {described(value)}; expected a list")
        if arguments[-1] is not Ellipsis and len(arguments) != len(value):
            raise ValueError(f"config: {where} has {len(value)} entries; expected {len(arguments)}")
        entry_kinds = arguments if arguments[-1] is not Ellipsis else (arguments[0],) * len(value)
        entries = zip(entry_kinds, value, strict=True)
        return tuple(_convert(each, item, f"{where}[{i}]") for i, (each, item) in enumerate(entries))
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 takes 1e-3, without a point, for text
        except OverflowError:
            return math.inf
        except ValueError:
            pass
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"config: {where} is {described(value)}; expected {kind.__name__}")
    return value


def fingerprint(settings: DataclassInstance) -> str:
    """12 hexadecimal digits that differ between settings; a name for a store's folder.

    A field with the metadata `LATER` counts only where it is not its default.
    """
    values = dataclasses.asdict(settings)
    for each in dataclasses.fields(settings):
        if each.metadata == LATER and values[each.name] == each.default:
            del values[each.name]
    content = json.dumps(values, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]
