"""What only a GPU can show: the same numbers as a processor's, no waiting, speed, memory.  Below Ray, in eight minutes.

    python -m experiments.benchmarks.gpu [SECTION ...] [--seconds 480] [--wheels FOLDER] [--out FILE.json]
    python -m experiments.benchmarks.gpu --device cpu --rehearse       # everything small, on a processor
    python -m experiments.benchmarks.gpu --show FILE.json              # the tables again

A machine needs Python 3.11, torch, transformers and this checkout, whose root is the working directory; neither Ray nor
pydantic nor this package's metadata.  What it lacks of the others' libraries goes along as wheels, pure Python all:

    python -m pip download --no-deps -d wheels galore-torch==1.0 peft==0.21.2

A row that needs a library or a device that is not there says so.  Every section has a share of the time, and stops when
it is used up; the file is written anew after every row, so that nothing is lost where the machine is taken away.  Ends
with 1 where a row failed, or was outside its limit.

equal    the change of every target's weight in a client's round, on the device against a processor, for every method:
         float32 products without TF32, two rounds, of which the second has clients that come back and a new one.  At
         most 1e-3 of the change; with a bfloat16 backbone as it is.  AdamW's eps is 1e-3 here: with a small one the
         first step is a sign, and so turns over where a gradient is as small as rounding.
waits    a pack's steps under `torch.cuda.set_sync_debug_mode("error")`: the first to wait is the reading of the losses
         at the end.  Of a pack with new bases the places that wait, and how often.
bits     deterministic mode, twice.
speed    clients a second: packs of 1 to 64, each client a round of four steps on rows of 128 tokens (start, steps,
         result on the processor), against one client at a time with peft (LoRA, as `fedit`) and with galore_torch (as
         `fedftg`).  Backbones are bfloat16, random, and have the sizes of the models that they are called after.
         Medians; what a pack allocates at most beside it.
memory   the largest allocation of a pack's round, beside the plan's; within 15 %.
quant    packs over int8 and nf4 backbones against bfloat16: bytes, clients a second, loss; nf4 asks for bitsandbytes,
         which has compiled parts and so has to be installed.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch

from experiments.benchmarks.cases import RANK
from experiments.benchmarks.gpu_work import (
    SHAPES,
    AdamW,
    Batch,
    Engine,
    OneByOne,
    backbone_bytes,
    batches,
    begun,
    changes,
    engine,
    furthest,
    llama,
    moved,
    plain_model,
    planned,
    quantised,
    rule_of,
    trained,
    wheels_of,
    with_galore,
    with_peft,
    works_of,
)
from rayfed_sub.core.devices import deterministic
from rayfed_sub.core.types import Broadcast, ClientState
from rayfed_sub.methods import METHODS, class_of
from rayfed_sub.methods.protocol import Method
from rayfed_sub.models.architecture import Architecture
from rayfed_sub.training.executor import ClientWork

ROOT = Path(__file__).parents[2]
EQUAL, PLAN = 1e-3, 0.15
"""The largest difference of a change in float32, and of the allocated memory from the plan's; shares."""
STEPS = 4
_PEFT, _GALORE = "peft, one by one", "galore_torch, one by one"
Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How much a run takes on.  small: the model of the sections about correctness; shapes: of the others; rows: of a
    client's batch, tokens of a row; planned: (shape, method, pack, rows) whose memory is compared."""

    small: Mapping[str, int]
    shapes: Mapping[str, Mapping[str, Any]]
    packs: tuple[int, ...]
    rows: tuple[int, ...]
    tokens: int
    planned: tuple[tuple[str, str, int, int], ...]
    seconds: float


def _sizes(width: int, inner: int, layers: int, heads: int, vocabulary: int) -> dict[str, int]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    return {**dict(zip(names, (width, inner, layers, heads, vocabulary), strict=True)), "num_key_value_heads": 2}


