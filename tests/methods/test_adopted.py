"""Fields of a file's method after `method.name` is changed on the command line: kept if the new method has them, else
named."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from rayfed_sub import run
from rayfed_sub.cli import main
from rayfed_sub.config.loading import load_config
from rayfed_sub.core.errors import UserError
from rayfed_sub.methods import adopted, build, shared_fields
from rayfed_sub.methods.fedit import FedIT
from rayfed_sub.runtime import session
from rayfed_sub.telemetry.events import Notice

TINY = str(Path(__file__).parents[2] / "experiments" / "tiny.yaml")
FILE = {"method": {"name": "fedftg", "rank": 4, "scale": 2.0, "moments": "reset", "optimizer_state": "reset"}}
LINE = "left out, for fedit has no such field: method.scale, method.moments"


def changed(*overrides: str) -> Any:
    return load_config(FILE, ["method.name=fedit", *overrides])


def test_common_fields_are_kept_and_the_others_are_named() -> None:
    assert shared_fields({"rank": 4, "scale": 2.0, "moments": "reset"}, "fedit") == ({"rank": 4}, ("scale", "moments"))
    config, line = adopted(changed())
    assert config.method == {"name": "fedit", "rank": 4, "optimizer_state": "reset"}
    assert line == LINE
    assert build(config.method) == build(changed().method) == FedIT(rank=4, optimizer_state="reset")


def test_no_field_is_dropped_if_the_method_stays_or_is_replaced_as_a_whole() -> None:
    for config in (load_config(FILE), load_config(FILE, ["method.name=fedftg"]), changed("method={name: fedit}")):
        assert adopted(config) == (config, "")
    config, line = adopted(load_config({"method": {"name": "fedit", "rank": 4}}, ["method.name=fed-sb"]))
    assert (config.method, line) == ({"name": "fed-sb", "rank": 4}, "")


def test_field_on_the_command_line_is_not_dropped() -> None:
    config, line = adopted(changed("method.scale=3"))
    assert line == "left out, for fedit has no such field: method.moments"
    with pytest.raises(UserError, match=r"^method\.scale: got 3; allowed: these keys here: rank, alpha"):
        build(config.method)


def test_invalid_value_for_the_new_method_is_refused() -> None:
    file = {"method": {"name": "fedit", "optimizer_state": "average"}}
    with pytest.raises(UserError, match=r"^method\.optimizer_state: got 'average'; allowed: keep or reset"):
        build(load_config(file, ["method.name=fedftg"]).method)


@pytest.mark.parametrize("name", ["fedit", "rolora"])
def test_renamed_field_is_refused_and_not_dropped(name: str) -> None:
    """rolora has no optimizer_state either."""
    config = load_config({"method": {"name": "fedftg", "state": "keep"}}, [f"method.name={name}"])
    for take in (adopted, lambda config: build(config.method)):
        with pytest.raises(UserError) as caught:
            take(config)
        assert str(caught.value) == (
            "method.state: got 'keep'; allowed: method.optimizer_state, which replaces it; "
            "set method.optimizer_state instead"
        )


def test_run_reports_dropped_fields_to_its_listener_or_as_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    monkeypatch.setattr(session, "_run", lambda config, *rest: ran.append(config))
    records: list[object] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(changed(), listener=records.append)
        run(load_config(FILE))
    assert records == [Notice(LINE)]
    assert [config.method["name"] for config in ran] == ["fedit", "fedftg"]
    assert ran[0].method == {"name": "fedit", "rank": 4, "optimizer_state": "reset"}
    with pytest.warns(UserWarning, match="has no such field: method.scale, method.moments") as caught:
        run(changed())
    assert caught[0].filename == __file__


@pytest.mark.slow
def test_plan_reports_dropped_fields(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["rayfed-sub", "plan", TINY, "method.name=fedit", "task.max_rows=120", "--json"])
    with pytest.raises(SystemExit) as ended:
        main.main()
    out, err = capsys.readouterr()
    assert ended.value.code == 0
    assert err == "rayfed-sub: left out, for fedit has no such field: method.refresh_every\n"
    planned = json.loads(out)
    assert planned["method"] == "fedit"
    ranks = {row["method"]: row["rank"] for row in planned["methods"]}
    assert (ranks["fedit"], ranks["fedavg"], ranks["hetlora"]) == (4, None, 4)
