"""A sweep's report: the right numbers, in a well-formed document in a browser."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from pyarrow.fs import LocalFileSystem
from pyarrow.parquet import read_table

from rayfed_sub.reports.page import Cell, Facts, Figure, Section, Table, Text, page
from rayfed_sub.storage.remote import SWEEP, Mirror, Place
from rayfed_sub.sweeps.outcome import outcome
from rayfed_sub.sweeps.results import CLOCKED, Ended, best, best_first, table, write
from rayfed_sub.sweeps.space import load_sweep
from rayfed_sub.sweeps.sweep_report import sections, write_report
from rayfed_sub.sweeps.trial import NUMBER
from tests.helpers.browser import CHROMIUM, Outline, browse

GRID = Path(__file__).parents[2] / "experiments" / "sweeps" / "tagg-rank-lr.yaml"
STEPS, RANK, LR = KEYS = ("federation.local_steps", "method.rank", "optimizer.lr")


def trials(*rows: dict[str, Any]) -> pd.DataFrame:
    """A table of finished trials, of 4 rounds and 3 MB each unless their rows set other values."""
    common = {
        "status": "finished",
        "rounds": 4,
        "uplink_bytes": 1_000_000,
        "downlink_bytes": 2_000_000,
        "failure": None,
    }
    return pd.DataFrame(
        [{"trial": at, **common, "folder": f"trials/{at:05d}", **row} for at, row in enumerate(rows)]
    ).astype({"failure": "string"})


def grid(loss: Any = lambda steps, rank, lr: 2.0 + 1 / rank + steps / 10 + abs(math.log10(lr) + 2)) -> pd.DataFrame:
    """27 trials in the order of the grid; a lower loss with few steps, large ranks and lr=1e-2."""
    points = [(steps, rank, lr) for steps in (1, 2, 4) for rank in (2, 4, 8) for lr in (1e-3, 3e-3, 1e-2)]
    return trials(*({**dict(zip(KEYS, point, strict=True)), "held_out_loss": loss(*point)} for point in points))


def report(frame: pd.DataFrame, keys: tuple[str, ...] = KEYS, mode: str = "min", **settings: Any) -> dict[str, Any]:
    """The report's sections by title, each with its parts."""
    return {section.title: section.parts for section in sections(frame, keys, "held_out_loss", mode, settings)}


def facts(found: dict[str, Any]) -> dict[str, str]:
    return dict(next(part for part in found["Result"] if isinstance(part, Facts)).pairs)


def figures(found: dict[str, Any]) -> list[Figure]:
    return [part for parts in found.values() for part in parts if isinstance(part, Figure)]


def words(figure: Figure) -> dict[tuple[int, int], str]:
    """The texts of a heat map's cells, by column and row."""
    texts = [trace for trace in figure.data if trace["type"] == "scatter"]
    return {(x, y): text for trace in texts for x, y, text in zip(trace["x"], trace["y"], trace["text"], strict=True)}


# --- order of the trials


def test_stopped_trials_come_after_finished_ones_and_failures_last() -> None:
    frame = trials(
        {"held_out_loss": 3.0},
        {"held_out_loss": 1.0, "status": "stopped"},
        {"held_out_loss": 0.5, "status": "failed"},
        {"held_out_loss": 2.0},
        {"held_out_loss": math.nan},
        {"held_out_loss": math.inf},
        {"held_out_loss": 2.0},
    )
    assert best_first(frame, "held_out_loss", "min")["trial"].tolist() == [3, 6, 0, 1, 2, 4, 5]
    assert best_first(frame, "held_out_loss", "max")["trial"].tolist() == [0, 3, 6, 1, 2, 4, 5]
    assert best(frame, "held_out_loss", "min") == 3
    assert best(frame[frame["status"] == "failed"], "held_out_loss", "min") is None
    assert best(frame, "accuracy", "max") is None