FULL = Size(
    small=_sizes(128, 344, 2, 4, 512),
    shapes=SHAPES,
    packs=(64, 16, 1, 4, 32, 8, 2),
    rows=(1, 4),
    tokens=128,
    planned=tuple(
        (shape, name, pack, 1)
        for shape, pack in (("SmolLM2-135M", 32), ("SmolLM2-135M", 2), ("TinyLlama-1.1B", 8), ("Llama-3.2-1B", 8))
        for name in ("fedit", "fedftg")
    ),
    seconds=480.0,
)
REHEARSAL = Size(
    small=_sizes(32, 48, 1, 2, 64),
    shapes={"tiny": _sizes(32, 48, 2, 2, 64)},
    packs=(1, 2),
    rows=(2,),
    tokens=12,
    planned=(("tiny", "fedit", 2, 2), ("tiny", "fedftg", 2, 2)),
    seconds=120.0,
)


@dataclass
class Section:
    """A section as it runs.  ends: by the clock that `left` reads; rows: so far; save: writes them."""

    device: torch.device
    size: Size
    ends: float
    save: Callable[[], None]
    rows: list[Row] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.ends - time.perf_counter()

    def add(self, work: Callable[[], Row], **named: Any) -> Row:
        """A row of these names and what `work` finds; where it raises, the error: the rows after it may do."""
        try:
            row = {**named, **work()}
        except torch.OutOfMemoryError:
            row = {**named, "not here": "out of the device's memory"}
        except Exception as error:
            file, line, _ = _place(error)
            row = {**named, "error": f"{type(error).__name__}: {error}"[:500], "at": f"{file}:{line}"}
        self.rows.append(row)
        self.save()
        return row


def _place(error: BaseException) -> tuple[str, int, str]:
    """The innermost file, line and function of this project that an error came through."""
    own = [ROOT / room for room in ("rayfed_sub", "experiments")]
    seen = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in seen if any(Path(frame.filename).is_relative_to(room) for room in own)]
    return (Path(frames[-1].filename).name, frames[-1].lineno or 0, frames[-1].name) if frames else ("", 0, "")


def method_named(name: str) -> Method:
    """A method with its defaults, at the rank of all benchmarks."""
    made: Any = class_of(name)
    own: Method = made(rank=RANK) if any(field.name == "rank" for field in fields(made)) else made()
    return own


def equal(own: Section) -> None:
    """Every method's change on the device against a processor's."""
    _equal_over(own, torch.float32)
    _equal_over(own, torch.bfloat16)


def _equal_over(own: Section, dtype: torch.dtype) -> None:
    architecture = llama(own.size.small, dtype)
    model = plain_model(architecture, torch.device("cpu"))
    here, there = (moved(architecture, model, device) for device in (torch.device("cpu"), own.device))
    for name in METHODS:
        if own.left < 0:
            return
        row = own.add(partial(_equal, method_named(name), here, there), method=name, backbone=str(dtype))
        if dtype == torch.float32 and "furthest" in row:
            row["within"] = row["furthest"] <= EQUAL


def _equal(method: Method, here: Engine, there: Engine) -> Row:
    """Two rounds on both; the second from the processor's first, with two clients that come back and a new one."""
    rule, vocabulary = rule_of(AdamW(eps=1e-3)), here.architecture.hf_config.vocab_size
    server, found = method.init_server(here.weights, here.shape, 0), []
    states: dict[int, ClientState] = {}
    for n, clients in enumerate(((0, 1), (0, 1, 2))):
        given = {k: batches(vocabulary, 10 * n + k, 2, 3, 24) for k in clients}
        both = []
        for one in (here, there):
            received = begun(one, method, server)
            works = works_of(one, method, received, given, states)
            results = trained(one, received, works, rule).results
            failed = [result.failure for result in results if result.failure]
            assert not failed, failed
            both.append([changes(one.shape, work.start, result) for work, result in zip(works, results, strict=True)])
            if one is here:
                sent, ended = received, results
        found.append(max(furthest(ours, theirs) for theirs, ours in zip(*both, strict=True)))
        total = method.accumulator(server, here.shape)
        for result in ended:
            total = method.accumulate(total, method.upload(sent, result, 1.0, here.shape), here.shape)
            kept = method.client_state(sent, result, here.shape)
            states[result.client] = ClientState(n + 1, 2 * (n + 1), result.step, kept)
        server = method.aggregate(server, total, here.shape)
    return {"first round": found[0], "second round": found[1], "furthest": max(found)}


