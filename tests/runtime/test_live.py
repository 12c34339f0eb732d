"""Live figures of a run: one mapping to numbers, TensorBoard's files, trackers, gauges on Ray's endpoint."""

from __future__ import annotations

import struct
import time
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from rayfed_sub.config.loading import load_config
from rayfed_sub.config.schema import Config
from rayfed_sub.core.errors import RunError
from rayfed_sub.core.schemas import ClientLayer, ClientRow, CohortLayer, RoundRow, Score
from rayfed_sub.runtime import live
from rayfed_sub.runtime.live import Live
from rayfed_sub.storage.remote import Place
from rayfed_sub.storage.run_folder import RunFolder, create, reopen
from rayfed_sub.telemetry import trackers
from rayfed_sub.telemetry.events import Beginning, RoundDone
from rayfed_sub.telemetry.metrics import FIGURES, SUMMED, scalars
from rayfed_sub.telemetry.tensorboard import Events
from rayfed_sub.telemetry.trackers import Tracked

CONFIG = load_config({"name": "kept", "federation": {"rounds": 9}})
NOTHING = dict.fromkeys(SUMMED, 0.0)
FIRST = (Score(None, "held_out_loss", 4.0, 50), Score(3, "held_out_loss", 5.0, 9), Score(None, "perplexity", 55.0, 50))


def cohort_layer(**figures: float) -> CohortLayer:
    """A layer's row of a round with only these figures."""
    row: dict[str, Any] = {**dict.fromkeys(CohortLayer.__dataclass_fields__), "spectrum": (), **figures}
    return CohortLayer(**row)


def client_layer(energy: float | None) -> ClientLayer:
    row: dict[str, Any] = {**dict.fromkeys(ClientLayer.__dataclass_fields__), "spectrum": ()}
    return ClientLayer(**{**row, "gradient_energy": energy})


def round_done(n: int, held_out: float | None = None) -> RoundDone:
    """Round n: 4 clients, one of them skipped, with 120 labels in 2 of 3 seconds; one pack was sent twice."""
    row = RoundRow(n, 4, 1, 2.5 - n, held_out, 100, 200, 120, None, None, 2.0, 3.0, 1, 5000)
    scores = () if held_out is None else (Score(None, "held_out_loss", held_out, 50),)
    return RoundDone(row, (ClientRow(n, 0, 1.0, 100, 200),), scores)


FULL = replace(
    round_done(1, 2.25),
    row=replace(round_done(1, 2.25).row, change_rank=6.5, epsilon=0.75),
    scores=(
        *(Score(None, "held_out_loss", 2.25, 50), Score(None, "f1/tabby cat", 0.5, 50)),
        *(Score(0, "held_out_loss", 9.0, 10), Score(None, "confusion/cat/dog", 7.0, 50)),
    ),
    layers=(
        cohort_layer(
            rank=8, effective_rank=3.0, drift=1.0, agreement=-0.5, overlap=0.25, truncated=0.5, cross_term=0.75
        ),
        cohort_layer(rank=4, effective_rank=2.0, drift=3.0, agreement=0.25, overlap=0.75, truncated=0.0),
        cohort_layer(drift=0.5, agreement=0.5, accumulated=0.125),
    ),
    client_layers=(client_layer(0.5), client_layer(None), client_layer(0.75), client_layer(1.0)),
)
"""The second of two rounds, with every figure; the third layer has no ranks."""


def test_every_number_of_a_round() -> None:
    before = {"bytes/up": 50.0, "bytes/down": 0.0, "trouble/failed": 2.0, "trouble/retries": 0.0}
    assert scalars(FULL, before) == {
        **{"loss/training": 1.5, "loss/held_out": 2.25, "scores/f1/tabby cat": 0.5},
        # Accumulated figures: earlier rounds + this one.
        **{"bytes/up": 150.0, "bytes/down": 200.0, "trouble/failed": 3.0, "trouble/retries": 1.0},
        **{"round/finished": 2.0, "round/seconds": 3.0, "round/training_seconds": 2.0},
        **{"round/clients_per_second": 4 / 2.0, "round/labels_per_second": 120 / 2.0},
        **{"memory/bytes": 5000.0, "privacy/epsilon": 0.75, "rank/server": 6.5},
        **{"rank/cohort": (8 + 4) / 2, "rank/effective": (3.0 + 2.0) / 2},  # medians of two, or the middle of three
        **{"clients/drift": 1.0, "clients/agreement": 0.25, "clients/overlap": (0.25 + 0.75) / 2},
        **{"lost/truncated": (0.5 + 0.0) / 2, "lost/cross_term": 0.75, "weights/accumulated": 0.125},
        "gradient/energy": 0.75,
    }


