"""Digests of a task's data, and the refusal to resume a run or a sweep with other data; nothing here starts Ray."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from rayfed_sub import run
from rayfed_sub.config.loading import load_config, yaml_text
from rayfed_sub.config.schema import Config, Federation, Task
from rayfed_sub.core.errors import UserError
from rayfed_sub.data.assignment import Assignment
from rayfed_sub.data.dataset import Dataset, load_dataset
from rayfed_sub.data.fingerprint import Fingerprint, fingerprint, hashes, of_rows
from rayfed_sub.data.images import Images
from rayfed_sub.data.splits import Splits
from rayfed_sub.models.tokenizers import ByteTokenizer
from rayfed_sub.planning.job import prepare
from rayfed_sub.runtime import rounds, session
from rayfed_sub.storage.remote import Place
from rayfed_sub.storage.run_folder import create, reopen
from rayfed_sub.storage.same_run import check_data
from rayfed_sub.sweeps.runner import run_sweep
from rayfed_sub.sweeps.space import load_sweep
from rayfed_sub.telemetry.events import Beginning

ROWS = [{"q": f"Where is tool {i}?", "a": f"On shelf {i % 7}.", "who": "ab"[i % 2]} for i in range(40)]
MODEL = {"type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(path: Path, *overrides: str) -> Config:
    tree = {
        "model": {"path": "random", "random": MODEL},
        "task": {"name": "table", "path": str(path), "prompt": "{q}", "answer": "a", "test_share": 0.2},
        "federation": {"clients": 2, "rounds": 2, "partition": {"kind": "column", "column": "who"}},
        "evaluation": {"eval_rows": 8},
    }
    return load_config(tree, overrides)


def data(config: Config, processor: Any = None) -> Dataset:
    return load_dataset(
        config.task, config.federation, processor or ByteTokenizer(), config.seed, config.evaluation.split
    )


def differing(one: Fingerprint, other: Fingerprint) -> list[str]:
    return [name for name, value in asdict(one).items() if value != asdict(other)[name]]


def moved(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, of which the first is another client's."""
    return [{**rows[0], "who": "b"}, *rows[1:]]


