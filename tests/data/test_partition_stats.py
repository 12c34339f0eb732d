"""`rayfed-sub data`: the skew, the table, the picture in the terminal and as a file, JSON, and refusals."""

from __future__ import annotations

import io
import json
import logging
import sys
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from rayfed_sub.cli import main
from rayfed_sub.cli.data_view import show
from rayfed_sub.cli.partition_picture import check_path, draw
from rayfed_sub.config.loading import load_config
from rayfed_sub.config.schema import Config
from rayfed_sub.core.errors import UserError
from rayfed_sub.data import partition_stats
from rayfed_sub.data.dataset import build_dataset
from rayfed_sub.data.pairs import Pairs
from rayfed_sub.data.partition_stats import PartitionStats, as_dict, distances, skew, stats_of
from rayfed_sub.models.tokenizers import ByteTokenizer

TINY = str(Path(__file__).parents[2] / "experiments" / "tiny.yaml")


@dataclass(frozen=True, eq=False)
class Case:
    """A federation over rows of which `sizes[name]` have the key `name`."""

    sizes: dict[str, int]
    clients: int
    partition: dict[str, Any]

    def stats(self) -> PartitionStats:
        keys = [key for key, size in self.sizes.items() for _ in range(size)]
        numbers = range(len(keys))
        pairs = Pairs(
            "causal-lm", tuple(f"q{i}" for i in numbers), tuple("a" * (i % 7 + 1) for i in numbers), tuple(keys)
        )
        column = "by" if "" not in self.sizes else None
        tree = {
            "name": "case",
            "task": {"name": "table", "path": "rows.csv", "prompt": "{q}", "answer": "a", "test_share": 0.1},
            "federation": {"clients": self.clients, "partition": {"column": column, **self.partition}},
        }
        config = Config.model_validate(tree)
        return stats_of(
            config, build_dataset(pairs, config.task, config.federation, ByteTokenizer(), config.seed), ["a note"]
        )


THREE = Case({"x": 60, "y": 30, "z [b]": 10}, 3, {"kind": "column"})
MANY = Case({f"class {i:02}": 100 - i for i in range(30)}, 300, {"kind": "power-law"})
ALIKE = Case({"": 50}, 5, {"kind": "iid"})


@cache
def case_stats(case: Case) -> PartitionStats:
    """The case's partition statistics, computed once."""
    return case.stats()