def test_best_trial_and_its_lead() -> None:
    frame = trials(
        {RANK: 4, LR: 0.001, "held_out_loss": 2.5, "held_out_loss_before": 4.0},
        {RANK: 8, LR: 0.003, "held_out_loss": 2.0, "held_out_loss_before": 4.0},
        {RANK: 2, LR: 0.003, "held_out_loss": 4.0, "held_out_loss_before": 4.0},
    )
    found = facts(report(frame, (RANK, LR)))
    assert found == {
        "best trial": "1",
        RANK: "8",
        LR: "3e-3",
        "held_out_loss": "2.0000",
        "before training": "4.0000",
        "next": "trial 0, rank=4 lr=1e-3: 2.5000",
        "ahead of the next by": "0.5000 (20.00%)",  # 0.5 of 2.5
        "ahead of the median by": "0.5000 (20.00%); the median is 2.5000",
        "sent up and down": "3 MB",
        "run folder": "trials/00001",
    }


# --- the figures


def test_heat_maps_show_the_best_of_each_pair() -> None:
    maps = report(grid())["Pairs of keys"][1:]
    assert [figure.caption.split(":")[0] for figure in maps] == [
        "rank over local_steps",
        "lr over local_steps",
        "lr over rank",
    ]
    ranks = maps[0]
    # Rows are ranks 2, 4, 8, columns local steps 1, 2, 4, each at its best learning rate, where the last term is 0.
    expected = [[2.0 + 1 / rank + steps / 10 for steps in (1, 2, 4)] for rank in (2, 4, 8)]
    assert [row == pytest.approx(wanted) for row, wanted in zip(ranks.data[0]["z"], expected, strict=True)] == [
        True
    ] * 3
    assert ranks.layout["xaxis"]["ticktext"] == ["1", "2", "4"]
    assert words(ranks)[0, 2] == "2.2250"  # 2 + 1/8 + 1/10
    # 9 trials per value of local steps, 3 per rank, of which the last learning rate is the best: 0 + 2 * 3 + 2.
    assert ranks.data[0]["hovertext"][2][0] == "trial 8<br>held_out_loss 2.2250<br>local_steps 1<br>rank 8<br>lr 1e-2"
    assert ranks.label == (
        "Heat map of held_out_loss over local_steps and rank. The best cell: 2.2250 at local_steps=1 rank=8."
    )
    assert maps[2].layout["yaxis"]["ticktext"] == ["1e-3", "3e-3", "1e-2"]


def test_cells_without_a_trial_are_empty() -> None:
    frame = grid().iloc[:-3]  # no trial with 4 steps and rank 8
    frame.loc[frame.index[0], "status"] = "failed"  # one of three with 1 step and rank 2
    ranks = report(frame)["Pairs of keys"][1]
    assert ranks.data[0]["z"][2][2] is None
    assert words(ranks)[2, 2] == "-"
    assert list(words(ranks).values()).count("-") == 1
    assert "1 of 9 cells are empty" in ranks.label


def test_diverged_trial_does_not_dominate_the_colours() -> None:
    frame = trials(*({RANK: rank, LR: 0.1, "held_out_loss": loss} for rank, loss in ((1, 2.0), (2, 2.5), (4, 1e6))))
    points = report(frame, (RANK,))["One key at a time"][0]
    # 2.0 and four times the distance to the median: 2.0 + 4 * 0.5.
    assert points.data[-1]["y"] == [2.0, 2.5, 4.0]
    assert points.data[-1]["marker"]["symbol"] == ["circle", "circle", "triangle-up"]
    assert "Triangles: 1 trial beyond 4.0000." in points.caption
    assert points.data[-1]["hovertext"][2].startswith("trial 2<br>held_out_loss 1e6")


def test_parallel_coordinates_have_ticks_of_values_on_logarithmic_axes() -> None:
    (figure,) = report(grid())["All keys at once"]
    steps, _, lr, metric = figure.data[0]["dimensions"]
    assert steps["tickvals"] == [1, 2, 4]
    assert lr["tickvals"] == pytest.approx([-3.0, math.log10(0.003), -2.0])
    assert lr["ticktext"] == ["1e-3", "3e-3", "1e-2"]
    assert metric["range"][1] == pytest.approx(2.225), "the best end is on top"
    assert len(metric["values"]) == 27


