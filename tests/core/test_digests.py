"""Digests of values and of code: the same in every process, others for whatever changes what the code does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayfed_sub.core.digests import digest, module_digest

CODE = (
    """
import functools, types
from dataclasses import dataclass
import torch
from torch import nn
SCALE = 0.5
"""
    + (
        "inner = types.ModuleType('inner')\n"
        "exec('FACTOR = 2.0\\ndef scaled(x): return x * FACTOR\\ndef unread(x): return 1', vars(inner))"
    )
    + """
class Options:
    def __init__(self, **held):
        vars(self).update(held)
@dataclass
class Record:
    floor: float
held, record, space = Options(ceiling=9.0), Record(floor=0.0), types.SimpleNamespace(shift=0.25)
@functools.lru_cache
def cached(x):
    return x + 11
KINDS = {"a", "b", "c"}
weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0]))
def helper(x):
    return x * SCALE
def loss(module, batch, power=2):
    x = inner.scaled(weighted(module(batch[0]), batch[1])).clamp(record.floor, held.ceiling) + space.shift
    return helper(x) ** power if "a" in KINDS else cached(0)
def made(rate):
    return lambda module, batch: loss(module, batch) * rate
class Net(nn.Module):
    steps = 3
    def __init__(self, width=4):
        super().__init__()
        self.fc, self.rate, self.seen = nn.Linear(width, 2), 0.1, {"x", "y", "z"}
    def forward(self, x):
        return self.fc(x) * self.rate
    @property
    def size(self):
        return self.steps
"""
)


def defined(source: str, name: str) -> dict[str, Any]:
    space: dict[str, Any] = {"__name__": name}
    exec(compile(source, "<cell>", "exec", dont_inherit=True), space)
    return space


def digests(source: str, name: str = "__main__") -> dict[str, bytes]:
    space = defined(source, name)
    torch.manual_seed(0)
    functions = {name: digest(space[name]) for name in ("loss", "Net")}
    return {**functions, "made": digest(space["made"](0.1)), "module": module_digest(space["Net"]())}


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("return helper", "# in words\n    return helper", set()),
        ("return 1", "return 2", set()),
        ("x * FACTOR", "x / FACTOR", {"loss", "made"}),
        ("FACTOR = 2.0", "FACTOR = 3.0", {"loss", "made"}),
        ("ceiling=9.0", "ceiling=8.0", {"loss", "made"}),
        ("floor=0.0", "floor=0.1", {"loss", "made"}),
        ("shift=0.25", "shift=0.5", {"loss", "made"}),
        ("x + 11", "x + 12", {"loss", "made"}),
        ("** power", "** (power + 1)", {"loss", "made"}),
        ("power=2", "power=3", {"loss", "made"}),
        ("SCALE = 0.5", "SCALE = 0.6", {"loss", "made"}),
        ("x * SCALE", "x + SCALE", {"loss", "made"}),
        ('"c"}', '"d"}', {"loss", "made"}),
        ("[1.0, 2.0]", "[1.0, 3.0]", {"loss", "made"}),
        ("* rate\n", "+ rate\n", {"made"}),
        (
            "self.rate, self.seen = nn.Linear(width, 2), 0.1",
            "self.rate, self.seen = nn.Linear(width, 2), 0.2",
            {"module", "Net"},
        ),
        ("* self.rate", "- self.rate", {"module", "Net"}),
        ("width=4", "width=5", {"module", "Net"}),
        ("steps = 3", "steps = 4", {"module", "Net"}),
        ("return self.steps", "return self.steps + 1", {"module", "Net"}),
    ],
)
def test_code_counts_by_what_it_does(old: str, new: str, changed: set[str]) -> None:
    assert old in CODE
    before, after = digests(CODE), digests(CODE.replace(old, new))
    assert {name for name in before if before[name] != after[name]} == changed


def test_digests_are_the_same_in_every_process(tmp_path: Path) -> None:
    """Sets have another order in each process, and pickles follow it."""
    words = "{" + ", ".join(repr(f"word {i}") for i in range(50)) + "}"
    made = f"{CODE}\nimport argparse\nwide = argparse.Namespace(words={words})\nclass Empty: pass\n"
    shown = "print(digest(loss), digest(made(1)), module_digest(Net()), digest(wide), digest(Empty()))"
    script = tmp_path / "script.py"
    script.write_text(f"{made}from rayfed_sub.core.digests import digest, module_digest\n{shown}\n")
    env = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    there = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, check=True).stdout
    space = defined(made, "__main__")
    values = (space["wide"], space["Empty"]())
    here = (digest(space["loss"]), digest(space["made"](1)), module_digest(space["Net"]()), *map(digest, values))
    assert there.strip() == " ".join(map(str, here))


EQUAL: list[Callable[[], Any]] = [
    lambda: {"x": torch.arange(3), "y": [1, 2.5, None, "é", b"z"]},
    lambda: {"y": [1, 2.5, None, "é", b"z"], "x": torch.arange(6)[:3]},
]


def test_values_count_by_what_they_hold() -> None:
    assert len({digest(make()) for make in EQUAL}) == 1
    different = [
        1,
        True,
        1.0,
        "1",
        b"1",
        None,
        [1],
        (1,),
        {1},
        {"1": 1},
        np.int64(1),
        torch.tensor(1),
        np.array([1]),
        int,
    ]
    different += [
        torch.tensor([1.0]),
        torch.tensor([1.0]).bfloat16(),
        np.array([[1]]),
        partial(int, 1),
        partial(int, 2),
    ]
    assert len({digest(value) for value in different}) == len(different)
    endless: list[Any] = [1]
    endless.append(endless)
    assert digest(endless) != digest([1])