def waits(own: Section) -> None:
    """Steps of every method under torch's debug mode for waiting, and the places that wait in a pack with new bases."""
    one = engine(llama(own.size.small, torch.bfloat16), own.device)
    for name in METHODS:
        if own.left < 0:
            return
        row = own.add(partial(_waits, method_named(name), one), method=name)
        if "first to wait" in row:
            row["within"] = row["first to wait"] == "executor.py _read"
    own.add(partial(_places, method_named("fedftg"), one), method="fedftg, new bases")


def _waits(method: Method, one: Engine) -> Row:
    received, works = _returning(method, one)
    if one.device.type != "cuda":
        return {"not here": "a processor has nothing to wait for"}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trained(one, received, works, rule_of())
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        file, _, function = _place(error)
        return {"first to wait": f"{file} {function}"}
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"first to wait": "nobody"}


def _returning(method: Method, one: Engine) -> tuple[Broadcast, list[ClientWork]]:
    """A second round's work of two clients that come back from a first one, which makes the libraries ready too."""
    vocabulary = one.architecture.hf_config.vocab_size
    received = begun(one, method)
    given = {k: batches(vocabulary, k, STEPS, 3, 24) for k in (0, 1)}
    results = trained(one, received, works_of(one, method, received, given), rule_of()).results
    host = Broadcast(0, {name: tensor.cpu() for name, tensor in received.tensors.items()})
    states = {
        x.client: ClientState(1, STEPS, x.step, method.client_state(host, x, one.shape))
        for x in results
        if x.failure is None
    }
    assert len(states) == 2, [result.failure for result in results]
    return received, works_of(one, method, received, given, states)


def _places(method: Method, one: Engine) -> Row:
    """Where a pack of new clients waits, and how often."""
    if one.device.type != "cuda":
        return {"not here": "a processor has nothing to wait for"}
    received = begun(one, method)
    given = {k: batches(one.architecture.hf_config.vocab_size, k, STEPS, 3, 24) for k in (0, 1)}
    works = works_of(one, method, received, given)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            trained(one, received, works, rule_of())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in seen if "synchronizing" in str(w.message))
    return {"waits": dict(found), "layers": len(one.shape.targets)}


def bits(own: Section) -> None:
    """Deterministic mode, twice, and the other mode, twice."""
    one = engine(llama(own.size.small, torch.bfloat16), own.device)
    for name in ("fedftg", "fedit", "fedavg"):
        method = method_named(name)
        with _steady():
            row = own.add(partial(_twice, method, one), method=name, mode="deterministic")
            row["within"] = row.get("same bits", False)
        own.add(partial(_twice, method, one), method=name, mode="quick")


def _twice(method: Method, one: Engine) -> Row:
    received, vocabulary = begun(one, method), one.architecture.hf_config.vocab_size
    given = {k: batches(vocabulary, k, STEPS, 3, 24) for k in range(4)}
    once, again = (trained(one, received, works_of(one, method, received, given), rule_of()).results for _ in range(2))
    pairs = [(a.tensors[name], b.tensors[name]) for a, b in zip(once, again, strict=True) for name in a.tensors]
    return {"same bits": all(torch.equal(a, b) for a, b in pairs), "tensors": len(pairs)}


@contextmanager
def _steady() -> Iterator[None]:
    """Deterministic mode, which a worker never leaves."""
    attention = torch.backends.cuda
    before = attention.flash_sdp_enabled(), attention.mem_efficient_sdp_enabled(), attention.cudnn_sdp_enabled()
    deterministic()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        for allow, value in zip(
            (attention.enable_flash_sdp, attention.enable_mem_efficient_sdp, attention.enable_cudnn_sdp),
            before,
            strict=True,
        ):
            allow(value)