def test_table_names_every_number() -> None:
    tags = {tag for tag in scalars(FULL, NOTHING) if not tag.startswith("scores/")}
    assert tags == set(FIGURES)


def test_missing_figures_are_omitted() -> None:
    assert set(FIGURES) - set(scalars(round_done(0), NOTHING)) == {
        *("loss/held_out", "privacy/epsilon", "rank/server", "rank/cohort", "rank/effective", "gradient/energy"),
        *("clients/drift", "clients/agreement", "clients/overlap", "lost/truncated", "lost/cross_term"),
        "weights/accumulated",
    }


# ---- TensorBoard


def events_of(path: Path) -> list[Any]:
    """The events of a file: length (8 bytes), its checksum (4), the event, its checksum (4), repeated; the last may be
    cut off."""
    from tensorboardX.proto.event_pb2 import Event

    content, events = path.read_bytes(), []
    while content:
        (length,) = struct.unpack_from("<Q", content)
        if len(content) < 16 + length:
            break
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return events


def points_of(folder: Path, tag: str) -> list[tuple[int, float]]:
    """(step, value) as TensorBoard shows them: file after file by name; the start of a session at a step removes
    earlier values of that step and later ones (tensorboard/backend/event_processing/event_accumulator.py)."""
    points: list[tuple[int, float]] = []
    for path in sorted(folder.glob("*tfevents*")):
        for event in events_of(path):
            if event.session_log.status == event.session_log.START:
                points = [point for point in points if point[0] < event.step]
            points += [(event.step, value.simple_value) for value in event.summary.value if value.tag == tag]
    return points


def test_file_matches_tensorboardx(tmp_path: Path) -> None:
    from tensorboardX.record_writer import RecordWriter

    Events(tmp_path / "ours", 0).add(1, {"loss/training": 2.5})
    (ours,) = (tmp_path / "ours").iterdir()
    theirs = RecordWriter(str(tmp_path / "theirs"))
    for event in events_of(ours):
        theirs.write(event.SerializeToString())
    theirs.close()
    assert ours.read_bytes() == (tmp_path / "theirs").read_bytes()
    version, start, scalar = events_of(ours)
    assert version.file_version == "brain.Event:2"
    assert (start.step, scalar.step) == (0, 1)
    assert [(value.tag, value.simple_value) for value in scalar.summary.value] == [("loss/training", 2.5)]
    assert abs(scalar.wall_time - time.time()) < 60


