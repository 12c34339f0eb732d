"""What the caller's own methods give, held against what they were given."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from rayfed_sub.core.errors import RunError
from rayfed_sub.core.types import Broadcast, LocalResult, ModelShape, Tensors
from rayfed_sub.methods.fedit import FedIT
from rayfed_sub.methods.own_failures import Reported


class Keeps(FedIT):
    name: ClassVar[str] = "keeps"

    def client_state(self, broadcast: Broadcast, result: LocalResult, shape: ModelShape) -> Tensors:
        return {"kept": result.moments["a/square"] * 2}


@pytest.mark.parametrize(("moment", "blames"), [(float("inf"), False), (3e38, True)])
def test_method_is_blamed_for_what_it_makes_of_finite_numbers(moment: float, blames: bool) -> None:
    """Not for Adam's moments that have overflowed: that is the client's failure."""
    result = LocalResult(3, {}, {"a/square": torch.tensor([moment])}, 1, {}, 1.0, 1, {})
    broadcast: Any = Broadcast(2, {})
    method = Reported(Keeps(rank=2))
    if not blames:
        assert not torch.isfinite(method.client_state(broadcast, result, ModelShape(()))["kept"]).any()
        return
    with pytest.raises(RunError, match=r"^round 2, client 3, method keeps\.client_state: it gives non-finite values"):
        method.client_state(broadcast, result, ModelShape(()))