def speed(own: Section) -> None:
    """Clients a second at every shape; each has an equal share of the section's time."""
    left = len(own.size.shapes)
    for shape, sizes in own.size.shapes.items():
        ends = time.perf_counter() + own.left / left
        _speed_of(own, shape, sizes, ends)
        left -= 1


def _speed_of(own: Section, shape: str, sizes: Mapping[str, Any], ends: float) -> None:
    """One client at a time with peft, packs, and last what may take long, one client at a time with galore_torch."""
    architecture = llama(sizes, torch.bfloat16)
    for i, rows in enumerate(own.size.rows):
        share = (ends - time.perf_counter()) / (len(own.size.rows) - i)
        until, first = time.perf_counter() + share, len(own.rows)
        named = {"shape": shape, "rows": rows}
        mine = batches(sizes["vocab_size"], 0, STEPS, rows, own.size.tokens)
        peft = own.add(partial(_alone, with_peft, architecture, own.device, mine, until), **named, trains=_PEFT)
        _packs_of(own, architecture, rows, named, until - share / 4)
        galore = own.add(partial(_alone, with_galore, architecture, own.device, mine, until), **named, trains=_GALORE)
        for row in own.rows[first:]:
            against = {"a pack, fedit": peft, "a pack, fedftg": galore}.get(row["trains"], {})
            if "clients a second" in row and "clients a second" in against:
                row["times one by one"] = row["clients a second"] / against["clients a second"]
        own.save()


def _packs_of(own: Section, architecture: Architecture, rows: int, named: Mapping[str, Any], ends: float) -> None:
    one = engine(architecture, own.device)
    vocabulary = architecture.hf_config.vocab_size
    for pack in own.size.packs:
        given = {k: batches(vocabulary, k, STEPS, rows, own.size.tokens) for k in range(pack)}
        for name in ("fedit", "fedftg"):
            if time.perf_counter() > ends:
                return
            work = partial(_packed, one, method_named(name), given, ends)
            own.add(work, **named, trains=f"a pack, {name}", clients=pack)
            _empty(own.device)


def _alone(
    make: Callable[[Architecture, torch.device], OneByOne],
    architecture: Architecture,
    device: torch.device,
    given: Sequence[Batch],
    ends: float,
) -> Row:
    """A client's round by a library; of factorisations that would not end in time one, and what follows from it."""
    try:
        others = make(architecture, device)
    except ImportError as error:
        return {"not here": str(error)}
    if make is with_galore:
        layers = len(architecture.shape.targets)
        weight = others.begun[0].float()
        _seconds(partial(torch.linalg.svd, weight[:64, :64]), device)
        factorised = layers * _seconds(partial(torch.linalg.svd, weight, full_matrices=False), device)
        if factorised > ends - time.perf_counter():
            return {"clients": 1, "not here": f"{layers} factorisations take {factorised:.0f} s"}
    return {"clients": 1, **_timed(partial(others.train, given), 1, device, ends)}


def _raised(error: Exception) -> Row:
    raise error


def _packed(one: Engine, method: Method, given: Mapping[int, Sequence[Batch]], ends: float) -> Row:
    """A pack's rounds, each from start to results on the processor."""
    received = begun(one, method)
    return _timed(
        lambda: trained(one, received, works_of(one, method, received, given), rule_of()), len(given), one.device, ends
    )