def test_many_values_are_drawn_as_points_without_a_heat_map() -> None:
    frame = trials(*({LR: 10 ** (-4 + at / 10), RANK: 2 + at % 2, "held_out_loss": 3 - at / 100} for at in range(20)))
    found = report(frame, (LR, RANK), space={LR: {"loguniform": [1e-4, 1e-2]}, RANK: {"choice": [2, 3]}})
    assert "Pairs of keys" not in found
    points = found["One key at a time"][0]
    assert points.layout["xaxis"] == {
        "title": {"text": "lr"},
        "type": "log",
        "tickvals": [1e-4, 1e-3],  # 10^-4 to 10^-2.1
        "ticktext": ["1e-4", "1e-3"],
    }
    assert found["All keys at once"][0].data[0]["dimensions"][0]["tickvals"] == [-4.0, -3.0]
    drawn_evenly = report(frame, (LR, RANK), space={LR: {"uniform": [1e-4, 1e-2]}})
    assert drawn_evenly["One key at a time"][0].layout["xaxis"]["type"] == "linear"
    assert found["What was swept"][0].rows[0][2] == "loguniform 1e-4, 1e-2"


def test_traffic_line_joins_the_pareto_front() -> None:
    sent = ((10, 3.0), (10, 2.9), (20, 2.95), (30, 2.5), (40, 2.6))
    frame = trials(
        *(
            {RANK: at, "held_out_loss": loss, "uplink_bytes": up, "downlink_bytes": 0}
            for at, (up, loss) in enumerate(sent)
        )
    )
    (figure,) = report(frame, (RANK,))["Quality against cost"]
    assert figure.data[0]["text"] == ["1", "3"]
    frame["status"] = ["finished", "stopped", "finished", "finished", "finished"]
    (figure,) = report(frame, (RANK,))["Quality against cost"]
    assert figure.data[0]["text"] == ["1", "3"], "a stopped trial has sent what it has sent"
    assert "Hollow" in figure.caption


# --- odd sweeps


def test_stopped_trial_with_unknown_bytes_is_not_on_the_front() -> None:
    stopped = {RANK: 2, "held_out_loss": 1.0, "status": "stopped", "uplink_bytes": None, "downlink_bytes": None}
    found = report(trials({RANK: 4, "held_out_loss": 2.0}, stopped), (RANK,))
    (figure,) = found["Quality against cost"]
    assert figure.label.endswith("than trial 0, 3 MB: 2.0000.")
    assert [len(trace["x"]) for trace in figure.data] == [1, 1]  # the line, the marks


def test_strings_booleans_and_none_are_values() -> None:
    frame = trials(
        *(
            {"method.name": name, "x.flag": flag, "x.cap": cap, "held_out_loss": loss}
            for name, flag, cap, loss in (("fedit", True, None, 3.0), ("fedftg", False, 1.0, 2.0))
        )
    )
    found = report(frame, ("method.name", "x.flag", "x.cap"))
    assert facts(found)["method.name"] == "fedftg"
    name, flag, cap, _ = found["All keys at once"][0].data[0]["dimensions"]
    assert (name["ticktext"], name["values"]) == (["fedftg", "fedit"], [1, 0])  # the best is drawn last
    assert (flag["ticktext"], flag["values"]) == (["False", "True"], [1, 0])
    assert (cap["ticktext"], cap["values"]) == (["-", "1"], [0, 1])


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        (("auto", 8), ["auto", "8"]),
        ((8, [4, 8]), ["8", "[4, 8]"]),
        ((True, 3), ["true", "3"]),
        ((None, True, "x"), [None, "true", "x"]),
        ((True, False), [True, False]),
        ((8, 0.5), [8.0, 0.5]),
    ],
)
def test_column_of_a_key_has_one_type(given: tuple[Any, ...], stored: list[Any], tmp_path: Path) -> None:
    """Text where the values are of several; else they stay as they are.  Parquet refuses mixtures."""
    reported = {"rounds": 4, "finished": True, "held_out_loss": 2.0, "uplink_bytes": 1, "downlink_bytes": 2}
    frame = table([Ended(at, {"a.key": value}, reported, None) for at, value in enumerate(given)], ["held_out_loss"])
    write(frame, tmp_path / "trials.parquet")
    assert read_table(tmp_path / "trials.parquet").column("a.key").to_pylist() == stored
    assert report(frame, ("a.key",))["Trials"]


