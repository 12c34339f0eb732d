"""A plan in the terminal: tables that fit into 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from rayfed_sub.cli.run_view import clock, print_table, size
from rayfed_sub.planning.plan import Plan
from rayfed_sub.planning.traffic import RANKS, MethodBytes
from rayfed_sub.runtime.probe import Speed

_CLIENTS = (100, 1000, 10_000)


def show(plan: Plan, console: Console | None = None) -> None:
    """Prints the whole plan."""
    console = console or Console()
    print_table((f"{plan.name}: {plan.method}", "bytes"), _overview(plan), console)
    columns = ("round", "clients", "up, each", "down, each", "up, all", "down, all")
    print_table(columns, _rounds(plan), console)
    _print_lines(console, _free(plan), *plan.notes)
    print_table(("method", "up", "down", "training", "stored", "server"), _methods(plan), console)
    _print_lines(
        console,
        "All methods at the same rank. Up, down: a client in the second round; training: a client in a pack, without "
        "activations; stored: between rounds; server: after two rounds.",
    )
    print_table(("stored clients", *(f"rank {rank}" for rank in _ranks(plan))), _states(plan), console)
    _print_lines(
        console, f"What {plan.method} keeps of so many clients; in memory up to resources.state_memory, else on disk."
    )
    print_table(("pack size", "one worker", f"workers on {plan.machine.name}"), _fits(plan), console)
    if plan.speed is not None:
        _speed(plan.speed, console)


def written(file: object, before: object, speed: Speed) -> str:
    """Result of --write as one line.  before: the pack size in the file, or the default."""
    if speed.best == speed.now:
        return f"{file}: not changed; resources.pack_size={before} is as quick as any that was timed"
    saved = f"{speed.round - speed.best_round:.3g} s of about {speed.round:.3g} s"
    return f"{file}: resources.pack_size is {speed.best} now, was {before}; a round saves {saved}"


def _overview(plan: Plan) -> Iterable[tuple[str, str]]:
    every, cohort, trained = plan.clients
    memory, machine = plan.worker, plan.machine
    if plan.asynchronous:
        yield "clients", f"{every}, {cohort} under way at a time, at most {trained} counted"
    else:
        yield "clients", f"{every}, {cohort} a round, {trained} ever train"
    if plan.rows.side:
        yield "images", f"{plan.rows.side} x {plan.rows.side} pixels"
    else:
        yield "longest row", f"{plan.rows.tokens} tokens, {plan.rows.labels} of them labels"
    yield "backbone, once per node", size(plan.backbone)
    yield "data set, once per node", size(plan.data)
    yield "broadcast, once per node and round", size(plan.broadcast)
    if machine.gpu is None:
        yield "worker", f"{size(memory.process)} above a bare {size(plan.bare)}"
        yield "  of that alive in tensors", size(memory.tensors)
    else:
        yield "worker, tensors on the GPU", size(memory.tensors)
    yield "one more client in a pack", size(plan.one_more)
    yield "  its tensors, moments, gradients", _span(plan.resident)
    yield "stored state of a client", _span(plan.state)
    yield "server, at first and later", f"{size(plan.server[0])}, {size(plan.server[1])}"
    yield "coordinator process", size(plan.coordinator)
    yield "object store", size(plan.store)
    yield "all of it on one node", f"{size(plan.node)} of {size(machine.memory)} free"
    if plan.privacy is not None:
        whose = "training rows" if plan.privacy["unit"] == "example" else "clients"
        yield f"privacy of {whose}, all rounds", f"epsilon {plan.privacy['epsilon']:.3g} ({plan.privacy['accountant']})"
        yield "  at delta, with noise", f"{plan.privacy['delta']:g}, {plan.privacy['noise']:g}"
        yield "  by RDP, the cross-check", f"epsilon {plan.privacy['epsilon_rdp']:.3g}"
    yield "run folder, at most", f"{size(plan.disk)} of {size(machine.disk)} free"


def _rounds(plan: Plan) -> Iterable[tuple[str, ...]]:
    for row in plan.rounds:
        each = (_span(row.up), _span(row.down), size(row.up_all), size(row.down_all))
        yield str(row.round + 1), str(row.clients), *each


def _free(plan: Plan) -> str:
    """The rule of `methods/downloads.py`, and the bytes that it saves in all rounds."""
    down, counted = (sum(sizes) for sizes in zip(*((r.down_all, r.down_counted_all) for r in plan.rounds), strict=True))
    most = max(row.down_counted[1] for row in plan.rounds)
    return (
        "What follows from the pretrained weights and the seed costs nothing: before anything is learned, nobody "
        f"downloads. In these rounds {size(down)} go down; were every client's first download counted in full (all "
        f"that it reads, at most {size(most)}), {size(counted)}."
    )


def _methods(plan: Plan) -> Iterable[tuple[str, ...]]:
    for row in plan.methods:
        mark = " *" if row.method == plan.method else ""
        sizes = (row.up[1], row.down[1], row.resident, row.state, row.server)
        yield row.method + mark, *map(size, sizes)


def _ranks(plan: Plan) -> list[int]:
    return [rank for rank in RANKS if any(row.rank == rank for row in plan.ranks)]


def _states(plan: Plan) -> Iterable[tuple[str, ...]]:
    by_rank: dict[int | None, MethodBytes] = {row.rank: row for row in plan.ranks if row.method == plan.method}
    for clients in sorted({*plan.clients[:2], *_CLIENTS}):
        yield f"{clients:,}", *(size(clients * by_rank[rank].state) for rank in _ranks(plan))


def _fits(plan: Plan) -> Iterable[tuple[str, ...]]:
    for fit in plan.fits:
        yield str(fit.pack_size), size(fit.worker), str(fit.workers) if fit.workers else "none"


def _speed(speed: Speed, console: Console) -> None:
    rows = [(str(p.pack_size), f"{p.step:.3g} s", f"{p.refresh:.3g} s") for p in speed.packs]
    print_table(("pack size", "a local step, per client", "a pack's first step, besides"), rows, console)
    _print_lines(console, f"A round takes about {speed.round:.3g} s, the run {clock(speed.run)}.")
    if speed.best != speed.now:
        better = f"{speed.best_round:.3g} s and {clock(speed.best_run)}"
        _print_lines(console, f"resources.pack_size={speed.best} would take {better}.")


def _print_lines(console: Console, *sentences: str) -> None:
    for sentence in sentences:
        for line in textwrap.wrap(sentence, 78):
            console.print(Text(line, "dim"))


def _span(sizes: tuple[int, int]) -> str:
    low, high = map(size, sizes)
    return high if low == high else f"{low} - {high}"
