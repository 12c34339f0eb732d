"""The notebooks: clean and up to date in the repository, and executed from a clean kernel."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "notebooks"
NAMES = sorted(path.name for path in FOLDER.glob("*.ipynb"))

every_notebook = pytest.mark.parametrize("name", NAMES)


def cells(name: str, kind: str) -> list[nbformat.NotebookNode]:
    notebook = nbformat.read(FOLDER / name, as_version=nbformat.NO_CONVERT)
    return [cell for cell in notebook.cells if cell.cell_type == kind]


def sources(name: str) -> Iterator[str]:
    """The Python of every code cell, without the magic that hides its output and without files that are written."""
    for cell in cells(name, "code"):
        magic, _, rest = cell.source.partition("\n")
        if not magic.startswith("%%writefile "):
            yield rest if magic == "%%capture" else cell.source


def test_notebooks_are_numbered() -> None:
    assert [name[:3] for name in NAMES] == [f"{number:02}-" for number in range(1, len(NAMES) + 1)]
    assert len(NAMES) == 7


@every_notebook
def test_notebook_is_valid_and_has_no_output(name: str) -> None:
    notebook, code = nbformat.read(FOLDER / name, as_version=nbformat.NO_CONVERT), cells(name, "code")
    nbformat.validate(notebook)
    assert notebook.nbformat == 4
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells) > 1
    assert [(cell.outputs, cell.execution_count) for cell in code] == [([], None)] * len(code)


@every_notebook
def test_notebook_uses_the_package_and_defines_nothing(name: str) -> None:
    """Its imports from the package exist; the only code of its own is a file that one of the notebooks writes, and the
    module and loss of the one that hands such code over."""
    nodes = [node for source in sources(name) for node in ast.walk(ast.parse(source))]
    defined = any(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) for node in nodes)
    assert defined == name.startswith("06")
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rayfed")]
    assert imports
    for node in imports:
        module = importlib.import_module(str(node.module))
        assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
    written = [cell.source.split()[1] for cell in cells(name, "code") if cell.source.startswith("%%writefile")]
    assert [file for file in written if file.endswith(".py")] == ["runs/own/top_directions.py"] * name.startswith("04")
    assert all(file.startswith("runs/") for file in written)  # ignored by git


@every_notebook
def test_links_resolve(name: str) -> None:
    text = "\n".join(cell.source for cell in cells(name, "markdown"))
    local = [target for target in re.findall(r"\]\(([^)#\s]+)\)", text) if "://" not in target]
    assert [target for target in local if not (FOLDER / target).exists()] == []


@every_notebook
def test_files_that_are_named_exist(name: str) -> None:
    """`../file` in code; `room/file.py` of the package or of the repository in text."""
    code = "\n".join(sources(name))
    gone = [path for path in re.findall(r"[\"'](\.\./[\w./-]+)", code) if not (FOLDER / path).exists()]
    text = "\n".join(cell.source for cell in cells(name, "markdown"))
    named = re.findall(r"`([\w-]+(?:/[\w.-]*)+)`", text)
    gone += [path for path in named if not any((place / path).exists() for place in (ROOT, ROOT / "rayfed_sub"))]
    assert [path for path in gone if not path.startswith("runs/")] == []


@pytest.mark.slow
@every_notebook
def test_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in a copy, which gets its run folders, each cell in two minutes at most, scaled by the load of the machine;
    the notebook itself asserts its results."""
    for folder in ("notebooks", "experiments", "tests"):  # one notebook runs the conformance suite
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("runs", "__pycache__"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("FLOWER_APP_ENV", str(ROOT / ".venv-flower-app"))  # else the notebook installs one
    before, copy = sorted(FOLDER.rglob("*")), tmp_path / "notebooks"
    notebook = nbformat.read(copy / name, as_version=4)
    resources = {"metadata": {"path": str(copy)}}
    seconds = min(280, int(120 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))))
    NotebookClient(notebook, timeout=seconds, kernel_name="python3", resources=resources).execute()
    assert sorted(FOLDER.rglob("*")) == before
