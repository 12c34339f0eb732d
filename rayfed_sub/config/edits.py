"""Edits of a configuration file: changes one number and keeps comments, order and layout."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import yaml

from rayfed_sub.config.loading import Loader, as_override, overridden
from rayfed_sub.core.errors import UserError


def with_number(text: str, key: str, number: int) -> str:
    r"""YAML with the dotted key set: in its value's place, else as one more entry of its section, or of the whole.

    Ignores the meaning of anchors and the like: `edited` checks that nothing else has changed.

    >>> with_number("resources: # here\n  pack_size: 4 # clients\n", "resources.pack_size", 16)
    'resources: # here\n  pack_size: 16 # clients\n'
    >>> with_number("resources: {workers: 2} # here\n", "resources.pack_size", 16)
    'resources: {workers: 2, pack_size: 16} # here\n'
    >>> with_number("seed: 0 # of all\n", "resources.pack_size", 16)
    'seed: 0 # of all\nresources:\n  pack_size: 16\n'
    """
    node, names = yaml.compose(text, Loader), key.split(".")
    while isinstance(node, yaml.MappingNode):
        inner = next((value for name, value in node.value if name.value == names[0]), None)
        if inner is None:
            return (_added_in_braces if node.flow_style else _added_in_lines)(text, node, names, number)
        node, names = inner, names[1:]
    assert node is not None, "an empty file is no configuration"
    return text[: node.start_mark.index] + str(number) + text[node.end_mark.index :]


def edited(path: Path, key: str, number: int) -> str:
    """The file's text with the key set.  Raises UserError where that would change other keys or their meaning."""
    wanted = overridden(path, [as_override(key, number)])
    text = with_number(path.read_bytes().decode("utf-8"), key, number)  # read_text would change the ends of lines
    try:
        found = yaml.load(text, Loader)
    except yaml.YAMLError:
        found = None
    if found != wanted:
        allowed = f"a file in which {key} can be set without changing anything else (no anchors there)"
        raise UserError("--write", str(path), allowed, f"leave out --write and set {key} by hand")
    return text


def check_editable(path: Path, key: str, overrides: Sequence[str]) -> None:
    """UserError where the key cannot be set in the file, or is set over it on the command line."""
    for override in overrides:
        name = override.partition("=")[0]
        if f"{key}.".startswith(f"{name}."):
            allowed = f"{key} in the file alone, where it is written to"
            raise UserError("--write", override, allowed, f"leave out --write or {override}")
    edited(path, key, 1)
    if not all(os.access(place, os.W_OK) for place in (path, path.resolve().parent)):
        raise UserError("--write", str(path), "a file and a folder that may be written to", "copy the file")


def _added_in_braces(text: str, mapping: yaml.MappingNode, names: Sequence[str], number: int) -> str:
    entry = ": {".join(names) + f": {number}" + "}" * (len(names) - 1)
    if not mapping.value:
        at = mapping.end_mark.index - 1
        return text[:at] + entry + text[at:]
    at = mapping.value[-1][1].end_mark.index
    return f"{text[:at]}, {entry}{text[at:]}"


def _added_in_lines(text: str, mapping: yaml.MappingNode, names: Sequence[str], number: int) -> str:
    newline = "\r\n" if "\r\n" in text else "\n"
    margin = " " * mapping.value[0][0].start_mark.column
    entry = newline.join(f"{margin}{'  ' * depth}{name}:" for depth, name in enumerate(names)) + f" {number}"
    at = _next_line(text, mapping)
    if text[:at].endswith("\n"):
        return text[:at] + entry + newline + text[at:]
    return text + newline + entry  # a last line without an end has none afterwards


def _next_line(text: str, node: yaml.Node) -> int:
    """Start of the line after the last value below the node: marks of a block lie behind the comments."""
    while isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        node = last[1] if isinstance(node, yaml.MappingNode) else last
    end = node.end_mark.index
    if text[:end].endswith("\n"):  # text of several lines ends with its last
        return end
    return text.find("\n", end) + 1 or len(text)
