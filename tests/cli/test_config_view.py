"""`rayfed-sub config`: the output for all keys, a group, a key and an unknown name."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest
from rich.console import Console

from rayfed_sub.cli import main
from rayfed_sub.cli.config_view import show
from rayfed_sub.config.keys import groups
from rayfed_sub.core.errors import UserError
from rayfed_sub.methods import METHODS, class_of
from rayfed_sub.sweeps.space import Axis, Search
from rayfed_sub.sweeps.study import Tune, Written


def printed(key: str | None = None, width: int = 80) -> list[str]:
    file = io.StringIO()
    show(key, Console(file=file, width=width))
    return file.getvalue().splitlines()


def test_one_key() -> None:
    assert printed("federation.sampled") == [
        "  federation.sampled=null",
        "      an integer >= 1, or null",
        "      Clients sampled per round; null stands for all.",
    ]


def test_group_lists_its_keys_and_those_below() -> None:
    lines = printed("federation")
    assert lines[:2] == ["federation", "The clients, their rounds, and the work of a round."]
    assert "  federation.partition.alpha=0.5" in lines
    assert not [line for line in lines if line.startswith("  optimizer.")]
    assert printed("federation.partition")[0] == "federation.partition"


def test_keys_of_sweeps_and_studies() -> None:
    assert printed("sweep.trials") == [
        "  sweep.trials=1",
        "      an integer >= 1",
        "      Draws for each point of the grid.",
    ]
    assert printed("sweep.space")[:2] == ["  sweep.space (must be given)", "      keys with values"]
    assert printed("sweep")[0] == "sweep"
    lines = printed("study")
    assert next(line for line in lines if line and line[0] != " ") == "study"
    assert "study.tune" in lines
    names = {line.split("=")[0].split()[0] for line in lines if line.startswith("  study.")}
    assert names >= {f"study.{key}" for key in ("claim", "base", "variants", "seeds", "set", "tune.key", "tune.values")}
    assert "study.file" not in names


@pytest.mark.parametrize("record", [Search, Axis, Written, Tune])
def test_every_key_of_sweeps_and_studies_has_a_meaning(record: type) -> None:
    of = groups(record, "file")
    assert [key.name for group in of for key in group.keys if not key.meaning.endswith((".", ")."))] == []
    assert [group.name for group in of if not group.meaning] == []


@pytest.mark.parametrize("width", [80, 120])
def test_all_keys_fit_the_width(width: int) -> None:
    lines = printed(width=width)
    assert max(map(len, lines)) <= width
    starts = {line.split("=")[0].strip() for line in lines if line.startswith("  ") and line[2] != " "}
    assert starts >= {key.name for group in groups() for key in group.keys}
    assert {"method.name", "method.rank", "method.gamma"} <= starts


def test_method_field_lists_its_methods_and_their_defaults() -> None:
    lines = printed("method.penalty", width=120)
    assert lines == [
        "  method.penalty=0.001",
        "      a number >= 0",
        "      Weight of the tail's norm in a client's loss.",
        "      methods: hetlora",
        "  method.penalty=0.01",
        "      a number >= 0",
        "      Weight of |dB|^2 in the server's objective.",
        "      methods: lora-fair",
    ]


def test_hook_group_names_the_hooks() -> None:
    assert printed("hook")[-3:] == [
        "  hook.name=",
        "      text: scaffold, or package.module:Class",
        "      The hook, see `rayfed-sub list hooks`.",
    ]


def test_method_group_lists_every_field_of_every_method() -> None:
    lines = printed("method", width=200)
    begins = [number for number, line in enumerate(lines) if line.startswith("  method.")]
    ends = [*begins[1:], len(lines)]
    entries = {}
    for begin, end in zip(begins, ends, strict=True):
        name, _, default = lines[begin].strip().partition("=")
        whose = " ".join(line.strip() for line in lines[begin:end]).rpartition("methods: ")[2]
        for method in whose.split(", "):
            entries[method, name.removeprefix("method.")] = default
    for method in METHODS:
        for field, value in vars(class_of(method)()).items():
            shown = value if isinstance(value, str) else json.dumps(value)
            assert entries.pop((method, field)) == shown
    assert {field for _, field in entries} == {"name"}


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("optimizer.rl", "a key or group of the configuration; did you mean optimizer.lr"),
        ("rank", "a key or group of the configuration; did you mean method.rank?"),
        ("lr", "a key or group of the configuration; did you mean optimizer.lr, server.lr?"),
        ("sweep.trails", "a key or group of the configuration; did you mean sweep.trials"),
        ("federation.rond", "a key or group of the configuration; did you mean federation.rounds"),
        ("a", "a key or group of the configuration; see rayfed-sub config"),
        ("", "a key or group of the configuration; see rayfed-sub config"),
        ("evaluation.on", "evaluation.split, which replaces it; see rayfed-sub config evaluation.split"),
    ],
)
def test_unknown_key_gets_suggestions(key: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        printed(key)
    assert str(caught.value).startswith(f"KEY: got '{key}'; allowed: {message}")


@pytest.mark.parametrize(
    ("arguments", "code", "begins"),
    [
        (["optimizer.rl"], 2, "rayfed-sub: KEY: got 'optimizer.rl'"),
        (["optimizer.lr", "--schema"], 2, "rayfed-sub: KEY: got 'optimizer.lr'; allowed: nothing with --schema"),
        (["optimizer.lr"], 0, ""),
    ],
)
def test_the_command(
    arguments: list[str],
    code: int,
    begins: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["rayfed-sub", "config", *arguments])
    with pytest.raises(SystemExit) as ended:
        main.main()
    out, err = capsys.readouterr()
    assert ended.value.code == code
    assert err.startswith(begins)
    assert err.count("\n") == (code == 2)
    assert ("optimizer.lr=0.001" in out) == (code == 0)


def test_keys_of_every_run_need_no_heavy_library() -> None:
    code = (
        "import sys; sys.argv = ['rayfed-sub', 'config', 'federation']\n"
        "from rayfed_sub.cli.main import main\n"
        "try: main()\n"
        "finally: print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "federation.clients=8" in done.stdout
    assert set(done.stderr.split()) & {"torch", "ray", "transformers", "pandas", "matplotlib"} == set()
