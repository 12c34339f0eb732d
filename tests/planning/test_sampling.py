"""Cohorts, local steps and learning rates: pure functions of configuration and seed."""

from __future__ import annotations

import math

import pytest

from rayfed_sub.config.loading import load_config
from rayfed_sub.config.schema import Config
from rayfed_sub.core.errors import UserError
from rayfed_sub.planning.sampling import cohort, every_local_steps, learning_rate, local_steps


def config(**federation: object) -> Config:
    return load_config({"federation": {"clients": 50, **federation}})


def test_cohort_is_sorted_distinct_and_of_the_configured_size() -> None:
    drawn = [cohort(config(sampled=10), n) for n in range(20)]
    assert all(clients == sorted(set(clients)) and len(clients) == 10 for clients in drawn)
    assert drawn[0] != drawn[1]
    assert drawn == [cohort(config(sampled=10), n) for n in range(20)]
    assert cohort(config(), 3) == list(range(50))


def test_clients_are_unavailable_at_the_configured_rate() -> None:
    """200 rounds of 50 clients at availability 0.7: 7,000 expected, standard deviation sqrt(10,000 * 0.21) = 46."""
    present = sum(len(cohort(config(availability=0.7), n)) for n in range(200))
    assert abs(present - 7000) < 4 * 46
    assert cohort(config(availability=0.7), 5) == cohort(config(availability=0.7), 5)


def test_local_steps_by_number_list_and_range() -> None:
    assert [local_steps(config(local_steps=3), k) for k in range(3)] == [3, 3, 3]
    assert [local_steps(config(local_steps=[1, 5]), k) for k in range(4)] == [1, 5, 1, 5]
    drawn = [local_steps(config(local_steps={"low": 2, "high": 4}), k) for k in range(50)]
    assert set(drawn) == {2, 3, 4}
    assert drawn == [local_steps(config(local_steps={"low": 2, "high": 4}), k) for k in range(50)]
    for steps in (3, [1, 5, 2], {"low": 2, "high": 4}):
        of_all = config(local_steps=steps)
        each = [local_steps(of_all, k) for k in range(of_all.federation.clients)]
        assert every_local_steps(of_all).tolist() == each


def test_reversed_range_is_refused() -> None:
    with pytest.raises(UserError, match="high"):
        config(local_steps={"low": 4, "high": 2})


def test_learning_rates_over_rounds() -> None:
    def rates(rounds: int, **optimizer: object) -> list[float]:
        asked = load_config({"federation": {"rounds": rounds}, "optimizer": {"lr": 2.0, **optimizer}})
        return [learning_rate(asked, n) for n in range(rounds)]

    assert rates(3) == [2.0, 2.0, 2.0]
    assert rates(4, schedule="linear", final_lr_ratio=0.5) == [2.0, 1.75, 1.5, 1.25]
    assert rates(2, schedule="cosine") == pytest.approx([2.0, 1.0])  # 1 + cos(pi / 2)
    # Two rounds of warm-up: 1/3 and 2/3 of the rate, then two rounds towards zero.
    assert rates(4, schedule="linear", warmup_rounds=2) == pytest.approx([2 / 3, 4 / 3, 2.0, 1.0])
    assert rates(4, schedule="cosine")[1] == pytest.approx(1 + math.cos(math.pi / 4))
