"""Curves of finished trials: scores, bytes, simulated seconds and energy at every evaluation, from a run's folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from rayfed_sub.clock.accounts import cost_at, costs
from rayfed_sub.storage.table_parts import place


@dataclass(frozen=True)
class Evaluated:
    """The state after so many finished rounds.  scores: over all held-out rows, by metric; bytes: sent up and down so
    far; seconds: simulated, joules: of training, None where they are not known."""

    rounds: int
    scores: Mapping[str, float]
    bytes: int
    seconds: float | None = None
    joules: float | None = None


def curve(folder: Path) -> list[Evaluated]:
    """Every evaluated state of the finished run in the folder, in order."""
    sent = [0]
    for row in pq.read_table(folder / "rounds.parquet", columns=["uplink_bytes", "downlink_bytes"]).to_pylist():
        sent.append(sent[-1] + row["uplink_bytes"] + row["downlink_bytes"])
    scores: dict[int, dict[str, float]] = {}
    for score in pq.read_table(folder / "scores.parquet").to_pylist():
        if score["client"] is None:
            scores.setdefault(score["rounds"], {})[score["metric"]] = score["value"]
    timeline = place(folder, "timeline")
    if timeline is None:
        return [Evaluated(done, found, sent[done]) for done, found in sorted(scores.items())]
    spent = costs(pq.read_table(timeline).to_pandas())
    at = {done: cost_at(spent, done) for done in scores}
    # The clock's bytes are those of the rounds, at the end with what clients under way had sent.
    return [
        Evaluated(done, found, max(sent[done], at[done].bytes), at[done].seconds, at[done].joules)
        for done, found in sorted(scores.items())
    ]
