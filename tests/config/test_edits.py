"""Edits of a number in a configuration file: in place, in any layout, with nothing else changed."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from rayfed_sub.cli import main
from rayfed_sub.config.edits import check_editable, edited, with_number
from rayfed_sub.config.loading import load_config
from rayfed_sub.core.errors import UserError
from rayfed_sub.runtime import probe
from rayfed_sub.runtime.probe import PackSpeed, Speed

ROOT = Path(__file__).parents[2]
TINY = ROOT / "experiments" / "tiny.yaml"
KEY = "resources.pack_size"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("resources:\n  pack_size: 4 # of 8\n  workers: 2\n", "resources:\n  pack_size: 16 # of 8\n  workers: 2\n"),
        ("'resources':\n    \"pack_size\" :  4\n", "'resources':\n    \"pack_size\" :  16\n"),
        ("resources: {pack_size: 4, workers: 2}", "resources: {pack_size: 16, workers: 2}"),
        ("resources: { workers: 2 } # two\n", "resources: { workers: 2, pack_size: 16 } # two\n"),
        ("resources: {\n  workers: 2,\n}\n", "resources: {\n  workers: 2, pack_size: 16,\n}\n"),
        ("resources: {} # none\n", "resources: {pack_size: 16} # none\n"),
        ('{"name": "a", "seed": 1}\n', '{"name": "a", "seed": 1, resources: {pack_size: 16}}\n'),
        (
            "resources: # here\n    workers: 2 # two\n    # the end\n\nseed: 1\n",
            "resources: # here\n    workers: 2 # two\n    pack_size: 16\n    # the end\n\nseed: 1\n",
        ),
        ("seed: 1\n...\n", "seed: 1\nresources:\n  pack_size: 16\n...\n"),
        ("resources: {<<: {pack_size: 4}}\n", "resources: {<<: {pack_size: 4}, pack_size: 16}\n"),
        ("seed: 1\n", "seed: 1\nresources:\n  pack_size: 16\n"),
        ("seed: 1\nresources:\n  workers: 2", "seed: 1\nresources:\n  workers: 2\n  pack_size: 16"),
        ("# first\nseed: 1\n\n# last\n", "# first\nseed: 1\nresources:\n  pack_size: 16\n\n# last\n"),
        (
            "task:\n  prompt: |\n    {q}\n    now\n# x\n",
            "task:\n  prompt: |\n    {q}\n    now\nresources:\n  pack_size: 16\n# x\n",
        ),
        ("task: {name: a,\n  seed: 1}\n# x\n", "task: {name: a,\n  seed: 1}\nresources:\n  pack_size: 16\n# x\n"),
        ("federation:\n  local_steps:\n  - 1\n", "federation:\n  local_steps:\n  - 1\nresources:\n  pack_size: 16\n"),
        ("seed: 1\r\n# é\r\nname: a\r\n", "seed: 1\r\n# é\r\nname: a\r\nresources:\r\n  pack_size: 16\r\n"),
    ],
)
def test_number_is_set_in_place(before: str, after: str, tmp_path: Path) -> None:
    assert with_number(before, KEY, 16) == after
    file = tmp_path / "config.yaml"
    file.write_bytes(before.encode())
    assert edited(file, KEY, 16) == after  # the same meaning except for the number


@pytest.mark.parametrize("file", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_configurations_change_in_one_line(file: Path) -> None:
    before, after = file.read_text().splitlines(), edited(file, KEY, 16).splitlines()
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert changed == [("  pack_size: 4", "  pack_size: 16")]


@pytest.mark.parametrize(
    "text",
    [
        "seed: &n 4\nresources: {pack_size: *n}\n",  # the number is another key's
        "resources: &same {workers: 2}\nname: a\ntask: *same\n",  # the section is
        "base: &same\n  workers: 2\nresources: *same\n",  # the value is elsewhere
    ],
)
def test_edit_that_would_change_more_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"^--write: got '.*config.yaml'; allowed: ") as caught:
        check_editable(file, KEY, [])
    assert "\n" not in str(caught.value)
    assert file.read_text() == text


@pytest.mark.parametrize("override", ["resources.pack_size=8", "resources={workers: 1}"])
def test_override_of_the_edited_key_is_refused(override: str) -> None:
    with pytest.raises(UserError, match="in the file alone"):
        check_editable(TINY, KEY, [override])
    check_editable(TINY, KEY, ["resources.workers=1", "seed=1"])


def test_unwritable_file_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place) != TINY)  # root can write anything
    with pytest.raises(UserError, match="a file and a folder that may be written to"):
        check_editable(TINY, KEY, [])


# --- the command


def timed(best: int) -> Speed:
    """Pack size 4 at present, a round in 2 s; the best size takes half of that."""
    return Speed(
        (PackSpeed(4, 0.25, 0.0), PackSpeed(16, 0.125, 0.0)), 4, best, 2.0, 1.0 if best != 4 else 2.0, 20.0, 10.0
    )


def planned(monkeypatch: pytest.MonkeyPatch, best: int, *words: str) -> int:
    """The exit code of `rayfed-sub plan` with few rows and a probe that takes no time."""
    monkeypatch.setattr(probe, "probe", lambda job, sizes: timed(best))
    monkeypatch.setattr(
        "sys.argv", ["rayfed-sub", "plan", *words, "task.max_rows=120", "model.random.num_hidden_layers=1"]
    )
    return main._code()


def test_best_pack_size_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, link = tmp_path / "real.yaml", tmp_path / "link.yaml"
    real.write_bytes(TINY.read_bytes())
    real.chmod(0o640)
    link.symlink_to(real)
    assert planned(monkeypatch, 16, str(link), "--probe", "--write") == 0
    assert real.read_text() == TINY.read_text().replace("pack_size: 4", "pack_size: 16")
    assert (link.is_symlink(), stat.S_IMODE(real.stat().st_mode)) == (True, 0o640)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.yaml", "real.yaml"]
    before, after = load_config(TINY), load_config(link)
    assert after == before.model_copy(update={"resources": before.resources.model_copy(update={"pack_size": 16})})
    *_, last = capsys.readouterr().out.splitlines()
    assert last == f"{link}: resources.pack_size is 16 now, was 4; a round saves 1 s of about 2 s"


def test_fast_enough_pack_size_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_bytes(TINY.read_bytes())
    assert planned(monkeypatch, 4, str(file), "--probe", "--write", "--json") == 0
    assert file.read_bytes() == TINY.read_bytes()
    shown = capsys.readouterr()
    assert shown.out.startswith("{")  # only the JSON
    assert shown.err == f"{file}: not changed; resources.pack_size=4 is as quick as any that was timed\n"


def test_probe_names_the_write_option(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert planned(monkeypatch, 16, str(TINY), "--probe") == 0
    *_, message, last = capsys.readouterr().out.splitlines()
    assert message == "resources.pack_size=16 would take 1 s and 0:10."
    assert last == f"rayfed-sub plan {TINY} --probe --write sets it in the file"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--write"], "--probe: got False; allowed: given with --write"),
        (["--probe", "--write", "--on", "l4"], "--on: got 'l4'; allowed: nothing with --write"),
        (
            ["--probe", "--write", "resources.pack_size=2"],
            "--write: got 'resources.pack_size=2'; allowed: resources.pack",
        ),
    ],
)
def test_incompatible_options(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = TINY.read_bytes()
    assert planned(monkeypatch, 16, str(TINY), *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"rayfed-sub: {message}")
    assert TINY.read_bytes() == before
