"""Imports point downward only, and every library stays in its own room."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import rayfed_sub

PACKAGE = Path(rayfed_sub.__file__).parent

# From bottom to top.  A file may import from its own layer and from those below.
LAYERS = (
    ("core",),
    ("config",),
    ("data", "models", "clock"),
    ("methods", "privacy"),
    ("training",),
    ("evaluation", "diagnostics"),
    ("planning",),
    ("storage", "telemetry"),
    ("deployment",),
    ("runtime",),
    ("reports",),
    ("sweeps",),
    ("export", "cli", "__init__"),
)
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}

# The rooms that may import a library.  Libraries that are not named here may be imported anywhere.
HOMES = {
    "ray": ("runtime", "sweeps"),
    "tensorboardX": ("telemetry",),
    "mlflow": ("telemetry", "sweeps"),
    "wandb": ("telemetry", "sweeps"),
    "galore_torch": ("training",),
    "peft": ("models", "training", "export"),
    "dp_accounting": ("privacy",),
    "absl": ("privacy",),
    "bitsandbytes": ("training",),
    "transformers": ("models",),
    "PIL": ("data", "models"),
    "flwr": ("deployment", "export"),
    "flwr_datasets": ("data",),
    "datasets": ("data", "evaluation"),
    "evaluate": ("evaluation",),
    "regex": ("evaluation",),
    "rouge_score": ("evaluation",),
    "sacrebleu": ("evaluation",),
    "sklearn": ("evaluation",),
    "rich": ("cli",),
    "matplotlib": ("cli",),
    "plotly": ("reports",),
    "typer": ("cli",),
}
# Importing one of these takes seconds, so it happens inside the function that needs it.
SLOW = (
    "galore_torch",
    "peft",
    "bitsandbytes",
    "transformers",
    "flwr_datasets",
    "datasets",
    "dp_accounting",
    "evaluate",
    "matplotlib",
    "mlflow",
    "plotly",
    "rouge_score",
    "sacrebleu",
    "sklearn",
    "tensorboardX",
    "wandb",
)


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The layer's name for a file: its folder in the package, or its own name at the top.

    >>> part_of(PACKAGE / "data" / "rows.py"), part_of(PACKAGE / "config.py")
    ('data', 'config')
    """
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[str]:
    """Every imported module by its dotted name, anywhere in the file, including imports for type checking."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            # `from rayfed_sub import config` imports a module, `from rayfed_sub.config.schema import Config` does not.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def at_import(tree: ast.Module) -> Iterator[str]:
    """The imports that run with the file's own import: everything outside functions and `if TYPE_CHECKING`."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imports(node)
        waiting += ast.iter_child_nodes(node)


def upward(part: str, source: str) -> list[str]:
    """The imports of `source`, a file of `part`, that point upward."""
    own = (name.split(".") for name in imports(ast.parse(source)) if name.split(".")[0] == "rayfed_sub")
    found = []
    for name in own:
        # A name that is no part, such as `run` in `from rayfed_sub import run`, comes from the package's __init__.
        imported = name[1] if len(name) > 1 and name[1] in HEIGHT else "__init__"
        if HEIGHT[imported] > HEIGHT[part]:
            found.append(".".join(name))
    return found


def misplaced(part: str, source: str) -> list[str]:
    """The libraries that `source`, a file of `part`, imports outside their room."""
    libraries = {name.split(".")[0] for name in imports(ast.parse(source))}
    return sorted(name for name in libraries if part not in HOMES.get(name, (part,)))


def test_every_file_has_a_layer() -> None:
    assert {part_of(path) for path in files()} <= set(HEIGHT), "add it to LAYERS and to ARCHITECTURE.md"


def test_file_names_are_unique_and_the_root_has_only_rooms() -> None:
    names = [path.name for path in files() if path.name != "__init__.py"]
    assert sorted(names) == sorted(set(names))
    assert {path.name for path in PACKAGE.iterdir() if path.is_file()} == {"__init__.py", "py.typed"}


def test_imports_point_downward() -> None:
    assert {path: found for path in files() if (found := upward(part_of(path), path.read_text()))} == {}


def test_libraries_stay_in_their_rooms() -> None:
    assert {path: found for path in files() if (found := misplaced(part_of(path), path.read_text()))} == {}


def test_slow_libraries_are_imported_where_they_are_used() -> None:
    early = ((path, name) for path in files() for name in at_import(ast.parse(path.read_text())))
    assert [(path, name) for path, name in early if name.split(".")[0] in SLOW] == []


def test_only_workers_ask_torch_for_a_gpu() -> None:
    """Whoever asks opens a context on it, half a gigabyte; a driver, which computes nothing, has none."""
    asking = {path.name for path in files() if re.search(r"\bcuda\.(?!device_count\b)\w+\(", path.read_text())}
    assert asking == {"devices.py", "worker.py", "projectors.py", "environment.py", "process_memory.py", "machines.py"}


def test_rules_detect_violations() -> None:
    """The three rules, on sources that break them in every possible way."""
    assert upward("methods", "from rayfed_sub.training import layers") == ["rayfed_sub.training.layers"]
    assert upward("data", "def f():\n    import rayfed_sub.planning.job") == ["rayfed_sub.planning.job"]
    assert upward("config", "if TYPE_CHECKING:\n    from rayfed_sub import models") == ["rayfed_sub.models"]
    assert upward("runtime", "from rayfed_sub import run") == ["rayfed_sub.run"]
    assert upward("training", "from rayfed_sub.methods import build") == []
    assert upward("data", "from rayfed_sub.data.rows import Rows") == []
    assert misplaced("methods", "def f():\n    import ray.exceptions") == ["ray"]
    assert misplaced("runtime", "import ray\nfrom peft import LoraConfig") == ["peft"]
    assert list(at_import(ast.parse("class A:\n    import peft\ndef f():\n    import evaluate"))) == ["peft"]


def test_command_line_is_fast() -> None:
    """`--help` must not wait for the libraries that only a run needs."""
    code = "import sys, rayfed_sub.cli.main; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    loaded = set(done.stdout.split())
    assert "rayfed_sub.cli.main" in loaded
    assert loaded & {"torch", "ray", "transformers", "pandas", *SLOW} == set()
