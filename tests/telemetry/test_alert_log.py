"""Alerts are reported while a run goes on, each once, also after a resume, but for rounds that run again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rayfed_sub.config.loading import load_config
from rayfed_sub.storage.remote import Place
from rayfed_sub.storage.run_folder import create, reopen
from rayfed_sub.telemetry.alert_log import Watch
from tests.storage.test_run_folder import BEGINNING, done

CONFIG = load_config({"name": "watched", "federation": {"rounds": 9}})


def test_rising_loss_is_reported_once(tmp_path: Path) -> None:
    """It begins at 4, falls to 3 and stays two thirds above that."""
    folder = create(Place(tmp_path), CONFIG)
    folder.begin(BEGINNING)
    watch, reported = Watch(folder, CONFIG), []
    for n, held_out in enumerate((3.0, 5.0, 5.0, 5.0)):
        folder.add(done(n, held_out, 1))
        reported.append([alert.name for alert in watch.add(done(n, held_out, 1))])
    assert reported == [[], [], ["divergence"], []]
    folder.write_tables()

    again = reopen(Place(tmp_path), CONFIG)
    again.go_on(4)
    assert Watch(again, CONFIG).add(done(4, 5.0, 1)) == []
    again.go_on(2)  # the checkpoint of a dead coordinator
    assert [alert.name for alert in Watch(again, CONFIG).add(done(2, 5.0, 1))] == ["divergence"]


def test_healthy_run_reports_nothing(tmp_path: Path) -> None:
    folder = create(Place(tmp_path), CONFIG)
    folder.begin(BEGINNING)
    watch = Watch(folder, CONFIG)
    rounds = [done(n, 4.0 - 0.3 * (n + 1), 1) for n in range(8)]
    falling = [replace(one, row=replace(one.row, loss=4.0 - 0.3 * n)) for n, one in enumerate(rounds)]
    assert [watch.add(one) for one in falling] == [[]] * 8
