"""Settings under which updates of asynchronous clients are of no use."""

from __future__ import annotations

import pytest

from rayfed_sub.config.schema import Asynchronous, Config, Federation
from rayfed_sub.core.errors import UserError
from rayfed_sub.core.types import Layer, ModelShape
from rayfed_sub.methods import build
from rayfed_sub.methods.stale_updates import check_asynchronous

SHAPE = ModelShape((Layer("up", 8, 8),))


def checked(rule: Asynchronous, memory: str) -> None:
    fields = {"name": "fedit", "optimizer_state": memory}
    config = Config(method=fields, federation=Federation(mode="async", asynchronous=rule))
    check_asynchronous(config, build(fields), SHAPE)


@pytest.mark.parametrize(
    ("rule", "changes"), [(Asynchronous(buffer=2), ["fedftg", "flora"]), (Asynchronous(rule="fedasync"), [])]
)
def test_methods_that_are_named_in_place_of_another_are_not_refused_themselves(
    rule: Asynchronous, changes: list[str]
) -> None:
    """FedAsync mixes values: of those that send changes alone it refuses all."""
    federation = Federation(mode="async", asynchronous=rule)
    fields = {"name": "hetlora"}
    with pytest.raises(UserError, match="for the server that clients began from; or choose one of") as caught:
        check_asynchronous(Config(method=fields, federation=federation), build(fields), SHAPE)
    named = caught.value.advice.removeprefix("or choose one of ").split(", ")
    assert [name for name in named if name in ("fedftg", "flora")] == changes
    for name in named:
        check_asynchronous(Config(method={"name": name}, federation=federation), build({"name": name}), SHAPE)


def test_moments_of_clients_that_come_one_by_one_have_no_average() -> None:
    """Every update would put its own moments in the place of the server's; the mean of a buffer is an average."""
    for how, rule in {
        "rule=fedasync": Asynchronous(rule="fedasync"),
        "buffer=1": Asynchronous(buffer=1),
    }.items():
        with pytest.raises(UserError) as caught:
            checked(rule, "average")
        assert str(caught.value) == (
            f"method.optimizer_state: got 'average'; allowed: keep or reset with federation.asynchronous.{how}, "
            "by which one client's would replace the average; set method.optimizer_state=keep"
        )
        checked(rule, "keep")
    checked(Asynchronous(buffer=2), "average")
