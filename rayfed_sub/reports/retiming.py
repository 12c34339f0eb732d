"""A finished synchronous run told again for other devices: the same training, another clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

import pandas as pd

from rayfed_sub.clock.fleet import fleet_of
from rayfed_sub.clock.timeline_rows import ClientRound, waited
from rayfed_sub.config.checks import check, check_rules
from rayfed_sub.config.loading import read_yaml
from rayfed_sub.config.schema import Config, Devices
from rayfed_sub.core.errors import UserError
from rayfed_sub.core.schemas import TimelineRow
from rayfed_sub.planning.job import load_inputs
from rayfed_sub.planning.packs import step_tokens
from rayfed_sub.planning.sampling import local_steps
from rayfed_sub.reports.run_reader import Run


def devices_in(path: Path) -> Devices:
    """The section `devices` of a YAML file, or the file itself where it is nothing else.  Raises UserError."""
    tree = read_yaml(path, "--devices")
    return check(Devices, tree.get("devices", tree), "devices")


def retimed(run: Run, devices: Devices) -> pd.DataFrame:
    """The timeline that the run would have with these devices, from the bytes and steps of its clients.  Nothing is
    trained; the task's rows are read where a device's speed is by token, or a trace, its own too, may name clients.

    Raises UserError where training itself would have been another: a run that is not synchronous or whose clients its
    clock chose, and devices with hours or drop-out; and where the devices do not fit the run.
    """
    if not waits_for_all(run.config):
        raise _by_the_clock(run)
    if run.clients.empty and run.rounds["clients"].sum() > 0:
        allowed, advice = "a run folder with clients.parquet, which has the bytes of each client", "restore that file"
        raise UserError("RUN", str(run.folder), allowed, advice)
    config = with_devices(run.config, devices)
    by_token = any(device.tokens_per_second is not None for device in devices.classes.values())
    traced = any(one.trace is not None for one in (devices, run.config.devices))
    names, tokens = _of_rows(config) if by_token or traced else ((), _unknown)
    if _left(run, names):
        raise _by_the_clock(run)
    fleet = fleet_of(config, names)
    assert fleet is not None, "checked: there are classes"
    if fleet.leaves:
        allowed = "devices without hours and dropout, by which other clients would train"
        hours = fleet.windows.limited.any()
        what = (devices.trace or "hours") if hours else "dropout"
        raise UserError("--devices", what, allowed, "run it with these devices instead")
    rows, now = list[TimelineRow](), 0.0
    for n, of_round in run.clients.groupby("round", sort=True):
        clients = []
        for row in of_round.to_dict("records"):
            client, sizes = int(row["client"]), (int(row["downlink_bytes"]), int(row["uplink_bytes"]))
            steps = local_steps(config, client)  # of a client that failed too, as the clock counts them
            work = (steps, steps * tokens(client))
            clients.append(ClientRound(client, *sizes, isinstance(row["failure"], str), work))
        now, more = waited(fleet, int(str(n)), now, clients)
        rows += more
    return pd.DataFrame([asdict(row) for row in rows], columns=[field.name for field in fields(TimelineRow)])


def _left(run: Run, names: Sequence[str]) -> bool:
    """Whether clients of the run could leave; of a trace that is gone, whether any did."""
    trace = run.config.devices.trace
    if trace is not None and not Path(trace).is_file():
        return not set(run.timeline["outcome"]) <= {"counted", "failed"}
    own = fleet_of(run.config, names)
    return own is not None and own.leaves  # then each round's clients were those available, though none was cut off


def _by_the_clock(run: Run) -> UserError:
    allowed = "a synchronous run that waited for all of its clients: the training of others depends on the clock"
    return UserError("RUN", str(run.folder), allowed, "run it again with these devices")


def waits_for_all(config: Config) -> bool:
    """Whether a round of this configuration waits for all of its clients, as far as that does not depend on devices."""
    federation = config.federation
    return federation.mode == "sync" and federation.round_deadline is None and federation.over_selection == 1.0


def with_devices(config: Config, devices: Devices) -> Config:
    """The configuration with these devices.  Raises UserError where they have no classes, and where they do not fit."""
    if not devices.classes:
        raise UserError("--devices", {}, "a file with devices.classes", "see rayfed-sub config devices")
    found = config.model_copy(update={"devices": devices})
    check_rules(found)
    return found


def _of_rows(config: Config) -> tuple[Sequence[str], Callable[[int], float]]:
    """The clients' names, and the tokens of a local step by client."""
    model = config.model.model_copy(update={"start_from": None})
    dataset = load_inputs(config.model_copy(update={"model": model})).dataset
    return dataset.client_names, lambda client: step_tokens(config, dataset, client)


def _unknown(client: int) -> float:
    return 0.0