def test_trial_that_finished_no_round_has_the_untrained_score_alone() -> None:
    """Whoever reads the table would take it for a result."""
    given = [{"rounds": 0, "finished": False, "held_out_loss": 4.0}, {"rounds": 2, "held_out_loss": 3.0}]
    given[1]["held_out_loss_before"] = 4.0
    frame = table(
        [Ended(at, {"a.key": at}, reported, "no") for at, reported in enumerate(given)],
        ["held_out_loss_before", "held_out_loss"],
    )
    assert frame["held_out_loss_before"].tolist() == [4.0, 4.0]
    assert math.isnan(frame["held_out_loss"][0])
    assert frame["held_out_loss"][1] == 3.0


def test_every_file_of_a_finished_sweep_is_sent(tmp_path: Path) -> None:
    folder, store = tmp_path / "here", tmp_path / "store"
    folder.mkdir()
    store.mkdir()
    sweep = load_sweep(GRID, ["sweep.space={method.rank: {grid: [2, 4]}}"])
    reported = {"rounds": 4, "finished": True, "held_out_loss": 2.0, "uplink_bytes": 1, "downlink_bytes": 2}
    ended = [
        SimpleNamespace(path=f"tune/{at:05d}", config={"trial": {NUMBER: at, **point}}, metrics=reported, error=None)
        for at, point in enumerate(sweep.points())
    ]
    place = Place(folder, Mirror("s3://bucket/sweep", LocalFileSystem(), str(store), SWEEP))
    outcome(sweep, ended, place)  # type: ignore[arg-type]  # what it reads of Tune's results
    place.push()
    names = {"trials.parquet", "curves.parquet", "best.yaml", "report.html"}
    assert {path.name for path in store.iterdir()} == {path.name for path in folder.iterdir()} == names


@pytest.mark.parametrize("loss", [{}, {"held_out_loss": math.nan}, {"held_out_loss": 1.0}])
def test_all_trials_failed(loss: dict[str, float]) -> None:
    frame = trials(*({RANK: rank, "status": "failed", "failure": f"round 0: rank {rank}", **loss} for rank in (2, 4)))
    found = report(frame, (RANK,))
    assert list(found) == ["Result", "What was swept", "Failures", "Trials"]
    assert found["Result"][0].text == "2 trials: 2 failed. None has a held_out_loss, so there is no best one."
    assert [row[2] for row in found["Failures"][0].rows] == ["round 0: rank 2", "round 0: rank 4"]


def test_one_trial() -> None:
    found = report(trials({RANK: 2, LR: 0.1, "held_out_loss": 2.0}), (RANK, LR))
    assert list(found) == ["Result", "What was swept", "Quality against cost", "Trials"]
    assert "next" not in facts(found)


def test_table_sorts_by_numbers_and_shows_other_values() -> None:
    frame = trials({RANK: 16, "held_out_loss": 2.0, "x": None}, {RANK: 2, "held_out_loss": math.nan, "x": None})
    frame["uplink_bytes"] = pd.array([1_500_000, None], dtype="Int64")
    frame["wasted_bytes"] = [640.0, math.nan]
    table = report(frame, (RANK,))["Trials"][0]
    assert table.columns == [
        "trial",
        "rank",
        "status",
        "rounds",
        "held_out_loss",
        "up (MB)",
        "down (MB)",
        "x",
        "wasted (MB)",
    ]
    assert table.rows[0][-1] == Cell("0.00064", 640.0)
    cell = Cell("-", None)
    assert table.rows[0][:6] == [
        Cell("0", 0),
        Cell("16", 16),
        "finished",
        Cell("4", 4),
        Cell("2.0000", 2.0),
        Cell("1.5", 1_500_000),
    ]
    assert table.rows[1][4:6] == [cell, cell]


