"""The cluster of cluster.yaml, started, lost and ended by Ray itself on this machine (tests/slow/rayup)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slow.rayup.__main__ import missing, play


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_cluster_starts_survives_and_stops(tmp_path: Path) -> None:
    why_not = missing()
    if why_not is not None:
        pytest.skip(why_not)
    assert play(tmp_path) == 0
