"""Decisions between rounds: recorded before they take effect, and not made twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from rayfed_sub import Decision, Progress, load_config
from rayfed_sub.config.schema import Config
from rayfed_sub.core.errors import RunError, UserError
from rayfed_sub.core.schemas import Score
from rayfed_sub.runtime.callbacks import with_callbacks
from rayfed_sub.runtime.course import Course
from rayfed_sub.storage.remote import Place
from rayfed_sub.storage.run_folder import RunFolder, create, reopen
from rayfed_sub.telemetry.events import Beginning, Callback, Decided
from tests.storage.test_run_folder import done

WATCHED = ["early_stopping.metric=held_out_loss", "evaluation.split=validation", "task.validation_share=0.1"]


def config(*overrides: str) -> Config:
    return load_config({"federation": {"rounds": 9}}, overrides)


def course(folder: RunFolder, of: Config, *callbacks: Callback) -> Course:
    return Course(folder, *with_callbacks(of, callbacks))


def begun(path: Path, of: Config, losses: Sequence[float | None]) -> RunFolder:
    """A folder whose rounds ended with these losses (None: not judged), after the initial model's 9."""
    folder = create(Place(path), of)
    folder.begin(Beginning((Score(None, "held_out_loss", 9.0, 50),), {}, {}))
    for n, loss in enumerate(losses):
        folder.add(done(n, loss))
    return folder


def decided(path: Path) -> list[tuple[int, float, str | None]]:
    entries = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    found = [entry for entry in entries if entry["event"] == "decided"]
    return [(entry["finished"], entry["lr_factor"], entry["stop"]) for entry in found]


def test_early_stopping_counts_evaluations_and_is_recorded(tmp_path: Path) -> None:
    asked = config(*WATCHED, "early_stopping.patience=2", "early_stopping.min_gain=0.5")
    folder = begun(tmp_path, asked, [3.0, None, 2.6])
    run = course(folder, asked)
    assert (run.decide(3).stop, run.best, decided(tmp_path)) == (None, 3, [])
    folder.add(late := done(3, 2.7))
    run.add(late)
    why = "held_out_loss has not gained by more than 0.5 in 2 evaluations"
    assert run.decide(4) == Decided(4, 1.0, why)
    assert run.best_score() == {"round": 3, "metric": "held_out_loss", "value": 2.6}
    assert decided(tmp_path) == [(4, 1.0, why)]
    assert course(folder, asked).decide(4).stop == why
    assert len(decided(tmp_path)) == 1


def test_initial_model_is_no_round_to_stop_at(tmp_path: Path) -> None:
    asked = config(*WATCHED, "early_stopping.patience=1")
    run = course(begun(tmp_path, asked, []), asked, lambda progress: Decision(stop="at once"))
    assert (run.decide(0), run.best) == (Decided(0, 1.0), None)


def test_callback_sees_the_run_so_far_and_is_asked_once(tmp_path: Path) -> None:
    """A round that runs again, in another process, is followed by what was decided, whatever would be answered now."""
    seen: list[Progress] = []

    def halve(progress: Progress) -> Decision | None:
        seen.append(progress)
        return Decision(lr_factor=progress.lr_factor / 2) if progress.finished in (1, 2) else None

    asked, _ = with_callbacks(config(), [halve])
    folder = begun(tmp_path, asked, [3.0, None])
    run = course(folder, asked, halve)
    assert [run.decide(n).lr_factor for n in (0, 1, 2)] == [1.0, 0.5, 0.25]
    assert [row.round for row in seen[-1].rounds] == [0, 1]
    assert seen[-1].scores == {0: {"held_out_loss": 9.0}, 1: {"held_out_loss": 3.0}}
    folder.write_tables()

    again = reopen(Place(tmp_path), asked)
    again.go_on(1)  # the newest checkpoint has one round: the second runs again
    later = course(again, asked, halve)
    assert (later.decide(1).lr_factor, later.decide(2).lr_factor, len(seen)) == (0.5, 0.25, 2)
    again.add(second := done(1, None))
    again.add(third := done(2, 2.0))
    for record in (second, third):
        later.add(record)
    assert (later.decide(3).lr_factor, len(seen)) == (0.25, 3)
    assert decided(tmp_path) == [(1, 0.5, None), (2, 0.25, None), (3, 0.25, None)]


def test_several_callbacks_follow_one_another(tmp_path: Path) -> None:
    class Halve:
        def __call__(self, progress: Progress) -> Decision:
            return Decision(lr_factor=progress.lr_factor / 2)

    def stop(progress: Progress) -> Decision:
        return Decision(stop=f"at {progress.lr_factor}")

    asked, _ = with_callbacks(config(), [Halve(), stop])
    run = course(begun(tmp_path, asked, [3.0]), asked, Halve(), stop)
    name = f"{__name__}:test_several_callbacks_follow_one_another.<locals>.stop"
    assert run.decide(1) == Decided(1, 0.5, f"{name}: at 0.5")


ANSWERS: dict[str, tuple[Callable[[Progress], Any], str]] = {
    "an error": (lambda progress: 1 / 0, "ZeroDivisionError: division by zero"),
    "no decision": (lambda progress: True, "answered True, not a Decision or None"),
    "no number": (lambda progress: Decision(lr_factor="2"), "answered lr_factor='2', not a finite number >= 0"),  # type: ignore[arg-type]
    "a negative factor": (lambda progress: Decision(lr_factor=-1.0), "answered lr_factor=-1.0, not a finite number"),
    "an infinite factor": (lambda progress: Decision(lr_factor=float("inf")), "answered lr_factor=inf, not a finite"),
    "no reason": (lambda progress: Decision(stop=True), "gave True as the reason to stop, not a text"),  # type: ignore[arg-type]
    "too much for FedNova": (lambda progress: Decision(lr_factor=20.0), "federation.proximal must stay below 0.5"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_bad_answer_ends_the_run_in_one_line(case: str, tmp_path: Path) -> None:
    answer, message = ANSWERS[case]
    asked = config("federation.normalise_steps=true", "optimizer={name: sgd, lr: 0.1}", "federation.proximal=0.6")
    asked, _ = with_callbacks(asked, [answer])
    run = course(begun(tmp_path, asked, [3.0]), asked, answer)
    with pytest.raises(RunError, match=r"round 1") as caught:
        run.decide(1)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert decided(tmp_path) == []


def test_callbacks_have_names_that_the_configuration_keeps() -> None:
    def local(progress: Progress) -> None: ...

    named, found = with_callbacks(config("callbacks=[os.path:basename]"), [local])
    here = f"{__name__}:test_callbacks_have_names_that_the_configuration_keeps.<locals>.local"
    assert named.callbacks == tuple(found) == ("os.path:basename", here)
    assert with_callbacks(named, [local])[0] == named  # the same call again, as for a resumed run
    with pytest.raises(UserError, match=r"callbacks: got '.*local'; allowed: package.module:name .* give it to"):
        with_callbacks(named, [])
    with pytest.raises(UserError, match="functions with names of their own"):
        with_callbacks(config(), [lambda progress: None, lambda progress: None])
    for name in ("os", "os:sep", "nowhere:f", "os.path:no"):
        with pytest.raises(UserError, match=rf"^callbacks: got '{name}'; allowed: package"):
            with_callbacks(config(f"callbacks=['{name}']"), [])