def test_plotly_knows_every_property() -> None:
    import plotly.graph_objects as go

    def coloured(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: "black" if key == "color" and isinstance(own, str) else coloured(own) for key, own in value.items()
            }
        return [coloured(own) for own in value] if isinstance(value, list) else value

    drawn = figures(report(grid())) + figures(report(grid(), (RANK,)))
    assert len(drawn) == 3 + 1 + 1 + 1 + 1  # heat maps, parallel coordinates, traffic; points, traffic
    for figure in drawn:
        go.Figure([coloured(trace) for trace in figure.data], coloured(figure.layout))


# --- the document

NASTY = "</script><b>\"'&$x$ <img src=x onerror=alert(1)>"


def test_text_is_never_markup(tmp_path: Path) -> None:
    frame = trials(
        {"method.name": NASTY, RANK: 2, "held_out_loss": 2.0, "folder": NASTY},
        {"method.name": "fedit", RANK: 4, "held_out_loss": 2.5},
        {"method.name": NASTY, RANK: 4, "status": "failed", "failure": NASTY},
    )
    path = tmp_path / "report.html"
    write_report(frame, ["method.name", RANK], "held_out_loss", "min", NASTY, path, {"space": {}, "note": NASTY})
    text = path.read_text(encoding="utf-8")
    outline = Outline(text)
    assert {tag for tag, _ in outline.found} & {"b", "img"} == set()
    assert outline.texts.count(NASTY) >= 4  # title, heading, the best one's value, the failure's cause
    # Plotly has its own markup: its texts keep their brackets escaped, except the ticks of parallel coordinates.
    heat_map, *_ = re.findall(r"<script type='application/json'>(.*?)</script>", text)
    ticks = json.loads(heat_map)["layout"]["xaxis"]["ticktext"]
    assert ticks == ["&lt;/script&gt;&lt;b&gt;\"'&amp;$x$ &lt;img…", "fedit"]


def test_document_is_complete_small_and_self_contained(tmp_path: Path) -> None:
    from plotly.offline import get_plotlyjs

    path = tmp_path / "report.html"
    frame = pd.concat([grid()] * 4, ignore_index=True).assign(trial=range(108))
    write_report(frame, KEYS, "held_out_loss", "min", "look", path, {"scheduler": "asha"})
    text = path.read_text(encoding="utf-8")
    assert text.count(get_plotlyjs()) == 1
    assert len(text.replace(get_plotlyjs(), "").encode()) < 200_000
    outline = Outline(text)
    assert not any("src" in attributes for attributes in outline.named("script"))
    assert [link["href"] for link in outline.named("link")] == ["data:,"]
    assert outline.named("html") == [{"lang": "en"}]
    assert [tag for tag, _ in outline.found if tag in ("h1", "h2", "h3")] == ["h1", *["h2"] * 6]
    assert len(outline.named("figure")) == 5
    assert all(figure["aria-label"] for figure in outline.named("figure"))
    assert all(region["tabindex"] == "0" for region in outline.named("div") if region.get("role") == "region")
    assert {"scheduler", "asha"} <= set(outline.texts)


def test_page_without_figures_needs_no_plotly() -> None:
    text = page(
        "a & b", [Section("one", [Text("x < y"), Facts({"k": "v"}), Table("t", ["c"], [[Cell("1", 1.0)], ["z"]])])]
    )
    assert len(text) < 20_000
    assert "x &lt; y" in text
    assert "<td data-value='1.0'>1</td>" in text


