"""Every rule on rows that show its alert and on rows that do not; healthy runs show none."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest

from rayfed_sub.config.schema import Config, Device, Devices, Federation
from rayfed_sub.core.schemas import ClientLayer, CohortLayer, RoundRow
from rayfed_sub.diagnostics.alerts import BY_METHOD, Alert, alerts
from rayfed_sub.methods import METHODS, class_of


def config(method: str = "fedftg", **optimizer: Any) -> Config:
    return Config.model_validate({"method": {"name": method}, "optimizer": optimizer})


def rounds(held_out: list[float | None], loss: list[float | None] | None = None, **figures: Any) -> list[RoundRow]:
    """One row per held-out loss; a figure is one value for all rows or a list."""
    rows = []
    for n, judged in enumerate(held_out):
        row = RoundRow(
            round=n,
            clients=8,
            failed=0,
            loss=judged if loss is None else loss[n],
            held_out_loss=judged,
            uplink_bytes=0,
            downlink_bytes=0,
            labels=100,
            change_rank=None,
            epsilon=None,
            train_seconds=1.0,
            seconds=1.0,
        )
        rows.append(replace(row, **{k: v[n] if isinstance(v, list) else v for k, v in figures.items()}))
    return rows


def layers(diagnosed: int = 3, **figures: Any) -> list[CohortLayer]:
    """Three layers of 64 x 172 in each of so many rounds of a healthy run, with `figures` replaced: one value for all,
    a list over rounds, or a tuple over layers."""
    healthy = {"rank": 48, "rank_sum": 64, "truncated": 0.2, "cross_term": 0.04, "agreement": 0.2, "drift": 1.4}
    rows = []
    for n in range(diagnosed):
        for i, layer in enumerate("abc"):
            own = {
                name: value[n] if isinstance(value, list) else value[i] if isinstance(value, tuple) else value
                for name, value in (healthy | figures).items()
            }
            rest = {
                "stable_rank": 2.0,
                "effective_rank": 20.0,
                "overlap": 0.4,
                "accumulated": None,
                "server_rank": None,
            }
            rows.append(CohortLayer(n, layer, 8, norm=1.0, spectrum=(), full_rank=64, **{**rest, **own}))
    return rows


def clients(energy: float | None, diagnosed: int = 3) -> list[ClientLayer]:
    return [
        ClientLayer(n, k, "a", 1.0, 8, 2.0, 6.0, 0.5, 1.0, None, energy if k == 0 else None, 20.0, ())
        for n in range(diagnosed)
        for k in range(8)
    ]


PHONE = Device(seconds_per_step=1.0)
FALLING: list[float | None] = [3.6, 3.4, 3.3, 3.2, 3.1, 3.05]
STILL: list[float | None] = [3.0, 2.9, 2.895, 2.9, 2.899, 2.897]


def names(found: list[Alert]) -> list[str]:
    assert all("\n" not in alert.text for alert in found)
    return [alert.name for alert in found]


def only(found: list[Alert], name: str) -> str:
    assert names(found) == [name]
    return found[0].text


# Healthy runs.

REAL = {
    # stories260K on the standard library's docs, eight clients by module: medians over five layers of 172 x 64.
    "fedftg": {
        "held_out": [3.6344, 3.4594, 3.2897, 3.1826, 3.1358, 3.0784, 3.0322, 2.9995],
        "loss": [4.0601, 3.7789, 3.5487, 3.2132, 3.1220, 3.1967, 2.9606, 2.9960],
        "agreement": [0.213, 0.214, 0.208, 0.176, 0.118, 0.081, 0.057, 0.033],
        "drift": [1.413, 1.363, 1.380, 1.492, 1.755, 1.889, 2.047, 2.198],
        "rank": 64,
        "truncated": [0.339, 0.316, 0.310, 0.325, 0.377, 0.420, 0.449, 0.482],
    },
    "fedit": {
        "held_out": [3.3563, 3.1531, 3.0080, 2.9041, 2.8472, 2.7894],
        "loss": [3.8797, 3.1907, 2.9599, 2.8862, 2.8090, 2.6202],
        "agreement": [0.326, 0.254, 0.146, 0.078, 0.049, 0.023],
        "drift": [1.123, 1.260, 1.589, 1.875, 2.090, 2.334],
        "rank": 64,
        "truncated": [0.126, 0.055, 0.041, 0.034, 0.029, 0.028],
        "cross_term": [0.150, 0.062, 0.045, 0.037, 0.033, 0.031],
    },
}


@pytest.mark.parametrize("method", REAL)
def test_real_healthy_runs_have_no_alerts(method: str) -> None:
    """At any round, with memory that grows in the first three, one retry and one skipped client.  The reported full
    rank is correct: eight clients of rank 8 fill a layer of rank 64."""
    figures: dict[str, Any] = dict(REAL[method])
    held_out, loss = figures.pop("held_out"), figures.pop("loss")
    memory = [10**9, 14 * 10**8, 15 * 10**8] + [15 * 10**8 + n % 2 for n in range(len(held_out) - 3)]
    rows = rounds(held_out, loss, memory_bytes=memory, retries=[1] + [0] * (len(held_out) - 1))
    rows[2] = replace(rows[2], failed=1)
    layer_rows = layers(len(held_out), **figures)
    for n in range(1, len(rows) + 1):
        seen = [row for row in layer_rows if row.round < n]
        found = alerts(rows[:n], seen, clients(0.85, n), config(method), before=4.4972, planned=14 * 10**8)
        assert names(found) == (["full rank"] if method == "fedftg" and n >= 3 else [])


def test_missing_rows_give_no_alert() -> None:
    assert alerts([], [], [], config()) == []
    assert alerts(rounds([None, None, None, None]), [], [], config()) == []


# The loss.


def test_divergence_is_reported_after_two_bad_evaluations() -> None:
    """Best 2.0; 2.11 is 5.5 % above it, 2.09 only 4.5 %."""
    assert alerts(rounds([2.5, 2.0, 2.2, 2.09]), [], [], config()) == []
    assert alerts(rounds([2.5, 2.0, 2.05, 2.2]), [], [], config()) == []
    text = only(alerts(rounds([2.5, 2.0, 2.11, 2.2]), [], [], config(lr=0.1)), "divergence")
    assert "2.2 after round 4, 10% above its best 2" in text
    assert "optimizer.lr=0.1 or federation.local_steps" in text


def test_falling_training_loss_means_overfitting() -> None:
    rows = rounds([2.5, 2.0, 2.3, 2.4], [2.5, 2.0, 1.5, 1.2])
    assert "clients overfit; end earlier (federation.rounds)" in only(alerts(rows, [], [], config()), "divergence")


def test_small_loss_can_fluctuate() -> None:
    """0.010 to 0.012 is 20 % up, and 0.002 nats."""
    assert alerts(rounds([0.5, 0.010, 0.012, 0.012]), [], [], config()) == []


def test_divergence_from_the_first_round_on_is_one_alert() -> None:
    text = only(alerts(rounds([5.0, 5.5, 6.0]), [], [], config(), before=4.0), "divergence")
    assert "50% above its best 4" in text


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ([3.0, 3.0, 3.0, 3.0], "the training loss stands still: steps are too short; raise optimizer.lr=1e-05"),
        ([3.0, 3.1, 3.2, 3.3], "the training loss rises by 10.0%: lower optimizer.lr=1e-05"),
        ([3.0, 2.9, 2.8, 2.7], "falls by 10.0%: what clients learn of their own rows does not carry over"),
    ],
)
def test_no_progress_and_its_causes(loss: list[float | None], words: str) -> None:
    """2.99 is 0.33 % below 3.0, less than the 0.5 % that count."""
    found = alerts(rounds([3.0, 2.99, 3.0, 3.01], loss), [], [], config(lr=1e-5))
    text = only(found, "no progress")
    assert words in text
    assert "held-out loss is 3.01 after round 4, at best 2.99, was 3: no progress" in text


def test_one_percent_is_progress_and_a_tiny_loss_is_exempt() -> None:
    assert alerts(rounds([3.0, 2.99, 2.97]), [], [], config()) == []
    assert alerts(rounds([0.01, 0.01, 0.01]), [], [], config()) == []


def test_progress_is_measured_against_the_loss_before_training() -> None:
    """A run that converges in its first round makes no progress afterwards."""
    flat = rounds([2.0, 2.0, 2.0])
    assert names(alerts(flat, [], [], config())) == ["no progress"]
    assert alerts(flat, [], [], config(), before=4.0) == []
    assert names(alerts(flat, [], [], config(), before=2.001)) == ["no progress"]


def test_no_progress_needs_three_evaluations_after_warm_up() -> None:
    assert alerts(rounds([3.0, None, 3.0]), [], [], config()) == []
    assert names(alerts(rounds([3.0, None, 3.0, None, 3.0]), [], [], config())) == ["no progress"]
    assert alerts(rounds([3.0, 3.0, 3.0]), [], [], config(warmup_rounds=2)) == []


# Diagnostics.


def test_client_drift() -> None:
    apart = layers(6, agreement=-0.02, drift=2.9)
    text = only(alerts(rounds(STILL), apart, [], config()), "client drift")
    assert "mean cosine -0.02" in text
    assert "2.9 times its length" in text
    assert "federation.local_steps (T_agg)" in text
    assert "federation.proximal" in text
    assert alerts(rounds(FALLING), apart, [], config()) == []  # the loss still falls
    assert alerts(rounds(STILL), layers(6, agreement=0.1), [], config()) == []  # the clients agree
    assert alerts(rounds(STILL), layers(6, agreement=[0, 0, 0, 0, 0.1, 0]), [], config()) == []  # not in every round
    assert alerts(rounds(STILL), layers(6, agreement=(0.0, 0.2, 0.1)), [], config()) == []  # not in most layers
    assert alerts(rounds(STILL), layers(2, agreement=0.0), [], config()) == []  # only two rounds
    assert alerts(rounds(STILL), layers(6, agreement=None, drift=None), [], config()) == []  # one client


def test_large_cross_term() -> None:
    method = "fedit"
    text = only(alerts(rounds(FALLING), layers(cross_term=0.25), [], config(method)), "cross term")
    assert f"{method} averages B and A apart, which misses 25%" in text
    assert "method.name=fedex-lora or ffa-lora" in text
    assert alerts(rounds(FALLING), layers(cross_term=0.09), [], config(method)) == []
    assert alerts(rounds(FALLING), layers(cross_term=[0.25, 0.25, 0.09]), [], config(method)) == []
    assert alerts(rounds(FALLING), layers(cross_term=(0.9, 0.05, 0.05)), [], config(method)) == []
    assert alerts(rounds(FALLING), layers(cross_term=(0.3, 0.3, 0.0)), [], config(method)) != []


def test_zero_and_non_finite_losses() -> None:
    text = only(alerts(rounds([0.5, 0.0, 0.05, 0.06]), [], [], config("fedavg")), "divergence")
    assert "held-out loss is 0.06 after round 4, above its best, 0" in text
    assert alerts(rounds([3.0, 2.0, float("inf"), float("inf")]), [], [], config("fedavg")) == []


def test_methods_name_existing_rules() -> None:
    named = {rule for name in METHODS for rule in getattr(class_of(name), "alerts", ())}
    assert named == set(BY_METHOD)


def test_exact_methods_have_no_cross_term_alert() -> None:
    assert alerts(rounds(FALLING), layers(cross_term=0.9), [], config("flora")) == []


def test_truncation() -> None:
    text = only(alerts(rounds(FALLING), layers(truncated=0.4), [], config("flexlora")), "truncation")
    assert "loses 40% of its norm" in text
    assert "raise method.rank" in text
    assert alerts(rounds(FALLING), layers(truncated=0.29), [], config("flexlora")) == []
    assert alerts(rounds(FALLING), layers(truncated=0.4), [], config("fedftg")) == []  # which does not truncate


def test_full_rank() -> None:
    text = only(alerts(rounds(FALLING), layers(rank=(64, 64, 60)), [], config()), "full rank")
    assert "full rank (64, median over layers) in 67% of the layers" in text
    assert alerts(rounds(FALLING), layers(rank=(64, 60, 60)), [], config()) == []
    assert alerts(rounds(FALLING), layers(rank=64), [], config("ffa-lora")) == []  # which uploads one factor
    assert alerts(rounds(FALLING), layers(rank=None), [], config()) == []


def test_gradients_that_are_not_low_rank() -> None:
    text = only(alerts(rounds(FALLING), layers(), clients(0.22), config()), "gradients")
    assert "hold 22% of its squared norm" in text
    assert "raise method.rank or lower method.refresh_every" in text
    assert alerts(rounds(FALLING), layers(), clients(0.31), config()) == []
    assert alerts(rounds(FALLING), layers(), clients(0.22), config("ffa-lora")) == []  # a fixed basis
    assert alerts(rounds(FALLING), layers(), clients(None), config()) == []


# Machines.


def test_more_memory_than_planned() -> None:
    rows = rounds(FALLING, memory_bytes=[10**9, 13 * 10**8, None, 10**9, 10**9, 10**9])
    text = only(alerts(rows, [], [], config(), planned=10**9), "memory")
    assert "took 1.3 GB, 30% more than the planned 1.0 GB" in text
    assert "resources.pack_size" in text
    assert alerts(rows, [], [], config(), planned=11 * 10**8) == []  # 18 % more
    assert alerts(rows, [], [], config()) == []  # nothing planned


def test_memory_that_grows() -> None:
    growing = [10**9 + n * 10**8 for n in range(7)]
    falling: list[float | None] = [4 - n / 10 for n in range(7)]
    text = only(alerts(rounds(falling, memory_bytes=growing), [], [], config()), "memory growth")
    assert "from 1.0 GB to 1.6 GB" in text
    assert "resources.state_memory" in text
    wobbling = [*growing[:5], growing[3], growing[6]]
    assert alerts(rounds(falling, memory_bytes=wobbling), [], [], config()) == []
    slowly = [10**9 + n * 10**7 for n in range(7)]  # 6 % in all
    assert alerts(rounds(falling, memory_bytes=slowly), [], [], config()) == []
    assert alerts(rounds(falling[:6], memory_bytes=growing[:6]), [], [], config()) == []  # five times


def test_skipped_clients() -> None:
    """6 rounds of 8 clients are 48; 5 are more than a tenth, 4 are not."""
    text = only(alerts(rounds(FALLING, failed=[1, 1, 1, 1, 1, 0]), [], [], config(lr=0.5)), "skipped clients")
    assert "5 of 48 clients' rounds were skipped" in text
    assert "optimizer.lr=0.5" in text
    assert alerts(rounds(FALLING, failed=[1, 1, 1, 1, 0, 0]), [], [], config()) == []
    assert alerts(rounds([3.0, 2.9], failed=[2, 1]), [], [], config()) == []  # too few


def test_rounds_without_any_update() -> None:
    """Nobody trained, so nothing is said of the steps' lengths.  A round whose clients all failed is another alert's,
    as are rounds in which some updates counted."""
    still: list[float | None] = [3.0] * 4
    clocked = {"federation": Federation(round_deadline=2.5), "devices": Devices(classes={"phone": PHONE})}
    late = config().model_copy(update=clocked)
    text = only(alerts(rounds(still, [None] * 4), [], [], late), "dropped clients")
    assert text.startswith("in 4 of 4 rounds no update counted")
    assert text.endswith("; raise federation.round_deadline=2.5 or lower federation.local_steps")
    gone = PHONE.model_copy(update={"hours": ((0.0, 1.0),), "dropout": 0.5})
    leaving = config().model_copy(update={"devices": Devices(classes={"phone": gone})})
    text = only(alerts(rounds(FALLING, [None, 3.0, None, None, None, 3.0]), [], [], leaving), "dropped clients")
    assert text.endswith(
        "; lengthen the hours of devices.classes or lower the dropout of devices.classes or lower "
        "federation.local_steps"
    )
    assert alerts(rounds(FALLING, [None, 3.0, None, None, 3.0, 3.0]), [], [], leaving) == []  # half of them
    assert alerts(rounds(still[:2], [None] * 2), [], [], late) == []  # too few
    assert names(alerts(rounds(still, [None] * 4, failed=8), [], [], late)) == ["skipped clients"]


def test_retries() -> None:
    text = only(alerts(rounds(FALLING, retries=[2, 2, 0, 0, 0, 0]), [], [], config()), "retries")
    assert "again 4 times in 6 rounds" in text
    assert "resources.deadline" in text
    assert alerts(rounds(FALLING, retries=[2, 1, 0, 0, 0, 0]), [], [], config()) == []
    many: list[float | None] = [4 - n / 10 for n in range(8)]
    assert alerts(rounds(many, retries=[2, 2] + [0] * 6), [], [], config()) == []  # every second round


# Rows of tables.


def test_rows_with_missing_values_are_accepted() -> None:
    """A Parquet file gives NaN or NA for missing values, and numpy's numbers."""
    rows = rounds([3.0, None, 3.0, None, 3.0], [3.0, 3.0, None, 3.0, 3.0], memory_bytes=[10**9, None] + [2 * 10**9] * 3)
    layer_rows = layers(5, cross_term=(0.3, None, 0.2), drift=None)
    table = [pd.DataFrame(rows), pd.DataFrame(layer_rows).astype({"rank": "Int64"}), pd.DataFrame(clients(None))]
    read: list[Any] = [list(frame.itertuples()) for frame in table]
    assert math.isnan(read[0][1].held_out_loss)
    found = alerts(read[0], read[1], read[2], config("fedit"), before=float("nan"), planned=10**9)
    assert found == alerts(rows, layer_rows, clients(None), config("fedit"), planned=10**9)
    assert names(found) == ["no progress", "cross term", "memory"]


def test_rows_of_an_older_run_have_no_full_rank_alert() -> None:
    assert alerts(rounds(FALLING), [replace(row, full_rank=0, rank=64) for row in layers()], [], config()) == []


def test_most_severe_alert_comes_first() -> None:
    found = alerts(rounds([3.0, 3.5, 3.6]), layers(agreement=0.0), clients(0.1), config(), planned=None)
    assert names(found) == ["divergence", "client drift", "gradients"]