CHANGES: dict[str, tuple[Callable[[list[dict[str, Any]]], list[dict[str, Any]]], list[str]]] = {
    "nothing": (list, []),
    "rows appended": (
        lambda rows: [*rows, {"q": "What else?", "a": "Nothing.", "who": "a"}],
        ["count", "rows", "splits", "owners"],
    ),
    "an answer": (lambda rows: [{**rows[0], "a": "On no shelf."}, *rows[1:]], ["rows", "splits"]),
    "the order": (lambda rows: rows[::-1], []),
    "a row's client": (moved, ["splits", "owners"]),
    "a client's name": (lambda rows: [{**r, "who": r["who"].replace("b", "c")} for r in rows], ["owners"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_fingerprint_names_what_changed(change: str, tmp_path: Path) -> None:
    made, expected = CHANGES[change]
    before = data(config(written(tmp_path / "rows.jsonl", ROWS), "task.seed=3"))
    after = data(config(written(tmp_path / "rows.jsonl", made(ROWS)), "task.seed=3"))
    if change == "a client's name":  # held-out rows are drawn by the values of the column
        assert differing(before.fingerprint, after.fingerprint) in (["owners"], ["splits", "owners"])
    else:
        assert differing(before.fingerprint, after.fingerprint) == expected


def test_other_partition_of_the_same_splits(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", ROWS)
    one, other = (data(config(path, "federation.partition={kind: iid}", f"seed={seed}")) for seed in (0, 1))
    assert differing(one.fingerprint, other.fingerprint) == ["owners"]


def test_other_tokenizer_and_labels_give_other_rows(tmp_path: Path) -> None:
    class Louder(ByteTokenizer):
        def prompt(self, text: str) -> list[int]:
            return super().prompt(text.upper())

    kept = config(written(tmp_path / "rows.jsonl", ROWS))
    assert "rows" in differing(data(kept).fingerprint, data(kept, Louder()).fingerprint)
    moods = [{"q": row["q"], "who": "ab"[n % 2], "mood": ("good", "bad")[n % 3 == 0]} for n, row in enumerate(ROWS)]
    judged = Task(name="table", path=str(written(tmp_path / "moods.jsonl", moods)), prompt="{q}", label="mood")
    before = load_dataset(judged, Federation(clients=2, partition=kept.federation.partition), ByteTokenizer(), 0)
    written(tmp_path / "moods.jsonl", [{**moods[0], "mood": "good"}, *moods[1:]])
    after = load_dataset(judged, Federation(clients=2, partition=kept.federation.partition), ByteTokenizer(), 0)
    assert differing(before.fingerprint, after.fingerprint)[0] == "rows"


def test_images_differ_by_pixels_labels_and_processor() -> None:
    pixels = np.arange(4 * 3 * 2 * 2, dtype=np.uint8).reshape(4, 3, 2, 2)
    splits = Splits(np.array([0, 1]), np.array([2]), np.array([3]), np.array([], np.int64))

    def of(
        pixels: Any = pixels, classes: Any = (0, 1, 0, 1), mean: float = 0.5, names: Any = ("x", "y")
    ) -> Fingerprint:
        images = Images.of(list(pixels), classes, [mean] * 3, [0.5] * 3)
        dealt = Assignment.of([np.array([0, 1])])
        return fingerprint(of_rows(images, hashes(images), names), hashes(images), splits, ("k",), dealt, np.array([0]))

    other = pixels.copy()
    other[2, 0, 0, 0] += 1
    assert differing(of(), of()) == []
    assert differing(of(), of(pixels=other)) == ["rows", "splits"]
    assert differing(of(), of(classes=(1, 1, 0, 1))) == ["rows", "splits"]
    assert differing(of(), of(mean=0.4)) == ["rows"]
    assert differing(of(), of(names=("y", "x"))) == ["rows"]


# --- resumed runs


def begun(folder: Path, config: Config) -> None:
    """A run's folder after the evaluation of the initial model."""
    folder.mkdir()
    job = prepare(config)
    create(Place(folder), job.config).begin(Beginning((), {}, {}, data=asdict(job.dataset.fingerprint), backbone="7"))


def refusal(config: Config, folder: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        run(config, folder, resume=True)
    return caught.value


def test_run_does_not_resume_with_other_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def never(forks: str | None) -> Iterator[Callable[[], None]]:
        def needed() -> None:
            raise AssertionError("Ray was needed")

        yield needed

    monkeypatch.setattr(session, "ray_session_aside", never)
    path, folder = written(tmp_path / "rows.jsonl", ROWS), tmp_path / "run"
    kept = config(path)
    begun(folder, kept)
    with pytest.raises(AssertionError, match="Ray was needed"):  # the same rows are not refused
        run(kept, folder, resume=True)
    log = (folder / "log.jsonl").read_bytes()

    written(path, [*ROWS, *({**row, "q": f"{row['q']} Say!"} for row in ROWS)])
    error = refusal(kept, folder)
    assert (error.field, error.value) == ("--resume", str(folder))
    assert error.allowed == (
        "the data with which it began; now there are other rows (tokens, pixels or labels) (40 rows then, 80 now)"
    )
    assert error.advice == "restore the data, or begin anew in another folder"
    written(path, moved(ROWS))
    assert "other splits of the same rows, or another order" in refusal(kept, folder).allowed
    (folder / "summary.json").write_text(json.dumps({"resumed": [], **dict.fromkeys(SUMMARY)}))
    assert "other splits" in refusal(kept, folder).allowed, "of a finished run too"
    assert (folder / "log.jsonl").read_bytes() == log


SUMMARY = (
    *("name", "method", "rounds", "weights_sha256", "uplink_bytes", "downlink_bytes", "dense_bytes", "change_rank"),
    *("wall_seconds", "train_seconds", "peak_memory_bytes", "metrics", "versions", "environment"),
)


def test_other_partition_is_named(tmp_path: Path) -> None:
    then = asdict(data(config(written(tmp_path / "rows.jsonl", ROWS))).fingerprint)
    (tmp_path / "log.jsonl").write_text(json.dumps({"event": "started", "scores": [], "data": then}) + "\n")
    with pytest.raises(UserError, match=r"now there are other owners of the same rows: clients' names, or which"):
        check_data(tmp_path, Fingerprint(**{**then, "owners": "0"}))


def test_run_of_a_version_without_digests_does_not_resume(tmp_path: Path) -> None:
    now = Fingerprint(1, "a", "b", "c")
    check_data(tmp_path, now)  # nothing has started
    (tmp_path / "log.jsonl").write_text(json.dumps({"event": "started", "scores": []}) + "\n")
    with pytest.raises(UserError, match=r"--resume: .*this one is of an older version; begin anew in another folder"):
        check_data(tmp_path, now)
    (tmp_path / "summary.json").write_text("{}")
    check_data(tmp_path, now)  # a finished run: nothing to resume


def test_run_does_not_resume_with_other_weights(tmp_path: Path) -> None:
    kept = config(written(tmp_path / "rows.jsonl", ROWS))
    begun(tmp_path / "run", kept)
    job, records = prepare(kept), list[object]()
    folder = reopen(Place(tmp_path / "run"), job.config)
    asked: dict[str, Any] = {"backbone_sum": "8", "workers_environment": ({}, {})}
    before = (tmp_path / "run" / "log.jsonl").read_bytes()
    with pytest.raises(UserError) as caught:
        rounds._beginning(0, folder, job, asked.__getitem__, records.append)
    assert str(caught.value) == (
        f"model.path: got 'random'; allowed: the weights with which the run in {tmp_path / 'run'} began; these are "
        "others; restore them, or begin anew in another folder"
    )
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == before
    asked["backbone_sum"] = "7"
    assert rounds._beginning(0, folder, job, asked.__getitem__, records.append).backbone == "7"


def test_checksum_of_the_weights_excludes_computed_tensors() -> None:
    from rayfed_sub.runtime.coordinator import Coordinator

    def summed(**arrays: Any) -> str:
        held = {name: ("float32", np.float32(values)) for name, values in arrays.items()}
        return Coordinator.backbone_sum(cast(Any, SimpleNamespace(_backbone_arrays=held)))

    assert summed(w=[[1.0, 2.0]], f=[1.0]) == summed(w=[[1.0, 2.0]], f=[1.1]) != summed(w=[[1.0, 2.5]], f=[1.0])


# --- resumed sweeps


def test_sweep_does_not_resume_with_other_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, folder = written(tmp_path / "rows.jsonl", ROWS), tmp_path / "sweep"
    tree = config(path, "task.validation_share=0.1", "evaluation.split=validation", "name=grid").model_dump(mode="json")
    tree["sweep"] = {"space": {"task.seed": {"grid": [0, 1]}, "optimizer.lr": {"grid": [0.1, 0.2]}}}
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml_text(tree))

    class StartError(Exception):
        pass

    @contextmanager
    def starts(forks: str | None) -> Iterator[Callable[[], None]]:
        def needed() -> None:
            raise StartError

        yield needed

    monkeypatch.setattr("rayfed_sub.sweeps.runner.ray_session_aside", starts)
    with pytest.raises(StartError):
        run_sweep(load_sweep(file), folder)
    with pytest.raises(StartError):
        run_sweep(load_sweep(file), folder, resume=True)
    assert len(json.loads((folder / "data.json").read_text())) == 2  # one data set per task.seed
    written(path, moved(ROWS))
    with pytest.raises(UserError, match=rf"--resume: got '{folder}'; .* now there are other splits of the same rows"):
        run_sweep(load_sweep(file), folder, resume=True)