# --- in a browser


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
def test_sweep_report_in_a_browser(tmp_path: Path) -> None:
    """Everything is drawn, in light and dark; tables sort and filter; a phone needs no sideways scroll."""
    path = tmp_path / "report.html"
    frame = grid()
    frame.loc[3, ["status", "held_out_loss", "failure"]] = ["failed", math.nan, "round 1: loss is NaN"]
    write_report(frame, KEYS, "held_out_loss", "min", "look", path, {})
    asked = """<script>
      plots.forEach(draw);  // also what is out of sight
      const table = [...document.querySelectorAll("table")].at(-1), seen = {};
      const column = at => [...table.tBodies[0].rows].filter(row => !row.hidden).map(row => row.cells[at].textContent);
      const press = at => table.tHead.rows[0].cells[at].firstChild.click();
      press(2); seen.up = column(2); press(2); seen.down = column(2); seen.sort = table.tHead.rows[0].cells[2].ariaSort;
      press(6); seen.loss = column(6);
      const box = table.closest(".table").querySelector("input");
      box.value = "FAIL"; box.dispatchEvent(new Event("input")); seen.kept = column(0);
      seen.count = table.closest(".table").querySelector("output").textContent;
      const style = getComputedStyle(document.body);
      const measured = plot => ({wide: plot.scrollWidth, drawn: plot.querySelectorAll("svg.main-svg").length,
        text: plot.textContent, paper: plot._fullLayout.paper_bgcolor, shares: plot._context.showSendToCloud});
      seen.plots = [...document.querySelectorAll(".plot")].map(measured);
      seen.page = style.backgroundColor;
      seen.overflow = document.documentElement.scrollWidth - innerWidth;
      document.body.dataset.seen = JSON.stringify(seen);
    </script>"""
    path.write_text(path.read_text(encoding="utf-8").replace("</body>", f"{asked}</body>"), encoding="utf-8")
    looks = {}
    for scheme, number in (("dark", 0), ("light", 1)):
        dom, console = browse(path, f"--blink-settings=preferredColorScheme={number}", "--window-size=500,900")
        assert console == []
        ((_, body),) = [found for found in Outline(dom).found if found[0] == "body"]
        looks[scheme] = json.loads(body["data-seen"] or "")
    light = looks["light"]
    assert light["up"] == [rank for rank in ("2", "4", "8") for _ in range(9)]
    assert light["down"] == light["up"][::-1]
    assert light["sort"] == "descending"
    assert light["loss"][0] == "2.2250"
    assert light["loss"][-1] == "-", "rows without a number come last"
    assert (light["kept"], light["count"]) == (["3"], "1 of 27 rows")
    assert len(light["plots"]) == 5
    assert all(plot["drawn"] and "not supported" not in plot["text"] for plot in light["plots"])
    assert not any(plot["shares"] for plot in light["plots"])
    assert light["overflow"] <= 0
    assert {plot["paper"] for plot in light["plots"]} == {"#ffffff"}
    assert {plot["paper"] for plot in looks["dark"]["plots"]} == {"#14171a"}
    assert (light["page"], looks["dark"]["page"]) == ("rgb(255, 255, 255)", "rgb(20, 23, 26)")


# --- what quality costs

CURVES = pd.DataFrame(
    [
        # trial, rounds, score, bytes, seconds, joules: 0 is quick, 1 is thrifty, 2 is worse than 0 in everything
        (0, 0, 4.0, 0, 0.0, 0.0),
        (0, 2, 2.5, 4e6, 3600.0, 1e3),
        (0, 4, 2.0, 8e6, 7200.0, 2e3),
        (1, 0, 4.0, 0, 0.0, 0.0),
        (1, 2, 3.0, 1e6, 7200.0, 3e3),
        (1, 4, 2.2, 2e6, 14400.0, 6e3),
        (2, 0, 4.0, 0, 0.0, 0.0),
        (2, 2, 3.5, 4e6, 7200.0, 2e3),
        (2, 4, 2.4, 8e6, 14400.0, 4e3),
    ],
    columns=["trial", "rounds", "score", "bytes", "seconds", "joules"],
)
DROPOUT = "devices.classes.phone.dropout"


def clocked() -> pd.DataFrame:
    shares = {"wasted_bytes": 1e6, "wasted_share": 0.1, "idle_share": 0.5, "counted_share": 0.9}
    names = (RANK, DROPOUT, "held_out_loss", "simulated_hours", "joules")
    rows = [(4, 0.0, 2.0, 2.0, 2e3), (2, 0.0, 2.2, 4.0, 6e3), (4, 0.2, 2.4, 4.0, 4e3)]
    return trials(*(dict(zip(names, row, strict=True)) | shares for row in rows))


