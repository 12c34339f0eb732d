"""The two ways to say no: one line each, and whole after a process border."""

from __future__ import annotations

import pickle

import pytest
from pydantic import BaseModel, model_validator

from rayfed_sub.errors import RunError, UserError
from rayfed_sub.faults import check

USER = UserError("task.prompt", "{a}\n{b}", "a template", "see\n  the manual")
RUN = RunError("local training", "the loss is not finite", round=3, client=17)


def test_a_user_error_is_one_line_of_field_value_allowed_and_advice() -> None:
    assert str(USER) == r"task.prompt: got '{a}\n{b}'; allowed: a template; see the manual"
    assert str(UserError("seed", -1, "an integer >= 0")) == "seed: got -1; allowed: an integer >= 0"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RUN, "round 3, client 17, local training: the loss is not finite"),
        (RunError("start", "no workers"), "start: no workers"),
        (RunError("x", "y", round=0), "round 0, x: y"),
        (RunError("x", "y", client=0), "client 0, x: y"),
    ],
)
def test_a_run_error_names_round_client_stage_and_cause(error: RunError, text: str) -> None:
    assert str(error) == text


@pytest.mark.parametrize("error", [USER, RUN, RunError("start", "no workers")], ids=["user", "run", "run, bare"])
def test_errors_survive_a_process_border(error: Exception) -> None:
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back) == vars(error)


def test_a_user_error_is_a_value_error_and_a_run_error_a_runtime_error() -> None:
    """What a program that calls us may catch without knowing us."""
    assert isinstance(USER, ValueError)
    assert isinstance(RUN, RuntimeError)


class Part(BaseModel):
    on: str = "off"


class Whole(BaseModel):
    part: Part = Part(on="half")

    @model_validator(mode="after")
    def _never(self) -> Whole:
        raise ValueError("part.on|nothing|give up")


@pytest.mark.parametrize(("tree", "value"), [({"part": {"on": "full"}}, "full"), ({"part": {}}, "off"), ({}, "half")])
def test_a_check_of_two_sections_tells_the_value_or_the_default(tree: dict[str, object], value: str) -> None:
    with pytest.raises(UserError) as caught:
        check(Whole, tree, "top")
    assert str(caught.value) == f"top.part.on: got '{value}'; allowed: nothing; give up"
