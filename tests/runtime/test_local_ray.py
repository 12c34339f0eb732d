"""Ray's start for a run alone."""

from __future__ import annotations

from typing import Any

import pytest

from rayfed_sub.core.errors import RunError
from rayfed_sub.runtime import local_ray


def test_ray_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(**how: Any) -> None:
        raise Exception("The current node timed out during startup.\nAnd much more.")

    monkeypatch.setattr(local_ray.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(local_ray.ray, "init", late)
    said = r"^start of Ray: The current node timed out during startup\.$"
    with pytest.raises(RunError, match=said), local_ray.ray_session():
        pass
