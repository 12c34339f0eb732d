"""Runs that go on for more rounds, stop early, keep their best checkpoint, and do what callbacks decide."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from rayfed_sub import Decision, Progress, load_config, run
from rayfed_sub.config.schema import Config
from rayfed_sub.core.errors import UserError
from rayfed_sub.export.exported import export_hf
from rayfed_sub.reports.report import write_report
from rayfed_sub.reports.run_reader import read_run
from rayfed_sub.storage import checkpoints
from rayfed_sub.telemetry.events import Notice, PackDone, Summary
from tests.end_to_end.test_recovery import same
from tests.helpers import chaos

SMALLEST = [
    *("task.max_rows=60", "federation.clients=4", "federation.sampled=2", "federation.local_steps=1"),
    *("evaluation.eval_rows=8", "evaluation.split=validation", "task.validation_share=0.2"),
]


def job(*overrides: str) -> Config:
    return load_config(chaos.ROOT / "experiments" / "tiny.yaml", [*chaos.settings(0), *SMALLEST, *overrides])


def dies(round: int) -> Callable[[Any], None]:
    """A listener with which the process ends in that round, after its first pack."""

    def listener(record: Any) -> None:
        if isinstance(record, PackDone) and record.round == round:
            raise MemoryError

    return listener


def everything(summary: Summary) -> dict[str, Any]:
    """The summary without times and traces of the way."""
    own = ("wall_seconds", "train_seconds", "peak_memory_bytes", "planned_memory_bytes", "resumed", "folder")
    return {name: value for name, value in vars(summary).items() if name not in own}


def test_more_rounds_on_a_finished_run_are_those_of_one_run(tmp_path: Path) -> None:
    """Clients have states, the last round of the short run is judged, answered and diagnosed as no other, and the
    longer one is killed on its way."""
    often = ["method={name: fedsa-lora, rank: 2}", "evaluation.every=2", "diagnostics.every=2"]
    often += ["evaluation.generate_rows=2", "evaluation.max_new_tokens=2", "checkpoint.every=2"]
    whole = run(job(*often, "federation.rounds=5"), tmp_path / "whole")
    folder = tmp_path / "more"
    run(job(*often, "federation.rounds=3"), folder)
    longer = job(*often, "federation.rounds=5")
    with pytest.raises(MemoryError):
        run(longer, folder, dies(3), resume=True)
    assert not (folder / "summary.json").exists()
    more = run(longer, folder, resume=True)
    same(more, whole)
    assert everything(more) == everything(whole)
    answers = [pd.read_parquet(f"{made.folder}/answers.parquet") for made in (more, whole)]
    pd.testing.assert_frame_equal(*answers)
    assert load_config(folder / "config.yaml") == load_config(tmp_path / "whole" / "config.yaml")
    assert run(longer, folder, resume=True) == more  # finished: nothing happens


@pytest.mark.slow
def test_early_stop_keeps_the_best_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too high a rate, with which the third round's accuracy is not reached again; its model can be exported."""
    watched = ["early_stopping={metric: token_accuracy, patience: 2}", "federation.rounds=9", "checkpoint.every=2"]
    watched += ["optimizer.lr=0.3", "evaluation.generate_rows=1", "evaluation.max_new_tokens=2"]
    messages: list[str] = []
    config, folder = job(*watched), tmp_path / "run"
    stopped = run(config, folder, lambda record: messages.append(record.text) if isinstance(record, Notice) else None)
    assert stopped.best is not None
    best, end = stopped.best["round"], stopped.rounds
    assert end == best + 2 < 9
    why = "token_accuracy has not gained in 2 evaluations"
    assert stopped.stopped == why
    assert f"stopped after round {end} of 9: {why}" in messages
    assert stopped.metrics["rouge_l_before"] is not None
    assert {"rouge_l", "held_out_loss"} <= stopped.metrics.keys()  # answers belong to a last round
    assert checkpoints.best(folder) == best
    scores = pd.read_parquet(folder / "scores.parquet").query(
        "client.isna() and metric == 'token_accuracy' and rounds > 0"
    )
    assert scores["rounds"].tolist() == list(range(1, end + 1))
    assert scores["rounds"].iloc[scores["value"].argmax()] == best

    again, keep_best = tmp_path / "again", checkpoints.keep_best

    def keeps(path: Path, round: int) -> None:
        """The process ends between the best round's checkpoint and its mark."""
        if round == best:
            raise MemoryError
        keep_best(path, round)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "keep_best", keeps)
        with pytest.raises(MemoryError):
            run(config, again)
    assert (checkpoints.newest(again), checkpoints.best(again)) == (best, best - 1)
    resumed = run(config, again, resume=True)
    assert checkpoints.best(again) == best
    same(resumed, stopped)
    assert everything(resumed) == everything(stopped)
    with pytest.raises(UserError, match=r"^federation.rounds: got 12; allowed: 9, with which .* stopped after round"):
        run(job(*watched, "federation.rounds=12"), folder, resume=True)

    short = run(job(*watched, f"federation.rounds={best}"), tmp_path / "short")
    for number, checkpoint in ((1, "best"), (2, "last")):
        export_hf(folder, tmp_path / f"export-{number}", checkpoint=checkpoint)
    export_hf(Path(short.folder), tmp_path / "export-3")
    files = [(tmp_path / f"export-{i}" / "model.safetensors").read_bytes() for i in (1, 2, 3)]
    assert files[0] == files[2] != files[1]
    with pytest.raises(UserError, match=r"^--checkpoint: got 'newest'; allowed: last or best"):
        export_hf(folder, tmp_path / "export-4", checkpoint="newest")
    write_report([read_run(folder)], tmp_path / "report.html")
    assert f"stopped early: {why}" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_what_callbacks_decided_survives_a_death_before_the_checkpoint(tmp_path: Path) -> None:
    """The process ends after a decision and before its round's checkpoint; whoever is asked later answers otherwise."""

    def answers(*factors: float) -> Callable[[Progress], Decision]:
        left = (factor for factor in factors)  # a generator's content is no setting, so it may be another one

        def callback(progress: Progress) -> Decision:
            return Decision(lr_factor=next(left), stop="enough" if progress.finished == 3 else None)

        return callback

    rounds = ["federation.rounds=6", "checkpoint.every=0", "evaluation.every=2"]
    whole = run(job(*rounds), tmp_path / "whole", callbacks=[answers(0.5, 0.25, 1.0)])
    assert (whole.rounds, whole.stopped and whole.stopped.rpartition(": ")[2]) == (3, "enough")
    folder = tmp_path / "run"
    with pytest.raises(MemoryError):
        run(job(*rounds), folder, dies(2), callbacks=[answers(0.5, 0.25)])
    assert checkpoints.newest(folder) is None
    resumed = run(job(*rounds), folder, resume=True, callbacks=[answers(9.0)])
    same(resumed, whole)
    assert everything(resumed) == everything(whole)
    plain = run(job(*rounds, "federation.rounds=3"), tmp_path / "plain")
    assert plain.weights_sha256 != whole.weights_sha256
    with pytest.raises(UserError, match=r"^callbacks: got \[\]; allowed: \['tests.*answers.<locals>.callback'\], with"):
        run(job(*rounds), folder, resume=True)
