"""The documents match the repository: files, links, commands, tables, and code that runs."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pandas as pd
import pytest
import torch
import typer

import rayfed_sub
from rayfed_sub import load_config
from rayfed_sub.cli.listings import LISTINGS, markdown
from rayfed_sub.cli.main import app
from rayfed_sub.core.schemas import RoundRow
from rayfed_sub.core.types import Client, Layer, LocalResult, ModelShape, Tensors
from rayfed_sub.methods import METHODS, build, build_hook
from rayfed_sub.methods.hooked import hooked
from rayfed_sub.sweeps.outcome import SweepResult
from rayfed_sub.sweeps.space import load_sweep
from rayfed_sub.sweeps.study import check_trials, load_study
from rayfed_sub.telemetry.events import Summary
from tests.helpers.tiny_models import llama
from tests.methods.hook_checks import CHECKS
from tests.methods.test_scaffold import quadratic

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rayfed_sub"
DOCUMENTS = (
    *("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"),
    *sorted(path.relative_to(ROOT).as_posix() for path in PACKAGE.glob("*/*.md")),
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "experiments").rglob("*.md")),
)
# Files that the documents name and that a run or the reader creates.
MADE = {"config.yaml", "best.yaml", "momentum.py", "feddyn.py", "answers.parquet"}

documents = pytest.mark.parametrize("document", DOCUMENTS)


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str, language: str) -> list[str]:
    """The fenced blocks in `language`."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(document), re.DOTALL | re.MULTILINE)


def prose(document: str) -> str:
    """The document without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text_of(document), flags=re.DOTALL | re.MULTILINE)


def commands(document: str) -> Iterator[list[str]]:
    """The command lines of the shell blocks, split into words, without comments and leading variables."""
    for block in blocks(document, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words:
                yield words


def table(document: str, title: str) -> list[list[str]]:
    """The rows of the table whose first column is called `title`, without its two head lines."""
    lines = text_of(document).splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith(f"| {title} |"))
    rows = []
    for line in lines[begin + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


# --- files and links


@documents
def test_links_resolve(document: str) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose(document))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not ((ROOT / document).parent / target).exists()] == []


@documents
def test_named_files_exist(document: str) -> None:
    """In backticks, relative to the root, the package or the document's own folder."""
    names = set(re.findall(r"`([\w./-]+\.(?:py|md|yaml|toml|ipynb|txt))`", prose(document))) - MADE
    places = (ROOT, PACKAGE, (ROOT / document).parent)
    assert [name for name in sorted(names) if not any((place / name).exists() for place in places)] == []


def test_architecture_names_every_room() -> None:
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {room for room in rooms if f"`{room}/`" not in text_of("ARCHITECTURE.md")} == set()


def test_readme_takes_ten_minutes() -> None:
    assert len(text_of("README.md").splitlines()) <= 250


# --- commands


@documents
def test_commands_are_valid(document: str) -> None:
    """rayfed-sub's arguments parse and its configurations load; make's targets exist."""
    verbs = set(re.findall(r"^([a-z-]+):.*## ", text_of("Makefile"), re.MULTILINE))
    program: Any = typer.main.get_command(app)
    for words in commands(document):
        if words[0] == "make":
            assert set(words[1:]) <= verbs, words
        if words[0] != "rayfed-sub":
            continue
        verb, *arguments = words[1:]
        given = program.commands[verb].make_context(verb, list(arguments)).params  # parses, runs nothing
        if verb == "sweep" and (ROOT / given["file"]).exists():
            load_sweep(ROOT / given["file"], given["overrides"] or ())
        if verb == "study":
            check_trials(load_study(ROOT / given["file"]), given["overrides"] or ())
        if verb == "run" and Path(given["config"]).name not in MADE:
            config = load_config(ROOT / given["config"], given["overrides"] or ())
            if config.method["name"].partition(":")[0] + ".py" not in MADE:
                build(config.method)
        if verb == "list":
            assert LISTINGS[given["what"]]()[1], words


@documents
def test_shown_settings_load(document: str, tmp_path: Path) -> None:
    for block in blocks(document, "yaml"):
        shown = tmp_path / "sweeps" / "shown.yaml"  # a sweep can build on experiments/tiny.yaml
        shown.parent.mkdir(exist_ok=True)
        shown.write_text(block)
        shutil.copy(ROOT / "experiments" / "tiny.yaml", tmp_path)
        if "sweep:" in block:
            load_sweep(shown)
        else:
            build(load_config(shown).method)