def printed(held: PartitionStats, width: int = 80, coloured: bool = False) -> str:
    console = Console(
        file=io.StringIO(),
        width=width,
        force_terminal=coloured,
        color_system="truecolor" if coloured else None,
        legacy_windows=False,
    )
    show(held, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# --- skew


def test_distances_by_hand() -> None:
    """12 rows, 6 of class 0, 4 of 1, 2 of 2: g = 1/2, 1/3, 1/6.  Client 0 has 3, 2, 1 of them and the same shares.
    Client 1 has 3, 0, 0: half of 1/2 + 1/3 + 1/6 is 1/2.  Client 2 has 0, 2, 1: half of 1/2 + 1/3 + 1/6 again."""
    clients = np.repeat([0, 1, 2], [6, 3, 3])
    classes = np.asarray([0, 0, 0, 1, 1, 2, 0, 0, 0, 1, 1, 2])
    assert distances(clients, classes) == pytest.approx([0, 1 / 2, 1 / 2])
    assert skew(clients, classes) == pytest.approx((6 * 0 + 3 / 2 + 3 / 2) / 12)


def test_one_class_each_has_the_largest_distance() -> None:
    """Ten clients with a class each: g = 1/10, so each is 9/10 away."""
    assert skew(np.arange(10), np.arange(10)) == pytest.approx(0.9)


# --- rows of the clients


def test_column_clients_have_one_class_each() -> None:
    held = case_stats(THREE)
    assert (held.column, held.values, held.clients) == ("by", ("x", "y", "z [b]"), ("x", "y", "z [b]"))
    assert (held.counted, held.value_column) == ("keys", "by")  # language modelling has no classes
    assert held.rows_C.tolist() == [54, 27, 9]  # nine tenths
    assert held.judged_C.tolist() == [6, 3, 1]
    assert [held.counts_of(client) for client in range(3)] == [{"x": 54}, {"y": 27}, {"z [b]": 9}]
    assert held.distance_C == pytest.approx([0.4, 0.7, 0.9])  # 1 - its share of all rows
    assert held.skew == pytest.approx(0.6 * 0.4 + 0.3 * 0.7 + 0.1 * 0.9)


def moods() -> PartitionStats:
    """Three clients by site; the task's label is the mood.  Of 32 rows 4 are held out."""
    rows = [("north", "good")] * 8 + [("south", "bad")] * 8 + [("east", mood) for mood in ("good", "bad") * 8]
    numbers = range(len(rows))
    sites, labels = zip(*rows, strict=True)
    pairs = Pairs("classification", tuple(f"visit {i}" for i in numbers), labels, sites, ("bad", "good", "odd"))
    task = {"name": "table", "path": "rows.csv", "prompt": "{text}", "label": "mood", "test_share": 0.125}
    tree = {"task": task, "federation": {"clients": 3, "partition": {"kind": "column", "column": "site"}}}
    config = Config.model_validate(tree)
    return stats_of(config, build_dataset(pairs, config.task, config.federation, ByteTokenizer(), config.seed))


def test_classes_come_from_the_label_and_clients_from_another_column() -> None:
    """2 of 16 rows of east are held out, 1 of 8 of north and of south: 14, 7 and 7 to train on, of which north's are
    good and south's bad.  East has g good ones of 14, so all have 7 + g of 28."""
    held = moods()
    assert held.clients == ("east", "north", "south")
    assert (held.column, held.counted, held.value_column) == ("site", "classes", "mood")
    good = held.counts_of(0)["good"]
    assert good in (6, 7, 8)
    assert [held.counts_of(client) for client in (1, 2)] == [{"good": 7}, {"bad": 7}]
    assert set(held.values) == {"good", "bad"}  # no row is odd
    share = (7 + good) / 28
    assert held.distance_C == pytest.approx([abs(good / 14 - share), 1 - share, share])
    assert held.skew == pytest.approx((14 * abs(good / 14 - share) + 7 * (1 - share) + 7 * share) / 28)
    assert held.judged_C.tolist() == [2, 1, 1]  # by site: a held-out row of the north is assigned to the north
    text = " ".join(printed(held).split())
    assert "3 clients, column, by site" in text
    assert "classes largest class" in text
    assert "Classes: the values of the label, column mood." in text


def test_keys_are_labelled_keys() -> None:
    text = " ".join(printed(case_stats(THREE)).split())
    assert "keys largest key" in text
    assert "Keys: the values of the column by, since the task has no label." in text
    assert "class" not in text


def test_many_classes_are_summarised_as_other() -> None:
    held = case_stats(MANY)
    assert held.shown() == (*(f"class {i:02}" for i in range(19)), "other")
    counts_GS = held.table(held.groups(24))
    assert counts_GS.shape == (24, 20)
    # All training rows: nine tenths of 100 - i, rounded so that the total fits, are 90 - i or next to it.
    assert counts_GS.sum() == held.rows_C.sum() == held.row_counts.train
    assert counts_GS.sum(axis=0)[-1] == sum(
        sum(held.counts_of(k).get(f"class {i:02}", 0) for i in range(19, 30)) for k in range(300)
    )


def test_bands_cover_every_client_by_size() -> None:
    held = case_stats(MANY)
    bands = held.groups(24)
    assert sorted(int(client) for band in bands for client in band) == list(range(300))
    sizes = [held.rows_C[band] for band in bands]
    assert all(one.min() >= after.max() for one, after in pairwise(sizes))
    assert [group.tolist() for group in case_stats(THREE).groups(24)] == [[0], [1], [2]]


def test_overlapping_clients() -> None:
    held = Case({"x": 50, "y": 50}, 40, {"kind": "resample", "rows_per_client": 16}).stats()
    assert held.rows_C.tolist() == [16] * 40
    assert "640 rows were drawn from 90" in " ".join(printed(held).split())  # 40 * 16


def test_json_has_everything() -> None:
    data = json.loads(json.dumps(as_dict(case_stats(THREE))))
    assert (data["name"], data["partition"], data["column"], data["judged"]) == ("case", "column", "by", "held-out")
    assert data["rows"] == {
        "read": 100,
        "capped": 0,
        "strange": 0,
        "silent": 0,
        "dropped": 0,
        **{"cut": 0, "cut_prompts": 0, "cut_answers": 0, "cut_turns": 0, "chunks": 0},
        "repeated": 0,
        "train": 90,
        "validation": 0,
        "held_out": 10,
        **{"shared": 0, "transparent": 0, "deep": 0},
    }
    assert data["split"] == "held-out share"
    assert data["notes"] == ["a note"]
    assert (data["counted"], data["value_column"]) == ("keys", "by")
    first = data["clients"][0]
    assert {key: first[key] for key in ("client", "name", "rows", "judged_rows", "counts")} == {
        "client": 0,
        "name": "x",
        "rows": 54,
        "judged_rows": 6,
        "counts": {"x": 54},
    }
    assert first["median_tokens"] > 0


# --- in the terminal


def test_table_has_a_line_for_every_client() -> None:
    lines = [line.split() for line in printed(case_stats(THREE)).splitlines()]
    assert ["x", "54", "60.0%"] in [line[:3] for line in lines]
    assert ["100%", "x", "0.400", "6"] in [line[-4:] for line in lines]
    assert ["all", "90", "100.0%"] in [line[:3] for line in lines]
    assert ["training", "90", "90.0%"] in lines
    assert ["held-out", "10", "10.0%", "yes"] in lines
    assert "z [b]" in printed(case_stats(THREE))  # not read as markup


def test_picture_has_blocks_or_shades() -> None:
    """Each client has all of its rows in one class: a full block, or the darkest shade, and two empty cells."""
    plain = printed(case_stats(THREE))
    row = next(line for line in plain.splitlines() if line.startswith("y") and "█" in line)
    assert row.split()[:3] == ["y", "27", "·"]
    assert row.split()[3].startswith("27█")
    shaded = printed(case_stats(THREE), coloured=True)
    assert shaded.count("48;2;8;48;107") == 3  # #08306b, the darkest, as a background
    assert "█" not in shaded


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("coloured", [False, True])
@pytest.mark.parametrize("case", [THREE, MANY, ALIKE])
def test_table_and_picture_fit_the_width(case: Case, width: int, coloured: bool) -> None:
    console = Console(width=1000, file=io.StringIO())
    lines = [console.render_str(line).plain for line in printed(case_stats(case), width, False).splitlines()]
    assert max(map(len, lines)) <= width
    assert len(lines) < 80
    assert printed(case_stats(case), width, coloured)


def test_large_federations_show_the_ends_and_quartiles() -> None:
    text = printed(case_stats(MANY))
    assert "client 0 " in text
    assert "client 299" in text
    assert "client 150" not in text
    assert "1st quartile" in text
    assert "Bands of 12 to 13 clients" in text  # 300 / 24
    assert "other" in text


def test_missing_column_is_reported() -> None:
    text = " ".join(printed(case_stats(ALIKE)).split())
    assert "The rows have neither a label nor a key, so nothing is counted" in text
    assert "100% all" in text
    assert "Skew" not in text


# --- as a file


@pytest.mark.parametrize(("suffix", "begin"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_picture_file(tmp_path: Path, suffix: str, begin: bytes) -> None:
    draw(Case({"$x^$": 60, "y": 30}, 2, {"kind": "dirichlet", "alpha": 5.0}).stats(), tmp_path / f"picture{suffix}")
    assert (tmp_path / f"picture{suffix}").read_bytes().startswith(begin)


@pytest.mark.parametrize("case", [MANY, ALIKE])
def test_picture_of_many_classes_and_of_one(tmp_path: Path, case: Case) -> None:
    draw(case_stats(case), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["picture.jpg", "picture", "nowhere/picture.png"])
def test_unwritable_picture_files_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError) as caught:
        check_path(tmp_path / name)
    assert caught.value.field == "--out"


# --- the command


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON on stdout, the picture in its file; `tests/planning/test_plan.py` has it in a process of its own."""
    out = tmp_path / "tiny.png"
    arguments = ["data", TINY, "federation.clients=4", "task.validation_share=0.05", "--json", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["rayfed-sub", *arguments])
    assert main._code() == 0
    shown = capsys.readouterr()
    data = json.loads(shown.out)
    assert "rayfed-sub" not in shown.err
    assert (data["column"], data["partition"], len(data["clients"])) == ("module", "column", 4)
    assert data["rows"]["validation"] > 0
    assert sum(client["rows"] for client in data["clients"]) == data["rows"]["train"]
    assert sum(client["judged_rows"] for client in data["clients"]) == data["rows"]["held_out"]
    assert out.read_bytes().startswith(b"\x89PNG")


def test_command_in_a_terminal_and_its_refusals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ended(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["rayfed-sub", "data", TINY, *arguments])
        with pytest.raises(SystemExit) as caught:
            main.main()
        return int(str(caught.value.code))

    assert load_config(TINY).federation.partition.kind == "column"
    assert ended("federation.partition.kind=shards") == 0
    assert "tiny: 8 clients, shards, by module" in capsys.readouterr().out
    assert ended("--out", "picture.jpg") == 2
    assert "--out: got 'picture.jpg'; allowed: a file ending in .png, .svg or .pdf" in capsys.readouterr().err
    assert ended("federation.partition.kind=shards", "federation.partition.shards_per_client=4000") == 2
    assert "federation.partition.shards_per_client: got 4000" in capsys.readouterr().err


def test_cut_and_dropped_rows_are_counted_in_tables_and_before_an_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """14 bytes surround a question.  Of 20 "no" and its end take 3, which leaves a question 3; a longer answer keeps
    10, which leaves none."""
    rows = [(f"{i}?", "no") for i in range(6)] + [("long " * 9 + f"{i}?", "no") for i in range(6)]
    rows += [("b?", "a whole lot of words"), ("{q}, {a}", "no")]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"q": q, "a": a}) + "\n" for q, a in rows))
    task = f"task={{name: table, path: {path}, prompt: 'Tell: {{q}}', answer: a, max_length: 20}}"
    warning = "rows longer than task.max_length=20, of 14: 7 cut (7 in the text), 1 dropped"

    def ended(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rayfed-sub", "data", TINY, task, "federation.clients=1", *arguments])
        with pytest.raises(SystemExit) as caught:
            main.main()
        out, err = capsys.readouterr()
        return int(str(caught.value.code)), " ".join(out.split()), err

    code, out, _ = ended("federation.partition={kind: iid}")
    assert (code, warning in out) == (0, True)
    code, out, _ = ended("federation.partition={kind: iid}", "--json")
    counts = json.loads(out)["rows"]
    assert [counts[name] for name in ("read", "cut", "cut_prompts", "cut_answers", "dropped")] == [14, 7, 7, 0, 1]
    assert not caplog.records
    code, out, err = ended("federation.partition={kind: iid}", "federation.clients=99")
    assert code == 2
    assert caplog.records[0].getMessage() == warning  # which goes to stderr
    assert err.startswith("rayfed-sub: federation.clients: got 99")


def test_what_was_said_is_shown_whatever_ends_the_reading(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def ends(*given: Any) -> Any:
        logging.getLogger("rayfed_sub.data").warning("the cause")
        raise OSError("gone")

    monkeypatch.setattr(partition_stats, "load_dataset", ends)
    with pytest.raises(OSError, match="gone"):
        partition_stats.read_partition_stats(load_config(TINY, []), ByteTokenizer())
    assert "the cause" in caplog.text
