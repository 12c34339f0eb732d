"""The proof on a GPU, rehearsed on a processor: what it compares, what it keeps, where it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from experiments.benchmarks import gpu
from experiments.benchmarks.gpu_work import (
    Engine,
    batches,
    begun,
    installed,
    llama,
    moved,
    plain_model,
    planned,
    rule_of,
    trained,
    with_galore,
    with_peft,
    works_of,
)
from rayfed_sub.core.devices import meta_as
from tests.helpers.bare_site import bare_site
from tests.helpers.second_device import SecondDevice

ROOT, CPU = Path(__file__).parents[2], torch.device("cpu")


@cache
def architecture():
    return llama(gpu.REHEARSAL.small, torch.float32)


@cache
def here() -> Engine:
    return installed(architecture(), plain_model(architecture(), CPU))


@pytest.mark.parametrize("name", ["fedit", "fedftg", "fedavg", "fed-sb"])
def test_another_device_s_numbers_are_compared(name: str) -> None:
    """A device that rounds weights to bfloat16 is far outside the limit; the processor itself is at no distance."""
    model = plain_model(architecture(), CPU)
    same = gpu._equal(gpu.method_named(name), here(), installed(architecture(), model))
    assert same["furthest"] == 0
    rough = plain_model(architecture(), CPU)
    for parameter in rough.parameters():
        parameter.data = parameter.data.bfloat16().float()
    other = gpu._equal(gpu.method_named(name), here(), installed(architecture(), rough))
    assert min(other["first round"], other["second round"]) > gpu.EQUAL


@pytest.mark.parametrize("name", ["fedit", "fedftg"])
def test_a_round_mixes_no_devices(name: str) -> None:
    """The work that the sections share, on a second device: the losses are read once, an eigenproblem asks once a
    layer."""
    method = gpu.method_named(name)
    with meta_as("cuda"):
        there = moved(architecture(), plain_model(architecture(), CPU), torch.device("meta"))
        given = {k: batches(64, k, 2, 2, 12) for k in range(2)}
        received = begun(there, method)
        with SecondDevice() as device:
            trained(there, received, works_of(there, method, received, given), rule_of())
    own = {where: n for where, n in device.seen.reads.items() if n}
    assert sum(n for where, n in own.items() if "executor.py" in where) == 1
    assert sum(own.values()) == 1 + (len(there.shape.targets) if name == "fedftg" else 0)


@pytest.mark.parametrize("make", [with_peft, with_galore])
def test_one_by_one_every_client_begins_anew(make) -> None:
    others, given = make(architecture(), CPU), batches(64, 0, 2, 2, 12)
    begun_with = [tensor.clone() for tensor in others.begun]
    once, again = others.train(given), others.train(given)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(once, begun_with, strict=True))
    assert len(once) == len(others.moving) > 0


def test_a_plan_grows_with_the_pack() -> None:
    method, given = gpu.method_named("fedit"), batches(64, 0, 1, 2, 12)
    few, many = (planned(architecture(), method, pack, given) for pack in (2, 8))
    assert 2 * few < many < 5 * few


def test_every_row_is_kept_and_a_section_s_failure_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, seen = tmp_path / "found.json", []

    def torn(own: gpu.Section) -> None:
        own.add(lambda: {"number": 1}, name="first")
        seen.append(json.loads(out.read_text())["sections"]["torn"]["rows"])
        own.add(lambda: {}["lost"], name="second")
        raise ValueError("broken")

    def late(own: gpu.Section) -> None:
        own.add(lambda: {"within": own.left < 0}, name="third")

    monkeypatch.setattr(gpu, "SECTIONS", {"torn": (torn, 0.5), "late": (late, 0.5)})
    record = gpu.run(["torn", "late"], CPU, gpu.REHEARSAL, -1.0, out)
    assert seen == [[{"name": "first", "number": 1}]]
    assert json.loads(out.read_text()) == record
    rows = record["sections"]["torn"]["rows"]
    assert [row.get("error") for row in rows] == [None, "KeyError: 'lost'", "ValueError: broken"]
    assert record["sections"]["late"] == {
        "rows": [{"name": "third", "within": True}],
        "seconds": record["sections"]["late"]["seconds"],
        "whole": False,
    }
    assert len(gpu.failures(record)) == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rehearsal_on_a_bare_machine(tmp_path: Path) -> None:
    """All sections small, with torch and transformers alone, beside galore_torch's own two files."""
    import galore_torch

    site, out = bare_site(tmp_path / "site", "torch", "transformers"), tmp_path / "found.json"
    (site / "galore_torch").symlink_to(Path(galore_torch.__file__).parent)
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    command = ["-S", "-m", "experiments.benchmarks.gpu", "--device", "cpu", "--rehearse", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, *command, "--seconds", "800"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    sections = json.loads(out.read_text())["sections"]
    assert all(section["whole"] for section in sections.values())
    assert sum(row["within"] for row in sections["equal"]["rows"] if "within" in row) == len(gpu.METHODS)
    speed = {row["trains"]: row for row in sections["speed"]["rows"]}
    assert "No module named 'peft'" in speed["peft, one by one"]["not here"]
    assert speed["a pack, fedftg"]["times one by one"] > 0
    assert {row["planned"] > 0 for row in sections["memory"]["rows"]} == {True}