def test_make_prints_its_targets() -> None:
    """The default is help, which lists the targets with a `## ` comment: that must be every phony target."""
    phony = re.search(r"^\.PHONY: (.*)$", text_of("Makefile"), re.MULTILINE)
    assert phony is not None
    assert set(phony[1].split()) == set(re.findall(r"^([a-z-]+):.*## ", text_of("Makefile"), re.MULTILINE))
    assert ".DEFAULT_GOAL := help" in text_of("Makefile")


@documents
def test_prose_names_existing_make_targets(document: str) -> None:
    verbs = set(re.findall(r"^([a-z-]+):.*## ", text_of("Makefile"), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)`", prose(document))) <= verbs


# --- tables and code


@pytest.mark.parametrize(
    ("document", "what"), [("README.md", "methods"), ("rayfed_sub/methods/CHOOSING.md", "choices")]
)
def test_tables_of_methods_are_generated(document: str, what: str) -> None:
    begin, end = f"<!-- {what}: begin (rayfed-sub list {what} --markdown) -->\n", f"\n<!-- {what}: end -->"
    columns, rows = LISTINGS[what]()
    assert text_of(document).partition(begin)[2].partition(end)[0] == markdown(columns, rows)
    assert [row[0] for row in rows] == list(METHODS)


def test_variants_say_that_they_are_variants() -> None:
    columns, rows = LISTINGS["methods"]()
    at = columns.index("as published")
    variants = {str(row[0]): str(row[at]) for row in rows if row[at] != "yes"}
    assert set(variants) >= {"fed-sb", "hetlora", "lora-fair", "flexlora", "shared-galore", "fedavg"}
    assert variants["fed-sb"].startswith("a variant")


def stand_in(folder: Path) -> Any:
    """`rayfed_sub.run` without training: checks the configuration, writes a table, returns a summary."""

    def run(config: rayfed_sub.Config, out: str | Path | None = None, listener: Any = None) -> Summary:
        build(config.method)
        row = RoundRow(0, 8, 0, 3.0, 2.5, 64, 64, 10, 4.0, None, 1.0, 1.0)
        pd.DataFrame([vars(row)]).to_parquet(folder / "rounds.parquet")
        metrics = {"held_out_loss_before": 3.0, "held_out_loss": 2.5}
        name = str(config.method["name"])
        return Summary(
            config.name, name, 1, "0" * 64, 64, 64, 256, 4.0, 1.0, 1.0, 1, metrics, {}, {}, folder=str(folder)
        )

    return run


def sweep_stand_in(file: str, overrides: Sequence[str], out: str) -> SweepResult:
    """`rayfed_sub.sweep` without training: checks the sweep, returns a table."""
    found = load_sweep(file, overrides)
    frame = pd.DataFrame([{"trial": 0, **found.points()[0], "held_out_loss": 2.5}])
    grid = SimpleNamespace(get_best_result=lambda: None)
    return SweepResult(frame, (0, found.config(found.points()[0])), cast(Any, grid), out)


def test_python_of_the_documents_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rayfed_sub, "run", stand_in(tmp_path))
    monkeypatch.setattr(rayfed_sub, "sweep", sweep_stand_in)
    monkeypatch.chdir(ROOT)
    for document in ("README.md", "rayfed_sub/sweeps/README.md"):
        found = blocks(document, "python")
        assert found
        for block in found:
            exec(compile(block, document, "exec"), {"__name__": "readme"})


def test_method_of_the_methods_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer of 2 x 3, rank 1, alpha 1, momentum 1/2; two clients, one with three times the rows of the other."""
    source, _ = blocks("rayfed_sub/methods/README.md", "python")
    (tmp_path / "momentum.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    method = build({"name": "momentum:FFALoRAM", "rank": 1, "alpha": 1.0, "momentum": 0.5})
    shape = ModelShape((Layer("up", m=2, n=3),))
    method.check(shape)
    server = method.init_server({"up/weight": torch.zeros(2, 3)}, shape, seed=0)
    A = server.tensors["up/right"]
    assert server.tensors["up/left"].tolist() == [[0.0], [0.0]]

    def a_round(left_of: dict[int, list[float]], rows_of: dict[int, float]) -> None:
        """Each client returns from training with the B of `left_of`, whatever its initial value."""
        nonlocal server
        broadcast = method.broadcast(server)
        assert set(broadcast.tensors) == {"up/left", "up/right"}  # no client receives the velocity
        total = method.accumulator(server, shape)
        for client, left in left_of.items():
            start = method.start_client(broadcast, None, Client(client, 0), shape)
            assert start.trained == ("up/left",)
            trained: Tensors = {**start.tensors, "up/left": torch.tensor(left)[:, None]}
            result = LocalResult(client, trained, {}, 4, {}, 1.0, 1, {})
            update = method.upload(broadcast, result, rows_of[client], shape)
            assert update.wire_bytes == 2 * 4  # r m float32 numbers; A stays where it is
            assert not method.client_state(broadcast, result, shape)
            total = method.accumulate(total, update, shape)
        server = method.aggregate(server, total, shape)

    # p = 1/4, 3/4.  Mean B = [1, 0]/4 + 3 [0, 1]/4 = [1/4, 3/4]; it began at 0, so v = [1/4, 3/4] and B = v.
    a_round({0: [1.0, 0.0], 1: [0.0, 1.0]}, {0: 5.0, 1: 15.0})
    assert server.tensors["up/left"].flatten().tolist() == [0.25, 0.75]
    # All clients return B unchanged: the mean step is 0, v = v/2 = [1/8, 3/8], B = [3/8, 9/8].
    a_round({0: [0.25, 0.75], 1: [0.25, 0.75]}, {0: 5.0, 1: 15.0})
    assert server.tensors["up/left"].flatten().tolist() == [0.375, 1.125]
    assert server.round == 2
    assert method.download_bytes(server, shape, Client(0, 0), since=0) == 8
    # s = alpha / r = 1: the change is B A.
    change = method.model(server, shape)["up"].apply(torch.zeros(2, 3))
    torch.testing.assert_close(change, torch.tensor([[0.375], [1.125]]) @ A)


def test_hook_of_the_methods_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clients of three, with losses a / 2 (y - b)^2, a = 1, 3 and b = 0, 1; SGD with two steps of 1/10; alpha 1/2.

    Round 0 from x = 0: y_1 = 0; y_2 = 3/10, then 3/10 - (3 (-7/10) + 3/20) / 10 = .495.  h_2 = -.2475; mean .2475, h =
    -1/2 * 2/3 * .2475 = -.0825, x = .2475 + .165 = .4125.  Round 1, client 1 (h_1 = 0): .4125 - .04125 = .37125, then
    .37125 - (.37125 + (.37125 - .4125) / 2) / 10 = .3361875.  Client 2: .4125 - (3 (-.5875) + .2475) / 10 = .564, then
    .564 - (3 (-.436) + .2475 + .07575) / 10 = .662475.  Mean .49933125, h = -.0825 - .08683125 / 3 = -.11144375."""
    _, source = blocks("rayfed_sub/methods/README.md", "python")
    (tmp_path / "feddyn.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    hook = build_hook({"name": "feddyn:FedDyn", "alpha": 0.5})
    assert hook is not None
    method = hooked(build({"name": "fedavg"}), hook, clients=3)
    path, _, server, states = quadratic(method, [[0, 1]] * 2, [2, 2], lr=0.1)
    assert path == pytest.approx([0.4125, 0.49933125 + 0.2228875], abs=1e-6)
    assert float(server.tensors["hook/up/weight/h"]) == pytest.approx(-0.11144375, abs=1e-6)
    assert float(states[1].tensors["hook/up/weight/h"]) == pytest.approx(-0.2475 - 0.249975 / 2, abs=1e-6)
    for check in CHECKS:
        check(hook, "ffa-lora", llama())


# --- the installed package


def test_constraints_pin_every_direct_dependency() -> None:
    """Every direct dependency has exactly one pin, and the pin is in its range."""
    import tomllib

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    pins: dict[str, str] = {}
    for line in text_of("constraints.txt").splitlines():
        if not line.startswith("#"):
            name, _, version = line.partition("==")
            assert canonicalize_name(name) not in pins, line
            pins[canonicalize_name(name)] = version
    asked = [Requirement(text) for text in project["dependencies"] + project["optional-dependencies"]["dev"]]
    assert [str(need) for need in asked if not need.specifier.contains(pins[canonicalize_name(need.name)])] == []


def test_privacy_page_names_the_supported_methods() -> None:
    page = text_of("rayfed_sub/privacy/README.md")
    listed = page.partition("moves with the mean update: ")[2].partition(", noise lying")[0]
    assert re.findall(r"`([^`]+)`", listed) == [
        name for name in METHODS if build({"name": name}).supports_server_optimizer
    ]
