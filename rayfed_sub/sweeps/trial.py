"""A trial of a sweep: a federated run in its own folder, reported to Ray Tune round by round."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray import tune

from rayfed_sub.core.text import SCORES_OF, UNDEFINED
from rayfed_sub.evaluation.scores import overall
from rayfed_sub.runtime.links import Crew
from rayfed_sub.runtime.rounds import carry_out
from rayfed_sub.storage.remote import inside, open_place
from rayfed_sub.storage.run_folder import opened, summary_of
from rayfed_sub.storage.same_run import check_inputs
from rayfed_sub.sweeps.results import CLOCKED, CURVE, SENT
from rayfed_sub.sweeps.shared_inputs import SharedInputs
from rayfed_sub.sweeps.space import Trials
from rayfed_sub.sweeps.trial_curves import curve
from rayfed_sub.telemetry.events import RoundDone, Started, Summary

NUMBER = "number"
_CREW = Crew()
"""Of this process, which Tune uses for trial after trial."""


def values_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The trial's values of the space's keys, from the configuration that Tune gives it."""
    return {key: value for key, value in given["trial"].items() if key != NUMBER}


def trial(given: Mapping[str, Any], sweep: Trials, inputs: SharedInputs, trials: str) -> None:
    """Runs or resumes the trial in its folder below `trials`, a path or a URI.

    Raises the run's error: Tune then starts the trial again, which goes on from its last checkpoint.
    """
    # Seconds that Tune waits for a stopped trial to end before it gives up reusing its process.
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = "60"
    began = time.perf_counter()
    values = values_of(given)
    out = inside(trials, sweep.folder(Path(tune.get_context().get_trial_dir()).name, values))
    job, shared = inputs.job(sweep.config(values))
    rounds, same, kind = job.config.federation.rounds or 0, job.any_pack, job.dataset.kind

    untrained = dict[str, float]()

    def notify(record: object) -> None:
        """The last round is reported with the summary."""
        if isinstance(record, Started) and not record.round:
            untrained.update(_before(record.metrics))
            tune.report(_progress(0, rounds, record.metrics, kind))
        if isinstance(record, RoundDone) and record.scores and record.row.round + 1 != rounds:
            scores = {**overall(record.scores), **untrained}
            tune.report(_progress(record.row.round + 1, rounds, scores, kind))

    with open_place(out, notify, resume=True) as place:
        done = None
        if (place.path / "config.yaml").exists():
            done = summary_of(place.path, job.config, same)
            check_inputs(place.path, job.dataset.fingerprint, job.code, job.begun)
        if done is None:
            folder = opened(place, job.config, same)
            if (first := folder.beginning()) is not None:
                untrained.update(_before(overall(first.scores)))
            done = carry_out(job, shared, folder, notify, began, crew=_CREW)
        summary = done
        tune.report(_end(summary, kind, place.path, sweep.search.score))


def _before(metrics: Mapping[str, float]) -> dict[str, float]:
    """Scores of the untrained model by their names in a summary."""
    return {f"{name}_before": score for name, score in metrics.items()}


def _progress(round: int, rounds: int, metrics: Mapping[str, float], kind: str) -> dict[str, Any]:
    return {"rounds": round, "of_rounds": rounds, "finished": False, **_whole(metrics, kind)}


def _whole(metrics: Mapping[str, float], kind: str) -> dict[str, float]:
    """The scores with NaN for those that are not defined, which Tune's searchers and schedulers look for."""
    missing = [name for name in SCORES_OF[kind] if name in UNDEFINED and name not in metrics]
    return {**dict.fromkeys(missing, math.nan), **metrics}


def _end(summary: Summary, kind: str, folder: Path, score: str) -> dict[str, Any]:
    """The last report; score: of the curve."""
    reported = asdict(summary)
    points = [(p.rounds, p.scores.get(score), p.bytes, p.seconds, p.joules) for p in curve(folder)]
    sent = {CURVE: json.dumps(points), "sent_bytes": summary.uplink_bytes + summary.downlink_bytes}
    sent |= {name: reported[name] for name in (*SENT, "weights_sha256")}
    clock = summary.simulated
    if clock is not None:
        hours = clock["seconds"] / 3600
        sent |= {name: hours if name == "simulated_hours" else clock[name] for name in CLOCKED}
    return {
        "rounds": summary.rounds,
        "of_rounds": summary.rounds,
        "finished": True,
        **_whole(summary.metrics, kind),
        **sent,
    }