def _timed(action: Callable[[], object], clients: int, device: torch.device, ends: float) -> Row:
    """Seconds of a round: the median of as many as a second and the section allow, after a first one; a first one of
    more than ten seconds alone."""
    held = _allocated(device)
    first, taken, began = _seconds(action, device), list[float](), time.perf_counter()
    while first < 10 and len(taken) < 7 and (not taken or time.perf_counter() < min(began + 1.5, ends)):
        taken.append(_seconds(action, device))
    seconds = statistics.median(taken or [first])
    peak = {} if held is None else {"allocated": torch.cuda.max_memory_allocated(device) - held}
    return {"seconds": seconds, "runs": len(taken) or 1, "clients a second": clients / seconds, **peak}


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _allocated(device: torch.device) -> int | None:
    """Bytes that tensors hold on the device now, from which its peak begins anew; None on a processor."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _empty(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def memory(own: Section) -> None:
    """The largest allocation of a pack's round beside the plan's."""
    for shape in own.size.shapes:
        _memory_of(own, shape)
        _empty(own.device)


def _memory_of(own: Section, shape: str) -> None:
    one = engine(llama(own.size.shapes[shape], torch.bfloat16), own.device)
    for _, name, pack, rows in (case for case in own.size.planned if case[0] == shape):
        if own.left < 0:
            return
        row = own.add(
            partial(_memory, own, one, method_named(name), pack, rows),
            **{"shape": shape, "method": name, "clients": pack, "rows": rows},
        )
        if row.get("share") is not None:
            row["within"] = abs(row["share"] - 1) <= PLAN
        _empty(own.device)


def _memory(own: Section, one: Engine, method: Method, pack: int, rows: int) -> Row:
    vocabulary = one.architecture.hf_config.vocab_size
    given = {k: batches(vocabulary, k, 1, rows, own.size.tokens) for k in range(pack)}
    plan = planned(one.architecture, method, pack, [_longest(batch) for batch in given[0]])
    received = begun(one, method)
    trained(one, received, works_of(one, method, received, given), rule_of())  # libraries' own workspaces
    held = _allocated(own.device)
    results = trained(one, received, works_of(one, method, received, given), rule_of())
    del results
    if held is None:
        return {"planned": plan, "not here": "a processor counts no allocations"}
    allocated = torch.cuda.max_memory_allocated(own.device) - held
    reserved = torch.cuda.max_memory_reserved(own.device)
    return {"planned": plan, "allocated": allocated, "share": allocated / plan, "reserved in all": reserved}


def _longest(batch: Batch) -> Batch:
    """The batch with all rows as long as the longest, as a plan takes them."""
    ids = batch["input_ids"]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def quant(own: Section) -> None:
    """A round of `fedit` over quantised backbones, against the same round over bfloat16: bytes of the backbone, clients
    a second, and the clients' mean loss."""
    left = len(own.size.shapes)
    for shape, sizes in own.size.shapes.items():
        architecture, ends = llama(sizes, torch.bfloat16), time.perf_counter() + own.left / left
        rows, pack = own.size.rows[0], min(own.size.packs[:2])
        given = {k: batches(sizes["vocab_size"], k, STEPS, rows, own.size.tokens) for k in range(pack)}
        plain: Row | None = None
        for form in ("bfloat16", "int8", "nf4"):
            if own.left < 0:
                return
            row = own.add(
                partial(_quantised, architecture, own.device, form, given, ends, plain),
                **{"shape": shape, "backbone": form, "clients": pack, "rows": rows},
            )
            plain = row if form == "bfloat16" and "bytes" in row else plain
            _empty(own.device)
        left -= 1


def _quantised(
    architecture: Architecture,
    device: torch.device,
    form: str,
    given: Mapping[int, Sequence[Batch]],
    ends: float,
    plain: Row | None,
) -> Row:
    try:
        one = engine(architecture, device) if form == "bfloat16" else quantised(architecture, device, form)
    except ImportError as error:
        return {"not here": str(error)}
    method = method_named("fedit")
    received = begun(one, method)
    results = trained(one, received, works_of(one, method, received, given), rule_of()).results
    loss = statistics.mean(result.metrics["loss"] for result in results)
    row = {"bytes": backbone_bytes(one), **_packed(one, method, given, ends), "loss": loss}
    if plain is not None:
        row |= {f"{name} of bfloat16's": row[name] / plain[name] for name in ("bytes", "clients a second")}
    return row


