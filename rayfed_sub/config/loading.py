"""Loading of a checked configuration from a YAML file and dotted overrides.

Nothing heavy is imported: reading a configuration takes milliseconds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import yaml

from rayfed_sub.config.checks import NEEDS, RENAMED, check, check_rules
from rayfed_sub.config.schema import Config
from rayfed_sub.core.errors import UserError

INHERITED = "inherited"
"""Key of `method` with the names of those fields that were written for another method."""


class Loader(yaml.SafeLoader):
    """YAML 1.2's numbers, truths and texts: 1e-3 is a number, 010 is ten, the key `on` is no `true`, 2024-01-02 no
    date."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value.  Raises YAMLError also where a `!!tag` cannot hold the text."""
        try:
            return super().construct_object(node, deep)
        except ValueError as error:
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from None

    def integer(self, node: yaml.ScalarNode) -> int:
        """The number, as `_WORDS` has it."""
        text = str(self.construct_scalar(node)).lower()
        return int(text, 0) if text.startswith(("0o", "0x")) else int(text)


class _Dumper(yaml.SafeDumper):
    """Quotes strings that the loader would not read as text."""


_LETTERS = {"bool": "tTfF", "float": "-+.0123456789", "int": "-+0123456789"}
_WORDS = {
    "bool": r"true|True|TRUE|false|False|FALSE",
    "float": r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf)|\.(?:nan|NaN)",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
}
_TAGS = {name: f"tag:yaml.org,2002:{name}" for name in _WORDS}
_REPLACED = {*_TAGS.values(), "tag:yaml.org,2002:timestamp"}
Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in found if tag not in _REPLACED]
    for letter, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, _pattern in _WORDS.items():
    for _kind in (Loader, _Dumper):
        _kind.add_implicit_resolver(_TAGS[_name], re.compile(f"^(?:{_pattern})$"), list(_LETTERS[_name]))
Loader.add_constructor(_TAGS["int"], Loader.integer)


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """The checked configuration from a YAML file (or a mapping) and `dotted.key=value` overrides.

    Raises UserError, one line, for a missing file, broken YAML, an unknown key, a wrong type or a value out of range.

    >>> load_config({"federation": {"rounds": 3}}, ["federation.local_steps=10"]).federation.local_steps
    10
    """
    tree = overridden(source, overrides)
    if isinstance(source, str | Path):
        check_kind(source, tree, "run")
    config = check(Config, tree)
    check_rules(config)
    return config


KINDS = {
    "run": "the configuration of a run",
    "sweep": "a configuration with a section `sweep`",
    "study": "a study, with a claim and variants",
}
"""Kinds of files that commands take, by the command's name."""


def check_kind(path: str | Path, tree: Mapping[str, Any], wanted: str) -> None:
    """UserError for the file of another command; wanted: a name of KINDS.

    >>> check_kind("rates.yaml", {"sweep": {"space": {}}}, "run")
    Traceback (most recent call last):
    rayfed_sub.core.errors.UserError: CONFIG: got 'rates.yaml'; allowed: the configuration of a run; this is a \
configuration with a section `sweep`: use rayfed-sub sweep rates.yaml
    """
    keys = tree.keys()
    kind = "study" if keys & {"claim", "variants"} else "sweep" if keys & {"sweep", "base"} else "run"
    if kind != wanted:
        raise UserError("CONFIG", str(path), KINDS[wanted], f"this is {KINDS[kind]}: use rayfed-sub {kind} {path}")


def stored_config(folder: Path) -> Config:
    """The configuration of the run in `folder`, from its config.yaml, which has every key of the version that wrote it.

    Keys of older versions get their new names.  A missing key has the behaviour of older versions: without
    `task.seed`, or with null, the run's own seed drew the splits; without `federation.batching`, batches were bucketed.
    `task.validation` was a share, and `task.split=train` stood there for files too, as did keys without an effect, and
    classes of devices without a share beside others with one.

    Raises UserError as `load_config`.
    """
    tree = read_yaml(folder / "config.yaml")
    task, federation = tree.get("task"), tree.get("federation")
    if isinstance(task, dict) and task.get("seed") is None:
        tree["task"] = task = {**task, "seed": tree.get("seed", Config().seed)}
    if isinstance(task, dict) and isinstance(task.get("validation"), float | int):
        names = {"validation": "validation_share"}
        tree["task"] = task = {names.get(key, key): value for key, value in task.items()}
    if isinstance(task, dict) and task.get("split") == "train":
        tree["task"] = {key: value for key, value in task.items() if key != "split"}
    if isinstance(federation, dict):
        tree["federation"] = {"batching": "bucketed", **federation}
    return load_config(effective(_renamed(_sharing(_selecting(tree)))))


