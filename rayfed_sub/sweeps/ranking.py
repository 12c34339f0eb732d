"""Which trial of a sweep is best."""

from __future__ import annotations

import math

import pandas as pd


def best(frame: pd.DataFrame, metric: str, mode: str) -> int | None:
    """The number of the best trial, None where no trial may be compared."""
    if comparable(frame, metric).isna().all():
        return None
    return int(best_first(frame, metric, mode)["trial"].iloc[0])


def best_first(frame: pd.DataFrame, metric: str, mode: str) -> pd.DataFrame:
    """The trials by merit: finished ones by the metric, then those that the scheduler stopped, then the rest.

    A stopped trial comes after every finished one whatever its metric, which was taken earlier in its run.  The rest
    are trials that failed or whose metric is missing or not finite.  Ties go to the lower number.
    """
    value = comparable(frame, metric)
    rank = (frame["status"] == "stopped").astype("int64").where(value.notna(), 2)
    merit = pd.DataFrame({"rank": rank, "value": {"min": 1, "max": -1}[mode] * value, "trial": frame["trial"]})
    return frame.loc[merit.sort_values(["rank", "value", "trial"]).index]


def comparable(frame: pd.DataFrame, metric: str) -> pd.Series[float]:
    """Each trial's metric as float64, NaN where it cannot be compared: it failed, or its metric is not finite."""
    if metric not in frame:
        return pd.Series(math.nan, index=frame.index)
    value = pd.to_numeric(frame[metric], errors="coerce").astype("float64")
    return value.where(frame["status"].isin(["finished", "stopped"]) & (value.abs() < math.inf))