SECTIONS: dict[str, tuple[Callable[[Section], None], float]] = {
    "equal": (equal, 0.17),
    "waits": (waits, 0.07),
    "bits": (bits, 0.04),
    "speed": (speed, 0.52),
    "memory": (memory, 0.12),
    "quant": (quant, 0.08),
}
"""Sections with their shares of the time; what one leaves goes to those after it."""


def run(names: Sequence[str], device: torch.device, size: Size, seconds: float, out: Path | None) -> Row:
    """Runs the sections; returns the record, which is written to `out` after every row."""
    ends, record = time.perf_counter() + seconds, {**machine(device), "sections": {}}

    def save() -> None:
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            part = out.with_suffix(".part")
            part.write_text(json.dumps(record, indent=1) + "\n")
            part.replace(out)

    for i, name in enumerate(names):
        function, share = SECTIONS[name]
        rest = sum(SECTIONS[later][1] for later in names[i:])
        began = time.perf_counter()
        own = Section(device, size, began + (ends - began) * share / rest, save)
        record["sections"][name] = {"rows": own.rows}
        try:
            function(own)
        except Exception as error:  # the others may do
            own.add(partial(_raised, error), section=name)
        record["sections"][name] |= {"seconds": time.perf_counter() - began, "whole": own.left >= 0}
        _empty(device)
        save()
        show({name: record["sections"][name]})
    return record


def machine(device: torch.device) -> Row:
    """Date, commit, device, and versions."""
    import numpy
    import transformers

    asked = ["git", "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git
        commit = ""
    found: Row = {
        "date": date.today().isoformat(),
        "commit": commit,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "processor",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "TF32": torch.backends.cuda.matmul.allow_tf32,
    }
    if device.type == "cuda":
        found |= {"capability": list(torch.cuda.get_device_capability(device))}
        found |= {"device bytes": torch.cuda.get_device_properties(device).total_memory}
    return found


def failures(record: Mapping[str, Any]) -> list[str]:
    """Rows that failed, or are outside their limit."""
    rows = [(name, row) for name, section in record["sections"].items() for row in section["rows"]]
    return [f"{name}: {row}" for name, row in rows if "error" in row or row.get("within") is False]


def show(sections: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints sections as tables."""
    for name, section in sections.items():
        columns = list(dict.fromkeys(key for row in section["rows"] for key in row))
        cut = "" if section.get("whole", True) else ", cut short"
        print(f"\n{name}: {section.get('seconds', 0):.0f} s{cut}")
        lines = [columns, *([_text(row.get(key)) for key in columns] for row in section["rows"])]
        widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
        for line in lines:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    sys.stdout.flush()


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)}; all if none")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rehearse", action="store_true", help="small models, a few rows")
    parser.add_argument("--seconds", type=float, metavar="NUMBER", help="for all of it; 480, or 120 with --rehearse")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER")
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("--show", type=Path, metavar="FILE", help="the tables of an earlier run, and nothing else")
    given = parser.parse_args()
    if unknown := set(given.sections) - set(SECTIONS):
        parser.error(f"no section {min(unknown)}; there are {', '.join(SECTIONS)}")
    for name in ("wheels", "show"):
        if (path := getattr(given, name)) is not None and not path.exists():
            parser.error(f"--{name} {path}: there is no such {'folder' if name == 'wheels' else 'file'}")
    if given.show is not None:
        record = json.loads(given.show.read_text())
        print(", ".join(f"{key} {value}" for key, value in record.items() if key != "sections"))
        show(record["sections"])
    else:
        if given.device == "cuda" and not torch.cuda.is_available():
            parser.error("--device cuda: torch sees no GPU here; --device cpu --rehearse runs everything small")
        torch.set_float32_matmul_precision("highest")
        wheels_of(given.wheels)
        size = REHEARSAL if given.rehearse else FULL
        device = torch.device("cuda", torch.cuda.current_device()) if given.device == "cuda" else torch.device("cpu")
        names = [name for name in SECTIONS if name in (given.sections or SECTIONS)]
        record = run(names, device, size, given.seconds or size.seconds, given.out)
    for line in (found := failures(record)):
        print(line)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
