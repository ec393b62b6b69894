"""YAML files of recipes, read as plain mappings: without what makes a small file large or its meaning a surprise."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from ard_kernels.common.arguments import described

LARGEST_FILE = 64 * 1024  # bytes of YAML
DEEPEST = 20  # mappings and lists inside each other


class _Loader(yaml.SafeLoader):
    """Plain YAML: mappings, lists, text, numbers, true, false and null, each written out where it stands.

    No aliases, which make a small file large; no tags; a key is text and is given once. Numbers are decimal and dates
    are text, so 010 is not 8, nor 1:30 ninety.
    """

    def __init__(self, text: str):
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event, problem = self.peek_event(), None
        if isinstance(event, yaml.AliasEvent):
            problem = f"the alias *{event.anchor}; expected the value itself"
        elif event.tag is not None:
            problem = f"the tag {event.tag}; expected a value without one"
        elif self._depth == DEEPEST:
            problem = f"more than {DEEPEST} levels; expected fewer"
        if problem:
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            problem = None
            if key.tag != "tag:yaml.org,2002:str":
                problem = f"the key {described(key.value)} that is not text; expected a name"
            elif key.value in seen:
                problem = f"the key {described(key.value)} twice; expected it once"
            if problem:
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag.rpartition(":")[2] in ("bool", "null")]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+][0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text. Raises ValueError in one line: ``where``, line, column and the problem."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = str(error.problem or error.context)
        own = "; expected" in problem
        raise ValueError(f"{where}{place}: " + (f"got {problem}" if own else f"{problem}; expected YAML")) from error
    except (yaml.YAMLError, ValueError) as error:  # a character that is none of text, a number of 5000 digits
        raise ValueError(f"{where}: {str(error).splitlines()[0]}; expected YAML") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; ValueError in one line unless it is a file of at most LARGEST_FILE bytes of that."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: is {'no file' if path.exists() else 'not there'}; expected a YAML file")
    with open(path, "rb") as file:
        content = file.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise ValueError(f"{path}: is larger than {LARGEST_FILE} bytes; expected a recipe in YAML")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8; expected a recipe in YAML") from error
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a {type(values).__name__}; expected a mapping")
    return values
