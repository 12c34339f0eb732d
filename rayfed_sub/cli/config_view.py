"""Keys of configurations, sweeps and studies in the terminal: all, a group or one, each with default, allowed values
and meaning."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from rayfed_sub.config.checks import RENAMED
from rayfed_sub.config.keys import Group, Key, fields, groups
from rayfed_sub.config.schema import Config, Device
from rayfed_sub.core.errors import UserError


@dataclass(frozen=True)
class Entry:
    """A key to print.  owners: the methods, or hooks, with this form of the key; empty for keys of every run."""

    key: Key
    owners: tuple[str, ...] = ()


def show(key: str | None = None, console: Console | None = None) -> None:
    """Prints the key or the group, by its dotted name, or all of them.  Raises UserError for a name that is neither."""
    console = console or Console()
    for number, (group, entries) in enumerate(_found(key)):
        if number:
            console.print()
        if group is not None and group.name:
            _print(console, Text(group.name, "bold underline"))
            _print(console, Text(group.meaning))
        for entry in entries:
            _print_entry(console, entry)


def _found(key: str | None) -> list[tuple[Group | None, Sequence[Entry]]]:
    """Groups with their entries, or the entries of a single key."""
    if key is None:
        return [(group, _entries(group)) for group in (*groups(), *_of_trials())]
    found = _named(key, groups()) or _named(key, _of_trials())  # the second imports torch
    if not found:
        raise _unknown(key, [*groups(), *_of_trials()])
    return found


def _named(key: str, known: Sequence[Group]) -> list[tuple[Group | None, Sequence[Entry]]]:
    """The group of that name with those in it, or the key; nothing where neither is known."""
    inside = [group for group in known if group.name and f"{group.name}.".startswith(f"{key}.")]
    if inside:
        return [(group, _entries(group)) for group in inside]
    parent = next((group for group in known if group.name == key.rpartition(".")[0]), None)
    entries = [entry for entry in _entries(parent) if entry.key.name == key] if parent is not None else []
    return [(None, entries)] if entries else []


def _of_trials() -> list[Group]:
    """The keys of a class of devices, the section of a sweep, and the keys of a study's file."""
    from rayfed_sub.sweeps.space import Search
    from rayfed_sub.sweeps.study import Tune, Written

    device = groups(Device, "devices.classes.NAME")
    return [*device, *groups(Search, "sweep"), *groups(Written, "study"), *groups(Tune, "study.tune")]


def _entries(group: Group) -> list[Entry]:
    return _entries_of(group.name) if group.name in ("method", "hook") else [Entry(key) for key in group.keys]


def _entries_of(group: str) -> list[Entry]:
    """The method's name, then every field of every method; equal fields of several methods are one entry.  Or those of
    hooks."""
    from rayfed_sub.methods import class_of, table_of

    alike: dict[Key, list[str]] = {}
    for name in table_of(group):
        for key in fields(class_of(name, group), group):
            alike.setdefault(key, []).append(name)
    order = list(dict.fromkeys(key.name for key in alike))
    found = [Entry(key, tuple(names)) for key, names in alike.items()]
    words = f"text: {', '.join(table_of(group))}, or package.module:Class"
    default = Config().model_dump()[group].get("name", "")
    first = Key(f"{group}.name", words, default, f"The {group}, see `rayfed-sub list {group}s`.")
    return [Entry(first), *sorted(found, key=lambda entry: order.index(entry.key.name))]


def _unknown(key: str, known: Sequence[Group]) -> UserError:
    """Error for an unknown name, with similar ones: first of the same ending, such as method.rank for rank."""
    if key in RENAMED:
        return UserError("KEY", key, f"{RENAMED[key]}, which replaces it", f"see rayfed-sub config {RENAMED[key]}")
    names = [entry.key.name for group in known for entry in _entries(group)]
    names = list(dict.fromkeys([*(group.name for group in known if group.name), *names]))
    last = key.rpartition(".")[2]
    near = [name for name in names if name.rpartition(".")[2] == last]
    near += [name for name in get_close_matches(key, names, n=3) if name not in near]
    near = near or [name for name in names if name.rpartition(".")[2] in get_close_matches(last, _last(names), n=2)]
    advice = f"did you mean {', '.join(near)}?" if near else "see rayfed-sub config"
    return UserError("KEY", key, "a key or group of the configuration", advice)


def _last(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _print_entry(console: Console, entry: Entry) -> None:
    """Three lines or more: key and default as an override, type and allowed values, meaning, and whose key it is."""
    key = entry.key
    value = ("", " (must be given)") if key.default is None else ("=", (key.default, "cyan"))
    _print(console, Text.assemble((key.name, "bold"), *value), indent=2)
    _print(console, Text(key.allowed, "dim"), indent=6)
    _print(console, Text(key.meaning), indent=6)
    if entry.owners:
        whose = f"{key.name.partition('.')[0]}s: {', '.join(entry.owners)}"
        _print(console, Text(whose, "green"), indent=6)


def _print(console: Console, text: Text, indent: int = 0) -> None:
    if text.plain:
        console.print(Padding(text, (0, 0, 0, indent), expand=False))
