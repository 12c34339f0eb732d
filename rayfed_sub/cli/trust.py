"""Trust in a configuration file: programs that somebody else's file names need naming on the command line too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rayfed_sub.config.checks import not_given
from rayfed_sub.config.schema import GIVEN, Config
from rayfed_sub.core.errors import UserError

_LEFT = (
    *(("log.jsonl", "summary.json"), ("checkpoints/manifest-[0-9]*.json",)),
    *(("trials.parquet",), ("sweep.yaml", "data.json")),
)
"""Files that identify a run's or sweep's folder; those of a row occur together."""
_BEGUN = b'{"event": "started"'
"""Start of the log of a run without a finished round."""


_OVERRIDE = "{group}.name={name}"


def check_named(file: str, group: str, name: object, overrides: list[str], word: str = _OVERRIDE) -> None:
    """UserError where a file from somebody else names a class that the command line does not name.  group: what names
    it, `method` or `hook`; word: what to add to the command."""
    if _from_others(file):
        from rayfed_sub import methods

        given, add = _values(overrides, group, f"{group}.name"), word.format(group=group, name=name)
        methods.check_named(group, name, given, file, f"{add}, or give a file of your own in place of {file}")


def check_classes(file: str, config: Config, overrides: list[str], word: str = _OVERRIDE) -> None:
    """`check_named` for a configuration's method and hook.

    Raises UserError first for an object of a Python call: to name the call's classes and callbacks would not help.
    """
    for field, name in (("task.name", config.task.name), ("model.path", config.model.path)):
        if name == GIVEN:
            raise not_given(field)
    check_named(file, "method", config.method.get("name"), overrides, word)
    check_named(file, "hook", config.hook.get("name"), overrides, word)


def check_programs(file: str, programs: Mapping[str, Sequence[str]], overrides: list[str]) -> None:
    """UserError where a file from somebody else names a program, such as a metric, that the command line does not name.
    programs: names by the key that has them."""
    for key, names in programs.items():
        given = _values(overrides, key, key.partition(".")[0])
        strange = [name for name in names if not any(name in value for value in given)]
        if strange and _from_others(file):
            allowed = f"nothing, for what {file} names is not loaded unless you name it too"
            advice = f"if you trust it, add '{key}=[{', '.join(names)}]', or {key}=[] to go without"
            raise UserError(key, strange[0], allowed, advice)


def _values(overrides: Sequence[str], *keys: str) -> list[str]:
    """The overrides' values of these keys."""
    return [value for key, _, value in (override.partition("=") for override in overrides) if key in keys]


def _from_others(file: str) -> bool:
    """True for a file in the folder of a run or sweep, or in an object store; other files belong to the caller."""
    from rayfed_sub.storage.remote import uri_of

    return uri_of(file) is not None or _in_a_run_folder(Path(file).resolve().parent)


def _in_a_run_folder(folder: Path) -> bool:
    """True for a folder with files that only runs and sweeps write, finished or not; not for checkpoints/ alone."""
    if any(all(any(folder.glob(name)) for name in together) for together in _LEFT):
        return True
    log = folder / "log.jsonl"  # by itself it may be another program's
    if not log.is_file():
        return False
    with log.open("rb") as file:
        return file.readline(4096).startswith(_BEGUN)