class FakeGauge:
    """Accepts the arguments of Ray's gauge; `values` has all values that were set by name and tags."""

    values: dict[tuple[str, frozenset[tuple[str, str]]], list[float]] = {}  # noqa: RUF012

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self._name, self._keys = name, tag_keys

    def set(self, value: float, tags: Mapping[str, str]) -> None:
        assert set(tags) == set(self._keys)
        assert all(text.isascii() for text in tags.values())  # else Ray raises UnicodeEncodeError
        self.values.setdefault((self._name, frozenset(tags.items())), []).append(value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A run folder whose name is not ASCII."""
    (tmp_path / "größe").mkdir()
    return tmp_path / "größe"


@pytest.fixture
def gauges(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[float]]:
    """Values set so far of the gauge of this name with the tags of the tests' runs and these."""
    FakeGauge.values = {}
    monkeypatch.setattr(live, "Gauge", FakeGauge)
    monkeypatch.setattr(live, "ray", SimpleNamespace(is_initialized=lambda: True))
    monkeypatch.setattr(live, "_SECONDS", 0.01)

    def values_of(name: str, folder: Path, **tags: str) -> list[float]:
        common = {"run": "kept", "method": "fedftg", "folder": str(folder).replace("größe", r"gr\xf6\xdfe")}
        return FakeGauge.values.get((name, frozenset({**common, **tags}.items())), [])

    return values_of


def begun(path: Path) -> RunFolder:
    folder = create(Place(path), CONFIG)
    folder.begin(Beginning(FIRST, {}, {}))
    return folder


def test_resumed_run_reports_no_round_twice(path: Path, gauges: Callable[..., list[float]]) -> None:
    folder = begun(path)
    with closing(Live(folder, CONFIG)) as shown:
        for n in range(3):
            folder.add(round_done(n, held_out=3.0 - n))
            shown.add(round_done(n, held_out=3.0 - n))
    folder.write_tables()
    board = path / "tensorboard"
    assert points_of(board, "loss/held_out") == [(0, 4.0), (1, 3.0), (2, 2.0), (3, 1.0)]
    assert points_of(board, "scores/perplexity") == [(0, 55.0)]
    assert points_of(board, "bytes/up") == [(0, 0.0), (1, 100.0), (2, 200.0), (3, 300.0)]

    (first,) = board.iterdir()
    first.write_bytes(first.read_bytes()[:-5])  # killed while it wrote
    again = reopen(Place(path), CONFIG)
    again.go_on(2)  # the checkpoint has two rounds
    with closing(Live(again, CONFIG)) as shown:
        assert points_of(board, "bytes/up") == [(0, 0.0), (1, 100.0), (2, 200.0)]  # round 3 no longer counts
        shown.add(round_done(2, held_out=1.5))
        wait_for(lambda: gauges("rayfed_sub_bytes_up", path)[-1:] == [300.0])
    assert points_of(board, "loss/held_out") == [(0, 4.0), (1, 3.0), (2, 2.0), (3, 1.5)]
    assert points_of(board, "bytes/up") == [(0, 0.0), (1, 100.0), (2, 200.0), (3, 300.0)]

    afresh = reopen(Place(path), CONFIG)
    afresh.go_on(0)  # no checkpoint was left
    with closing(Live(afresh, CONFIG)):
        assert points_of(board, "loss/held_out") == [(0, 4.0)]


def test_full_disk_ends_the_run_and_names_the_file(path: Path, gauges: Callable[..., list[float]]) -> None:
    with closing(Live(begun(path), CONFIG)) as shown:
        (file,) = (path / "tensorboard").iterdir()
        file.unlink()
        file.symlink_to("/dev/full")
        with pytest.raises(RunError, match=r"^writing files: .*tensorboard/events\S*: No space left on device$"):
            shown.add(round_done(0))
    (path / "tensorboard").rename(path / "away")
    (path / "tensorboard").write_text("in the way")
    with pytest.raises(RunError, match=r"^writing files: .*tensorboard: File exists$"):
        Live(reopen(Place(path), CONFIG), CONFIG)


# ---- trackers


def test_trackers_get_what_tensorboard_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rayfed_sub import run
    from rayfed_sub.runtime import session
    from tests.end_to_end.test_runs import small

    logged: list[tuple[int, Mapping[str, float]]] = []
    ends: list[Any] = []

    def opens(folder: Path, config: Config) -> Tracked:
        assert config.method["rank"] == 4
        return Tracked("here", -1, lambda step, values: logged.append((step, values)), ends.append)

    # Not as a module: accelerate would take one of that name for the real one.
    monkeypatch.setattr(session, "check_trackers", lambda config: None)
    monkeypatch.setattr(trackers, "_open_mlflow", opens)
    few = small("federation.rounds=1", "federation.clients=2", "trackers=[mlflow]", "task.max_rows=60")
    summary = run(few, tmp_path / "run", lambda record: None)
    assert [step for step, _ in logged] == [0, 1]
    for tag in {**logged[0][1], **logged[1][1]}:
        shown = points_of(tmp_path / "run" / "tensorboard", tag)
        assert shown == [(step, pytest.approx(values[tag], rel=1e-6)) for step, values in logged if tag in values]
    (told,) = ends
    assert told["weights_sha256"] == summary.weights_sha256
    assert told["wall_seconds"] == summary.wall_seconds > 0


# ---- gauges


def wait_for(met: Callable[[], bool], seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < until, f"not met within {seconds} s"
        time.sleep(0.01)


def test_gauges_are_set_repeatedly_until_the_end(path: Path, gauges: Callable[..., list[float]]) -> None:
    with closing(Live(begun(path), CONFIG)) as shown:
        wait_for(lambda: len(gauges("rayfed_sub_loss_held_out", path)) > 3)  # before the first round is over
        assert set(gauges("rayfed_sub_loss_held_out", path)) == {4.0}
        assert set(gauges("rayfed_sub_scores", path, score="perplexity")) == {55.0}
        assert gauges("rayfed_sub_loss_training", path) == []
        shown.add(round_done(0))
        wait_for(lambda: len(gauges("rayfed_sub_loss_training", path)) > 3)
        assert set(gauges("rayfed_sub_loss_training", path)) == {2.5}
        then = len(gauges("rayfed_sub_loss_held_out", path))
        wait_for(lambda: len(gauges("rayfed_sub_loss_held_out", path)) > then)  # it stays, though not evaluated since
    then = len(gauges("rayfed_sub_loss_training", path))
    time.sleep(0.1)
    assert len(gauges("rayfed_sub_loss_training", path)) == then


def samples(url: str) -> dict[str, dict[frozenset[tuple[str, str]], float]]:
    """Our gauges on a Prometheus endpoint: by name and our tags, the value."""
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    found: dict[str, dict[frozenset[tuple[str, str]], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if "rayfed_sub" in sample.name:
                tags = {key: sample.labels[key] for key in ("run", "method", "folder", "score") if key in sample.labels}
                found.setdefault(sample.name, {})[frozenset(tags.items())] = sample.value
    return found


@pytest.mark.slow
def test_prometheus_matches_the_tables(ray_session: None, tmp_path: Path) -> None:
    """Ray forwards gauges every 10 s, so the test waits until each round is visible."""
    import ray

    from rayfed_sub import run
    from tests.end_to_end.test_runs import small

    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    config = small("name=seen", "resources.workers=1", "federation.on_client_failure=skip")
    tags = {"run": "seen", "method": "fedftg", "folder": str(tmp_path / "run")}.items()
    seen: list[dict[str, float]] = []

    def current() -> dict[str, float]:
        own = {name: by.get(frozenset(tags)) for name, by in samples(url).items()}
        scores = samples(url).get("ray_rayfed_sub_scores", {})
        own["accuracy"] = scores.get(frozenset({*tags, ("score", "token_accuracy")}))
        return {name.removeprefix("ray_rayfed_sub_"): value for name, value in own.items() if value is not None}

    def wait(record: object) -> None:
        if isinstance(record, RoundDone):
            wait_for(lambda: current().get("round_finished") == record.row.round + 1, 60)
            seen.append(current())

    run(config, tmp_path / "run", wait)
    rounds = pd.read_parquet(tmp_path / "run" / "rounds.parquet")
    scores = pd.read_parquet(tmp_path / "run" / "scores.parquet").query("client.isna() and metric == 'token_accuracy'")
    assert [now["loss_training"] for now in seen] == rounds.loss.tolist()
    assert [now["loss_held_out"] for now in seen] == rounds.held_out_loss.tolist()
    assert [now["bytes_up"] for now in seen] == rounds.uplink_bytes.cumsum().tolist()
    assert [now["round_labels_per_second"] for now in seen] == (rounds.labels / rounds.train_seconds).tolist()
    assert [now["rank_server"] for now in seen] == rounds.change_rank.tolist()
    assert [now["memory_bytes"] for now in seen] == rounds.memory_bytes.tolist()
    layers = pd.read_parquet(tmp_path / "run" / "layers.parquet").groupby("round")
    assert [now["clients_drift"] for now in seen] == layers.drift.median().tolist()
    assert [now["accuracy"] for now in seen] == scores.value.tolist()[1:]  # the first row belongs to the initial model
    steps, losses = zip(*points_of(tmp_path / "run" / "tensorboard", "loss/training"), strict=True)
    assert steps == tuple(rounds["round"] + 1)
    assert losses == pytest.approx(rounds.loss.tolist(), rel=1e-6)  # float32
    time.sleep(35)  # two reports of 10 s, and one in transit
    assert frozenset(tags) not in samples(url).get("ray_rayfed_sub_round_finished", {})
