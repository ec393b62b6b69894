"""YAML files into frozen dataclasses: an unknown key is answered with the nearest valid one."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

Config = TypeVar("Config")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    values = yaml.safe_load(Path(path).read_text())
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a {type(values).__name__}; expected a mapping")
    return values


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes`` laid over it, mapping by mapping; lists are replaced whole."""
    merged = dict(base)
    for key, value in changes.items():
        both_mappings = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both_mappings else value
    return merged


def build(cls: type[Config], values: Mapping[str, Any], where: str = "") -> Config:
    """An instance of dataclass ``cls`` from a mapping; dataclass fields are built from nested mappings.

    where: dotted place of ``values``, for messages. Raises ValueError on unknown or missing keys and on values of
    another type than the field's; an int is taken where a float is expected, a list where a tuple is expected.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"config: {where or 'the file'} is {values!r}; expected a mapping")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            nearest = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.0)
            raise ValueError(f"config: unknown key {_join(where, key)!r}; did you mean {_join(where, nearest[0])!r}?")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ValueError(f"config: missing key {_join(where, name)!r}")
    return cls(**{key: _convert(hints[key], value, _join(where, key)) for key, value in values.items()})


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
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
            raise ValueError(f"config: {where} is {value!r}; expected a list")
        if arguments[-1] is not Ellipsis and len(arguments) != len(value):
            raise ValueError(f"config: {where} has {len(value)} entries; expected {len(arguments)}")
        kinds = arguments if arguments[-1] is not Ellipsis else (arguments[0],) * len(value)
        entries = zip(kinds, value, strict=True)
        return tuple(_convert(each, item, f"{where}[{i}]") for i, (each, item) in enumerate(entries))
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 takes 1e-3, without a point, for text
        except ValueError:
            pass
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"config: {where} is {value!r}; expected {kind.__name__}")
    return value