def _selecting(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree without an over-selection that adds no client, where all are sampled."""
    federation = tree.get("federation")
    if not isinstance(federation, dict) or federation.get("sampled") not in (None, federation.get("clients")):
        return tree
    return {**tree, "federation": {key: value for key, value in federation.items() if key != "over_selection"}}


def _sharing(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree without classes of devices that have no share, where others have one: no client had such a device."""
    devices = tree.get("devices")
    if not isinstance(devices, dict) or not devices.get("shares"):
        return tree
    classes = {name: device for name, device in devices["classes"].items() if name in devices["shares"]}
    return {**tree, "devices": {**devices, "classes": classes}}


def effective(tree: dict[str, Any], needs: Iterable[tuple[str, str, tuple[str, ...]]] = NEEDS) -> dict[str, Any]:
    """The tree without keys that have no effect in it, changed in place; needs: as `NEEDS`.

    >>> effective({"optimizer": {"name": "adamw", "momentum": 0.9, "lr": 0.1}})
    {'optimizer': {'name': 'adamw', 'lr': 0.1}}
    """
    for path, selector, values in needs:
        section, name = _section(tree, path)
        known, key = _section(tree, selector)
        if known.get(key, reduce(getattr, selector.split("."), Config())) not in values:
            section.pop(name, None)
    return tree


def _section(tree: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    """The section of the tree in which a key stands, empty where there is none, and the key's name there."""
    *sections, name = path.split(".")
    found: Any = tree
    for one in sections:
        found = found.get(one) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}, name


def _renamed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with the keys of `RENAMED` under their new names, in their places.

    >>> _renamed({"evaluation": {"examples": 64, "every": 2}})
    {'evaluation': {'eval_rows': 64, 'every': 2}}
    """
    names = {old: new.rpartition(".")[2] for old, new in RENAMED.items()}
    return {
        section: {names.get(f"{section}.{key}", key): value for key, value in keys.items()}
        if isinstance(keys, Mapping)
        else keys
        for section, keys in tree.items()
    }


def overridden(source: str | Path | Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The tree of keys that `load_config` checks.  Raises UserError for invalid YAML and invalid overrides."""
    tree = _copied(read_yaml(Path(source)) if isinstance(source, str | Path) else source)
    written = dict(tree["method"]) if isinstance(tree.get("method"), dict) else {}
    for override in overrides:
        _override(tree, override)
    _note_inherited(tree, written, overrides)
    return tree


def as_override(key: str, value: Any) -> str:
    """Command-line override that sets the key.

    >>> as_override("optimizer.lr", 1e-05), as_override("federation.local_steps", [1, 2])
    ('optimizer.lr=1e-05', 'federation.local_steps=[1, 2]')
    """
    return f"{key}={json.dumps(value)}"  # JSON is YAML


def flat(tree: Mapping[str, Any], parent: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones.

    >>> flat({"a": {"b": 1, "c": {}}, "d": [2]})
    {'a.b': 1, 'a.c': {}, 'd': [2]}
    """
    found: dict[str, Any] = {}
    for key, value in tree.items():
        inner = isinstance(value, Mapping) and value
        found |= flat(value, f"{parent}{key}.") if inner else {f"{parent}{key}": value}
    return found


def yaml_text(tree: Mapping[str, Any]) -> str:
    """YAML that `read_yaml` reads as `tree`.

    >>> yaml_text({"name": "1e5", "optimizer": {"lr": 1e-05}})
    "name: '1e5'\\noptimizer:\\n  lr: 1.0e-05\\n"
    """
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def read_yaml(path: Path, named: str = "CONFIG") -> dict[str, Any]:
    """The keys of a YAML file.  named: the argument or key that names it.  Raises UserError where it is none."""
    if not path.is_file():
        raise UserError(named, str(path), "a YAML file that exists", "check the path")
    try:
        text = path.read_text(encoding="utf-8")
        tree = _parsed(path, text, named)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        cause = str(error).replace('"<unicode string>", ', "")
        raise UserError(named, str(path), "a readable file of valid YAML", cause) from None
    if not isinstance(tree, dict):
        raise UserError(named, str(path), "a YAML mapping of keys to values", "see experiments/tiny.yaml")
    return tree


def _parsed(path: Path, text: str, named: str) -> Any:
    """The tree.  Raises YAMLError, and UserError for a key that stands twice."""
    loader = Loader(text)
    try:
        root = loader.get_single_node()
        _check_repeats(path, root, named)  # before the tree is made, which writes merged keys (`<<`) into the nodes
        return None if root is None else loader.construct_document(root)
    finally:
        loader.dispose()


def _check_repeats(path: Path, node: yaml.Node | None, named: str, parent: str = "") -> None:
    """UserError for a key that stands twice in one place: YAML would silently take the last."""
    seen = set()
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        name = f"{parent}{key.value}"
        if name in seen:
            allowed = f"each key once; {name} stands again in line {key.start_mark.line + 1}"
            raise UserError(named, str(path), allowed, "put them together")
        seen.add(name)
        _check_repeats(path, value, named, f"{name}.")


def _copied(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in tree.items()}


def _override(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not all(path.split(".")):
        raise UserError("override", override, "dotted.key=value", "e.g. method.rank=8")
    *parents, leaf = path.split(".")
    for depth, parent in enumerate(parents):
        if tree.get(parent) is None:  # also one that stands in the file with nothing below it
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            field = ".".join(parents[: depth + 1])
            raise UserError(field, tree, "a single value, without keys below it", f"remove {override}")
    try:
        tree[leaf] = yaml.load(text, Loader)
    except yaml.YAMLError:
        raise UserError(path, text, "a YAML value", "quote it") from None
    # Rounds or epochs, not both: one on the command line replaces the other in the file.
    other = {"federation.rounds": "epochs", "federation.epochs": "rounds"}.get(path)
    if other and tree[leaf] is not None:
        tree.pop(other, None)


def _note_inherited(tree: dict[str, Any], written: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """With another method named on the command line, the file's fields for the old one count only where they fit: they
    are listed under `INHERITED`, for `methods.adopted`, which knows every method's fields."""
    method = tree.get("method")
    if not isinstance(method, dict) or written.get("name") in (None, method.get("name")):
        return
    given = {override.partition("=")[0] for override in overrides}
    inherited = [key for key in written if key not in ("name", INHERITED) and f"method.{key}" not in given]
    if inherited and "method" not in given:
        method[INHERITED] = inherited
