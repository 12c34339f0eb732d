"""Which finished runs are told again for other devices."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayfed_sub.config.schema import Device, Devices
from rayfed_sub.core.errors import UserError
from rayfed_sub.reports import retiming
from rayfed_sub.reports.retiming import devices_in, retimed
from rayfed_sub.reports.run_reader import read_run
from tests.helpers.written_runs import STEPS, write_run

BOARD = "{seconds_per_step: 1}"
OTHERS = Devices(classes={"one": Device(seconds_per_step=2.0)})


@pytest.mark.parametrize("leaving", ["hours: [[8, 18]]", "dropout: 0.1"])
def test_run_whose_clock_chose_its_clients_is_not_told_again(leaving: str, tmp_path: Path) -> None:
    """Although none of its clients was cut off: rounds began with those that were there."""
    classes = f"devices.classes={{board: {BOARD}, phone: {{seconds_per_step: 1, {leaving}}}}}"
    chosen = read_run(write_run(tmp_path / "chosen", classes))
    with pytest.raises(UserError, match=r"RUN: got .*; allowed: a synchronous run that waited for all of its clients"):
        retimed(chosen, OTHERS)


def test_run_with_devices_that_stay_is_told_again(tmp_path: Path) -> None:
    stayed = read_run(write_run(tmp_path / "stayed", f"devices.classes={{board: {BOARD}}}", rounds=3))
    assert retimed(stayed, OTHERS)["round_ended"].max() == 3 * STEPS * 2.0


def test_missing_file_of_devices_has_its_options_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--devices: got .*none\.yaml'; allowed: a YAML file that exists"):
        devices_in(tmp_path / "none.yaml")


def test_run_without_its_clients_is_not_told_again(tmp_path: Path) -> None:
    """In no time, as it were."""
    run = write_run(tmp_path / "run", rounds=3)
    (run / "clients.parquet").unlink()
    with pytest.raises(UserError, match=r"^RUN: got .*; allowed: a run folder with clients\.parquet"):
        retimed(read_run(run), OTHERS)


def test_run_s_own_trace_is_read_for_hours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retiming, "_of_rows", lambda config: ((), lambda client: 0.0))
    trace = tmp_path / "trace.csv"
    trace.write_text("client,device,from,to\n0,board,0,24\n1,board,8,18\n")
    run = write_run(tmp_path / "run", f"devices={{classes: {{board: {BOARD}}}, trace: {trace}}}", clients=2)
    with pytest.raises(UserError, match=r"RUN: got .*; allowed: a synchronous run that waited for all of its clients"):
        retimed(read_run(run), OTHERS)
    trace.write_text("client,device\n0,board\n1,board\n")
    assert len(retimed(read_run(run), OTHERS)) == 2 * 5