def texts(table: Table) -> list[list[str]]:
    return [[one if isinstance(one, str) else one.text for one in row[2:]] for row in table.rows]


def test_costs_of_quality_by_hand() -> None:
    """The thriftiest takes 2 h, 2 MB and 2 kJ.  All gain at least 1.6 from 4.0, nine tenths of it is 2.56."""
    found = {s.title: s.parts for s in sections(clocked(), [RANK, DROPOUT], "held_out_loss", "min", {}, CURVES)}
    assert len(found["Quality against cost"]) == 3
    front, budget, target, robust = (part for part in found["Quality and cost"] if isinstance(part, Table))
    assert [row[0] for row in front.rows] == [Cell("0", 0), Cell("1", 1)]
    assert texts(front)[0] == ["2.0000", "2", "8", "2"]
    assert budget.columns[2:] == ["1 simulated hours", "2 simulated hours", "1 MB", "2 MB", "1 kJ", "2 kJ"]
    assert texts(budget) == [
        ["2.5000", "2.0000", "4.0000", "4.0000", "2.5000", "2.0000"],
        ["4.0000", "3.0000", "3.0000", "2.2000", "4.0000", "4.0000"],
        ["4.0000", "3.5000", "4.0000", "4.0000", "4.0000", "3.5000"],
    ]
    assert "2.5600 or better" in target.caption
    assert texts(target) == [["2", "1", "4", "1"], ["4", "4", "2", "6"], ["4", "4", "8", "4"]]
    assert texts(robust) == [["90", "1", "10", "50", change] for change in ("+0.0000", "+0.0000", "+0.4000")]


@pytest.mark.parametrize("keys", [[RANK], [RANK, DROPOUT]])
def test_what_is_lost_is_told_where_no_device_has_a_power(keys: list[str]) -> None:
    frame, curves = clocked().drop(columns="joules"), CURVES.assign(joules=math.nan)
    found = {s.title: s.parts for s in sections(frame, keys, "held_out_loss", "min", {}, curves)}
    *_, robust = (part for part in found["Quality and cost"] if isinstance(part, Table))
    assert [row[:4] for row in texts(robust)] == [["90", "1", "10", "50"]] * 3


def test_robustness_without_devices_is_of_the_score_alone() -> None:
    frame = clocked().drop(columns=[*CLOCKED, DROPOUT]).assign(**{"federation.availability": [1.0, 1.0, 0.5]})
    curves, keys = CURVES.assign(seconds=math.nan, joules=math.nan), [RANK, "federation.availability"]
    found = {s.title: s.parts for s in sections(frame, keys, "held_out_loss", "min", {}, curves)}
    *_, robust = (part for part in found["Quality and cost"] if isinstance(part, Table))
    assert robust.caption.startswith("Robustness: held_out_loss less that of the trial with the same other values")
    assert texts(robust) == [["+0.0000"], ["+0.0000"], ["+0.4000"]]


def test_trials_without_devices_have_no_hours() -> None:
    curves = CURVES.assign(seconds=math.nan, joules=math.nan)
    frame = clocked().drop(columns=[*CLOCKED, DROPOUT])
    found = {s.title: s.parts for s in sections(frame, [RANK], "held_out_loss", "min", {}, curves)}
    tables = [part for part in found["Quality and cost"] if isinstance(part, Table)]
    assert [table.columns[2:] for table in tables] == [["held_out_loss", "MB"], ["1 MB", "2 MB"], ["round", "MB"]]
    assert [row[0] for row in tables[0].rows] == [Cell("0", 0), Cell("1", 1)]


def test_trials_compared_by_cost_are_judged_by_loss() -> None:
    found = {s.title: s.parts for s in sections(clocked(), [RANK], "simulated_hours", "min", {}, CURVES)}
    assert "Quality against cost" not in found
    assert facts(found)["best trial"] == "0"
    assert "Pareto front of held_out_loss" in next(p for p in found["Quality and cost"] if isinstance(p, Table)).caption
