"""The state store: any order of completions, any budget and any interrupted write lead to the same state.

The object store is a stand-in: `put` gives a box, `get` opens it."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Timer, current_thread, main_thread
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from rayfed_sub.core.arrays import packed
from rayfed_sub.core.errors import RunError, UserError
from rayfed_sub.core.types import ClientState, ServerState
from rayfed_sub.storage import atomic_files, checkpoints
from rayfed_sub.storage.client_states import ClientStates, StateFile, path
from rayfed_sub.storage.state_store import StateStore, settled

Model = Mapping[str, Any]
"""The expected state: the server's and the memory's numbers, and each client's round and numbers."""


class Crash(BaseException):
    """The process ends here; nothing may catch it."""


def server(n: int) -> ServerState:
    """Tensors of several dtypes, a view and an empty one among them, with values that depend on the round."""
    grid = torch.arange(12.0).reshape(3, 4) + n
    return ServerState(
        n,
        {
            "layer/weight": grid.T,
            "layer/half": grid[:2].bfloat16(),
            "history/ranks": torch.full((n, 2), 2**40 + n),
            "step": torch.tensor(n + 0.5, dtype=torch.float64),
            "odd": torch.tensor([float("nan"), float("inf"), -0.0, n]),
        },
    )


def state(client: int, n: int) -> ClientState:
    """100 float32 and a bfloat16 number: 402 bytes of tensors."""
    tensors = {"layer/left": torch.full((50, 2), client + n / 64), "half": torch.tensor([n / 4]).bfloat16()}
    return ClientState(n, 4 * n, 4 * n + client, tensors)


def state_store(folder: Path, budget: int = 1000) -> StateStore:
    return StateStore(folder, budget, lambda: server(0), lambda value: [value], lambda box: box[0])


def bits(tensors: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (dtype, array.shape, array.tobytes()) for name, (dtype, array) in sorted(packed(tensors).items())}


def walk(
    store: StateStore,
    cohorts: Sequence[Sequence[int]],
    every: int = 1,
    bests: Collection[int] = (),
    *,
    late: bool = False,
) -> None:
    """Train the cohorts from the store's current round; a checkpoint every so many rounds, and after the rounds in
    `bests`, each better than those before it.  late: it is written when the next round has been committed."""
    due = 0

    def keep() -> None:
        store.checkpoint()
        if due in bests:
            store.keep_best()

    if store.current.server.round in bests:  # the last process may have ended before it kept it
        store.keep_best()
    for n in range(store.current.server.round, len(cohorts)):
        for client in cohorts[n]:
            store.add(client, state(client, n + 1))
        trained = [(client, n + 1) for client in cohorts[n]]
        store.commit(server(n + 1), {"layer/weight/v": torch.full((2,), n + 1.0)}, trained)
        if due:
            keep()
        due = n + 1 if (n + 1) % every == 0 or n + 1 in bests else 0
        if due:
            store.pin()
        if due and not late:
            keep()
            due = 0
    if due:
        keep()


def check(store: StateStore, cohorts: Sequence[Sequence[int]], rounds: int) -> None:
    """Check that the store has the state of `rounds` undisturbed rounds, bit for bit."""
    current = store.current
    assert current.server.round == rounds
    assert bits(current.server.tensors) == bits(server(rounds).tensors)
    if rounds:
        assert current.memory["layer/weight/v"].tolist() == [rounds, rounds]
    last = {client: n + 1 for n in range(rounds) for client in cohorts[n]}
    assert current.states == last
    for client, n in last.items():
        key, box = store.stored(client) or (None, [None])
        found, expected = box[0], state(client, n)
        assert (key, found.round, found.cursor, found.step) == ((client, n), n, expected.cursor, expected.step)
        assert bits(found.tensors) == bits(expected.tensors)


def test_broadcasts_that_clients_got_are_kept_until_they_have_trained(tmp_path: Path) -> None:
    """Client 2 was called off twice; client 1 trained in the round after it was."""
    store = state_store(tmp_path)
    store.commit(server(1), {}, [store.add(0, state(0, 1))], received={1: 0, 2: 0})
    store.commit(server(2), {}, [store.add(1, state(1, 2))], received={2: 1})
    store.pin()
    store.checkpoint()
    for found in (store, state_store(tmp_path)):
        assert [found.current.synchronised(client) for client in range(4)] == [0, 1, 1, -1]
        assert found.current.received == {2: 1}


def test_who_holds_a_server_holds_the_next_one_where_nothing_has_changed(tmp_path: Path) -> None:
    """Clients 1 and 2 got version 1, in the one round without updates and in the other; client 3 has version 0."""
    store = state_store(tmp_path)
    store.commit(server(1), {}, [store.add(0, state(0, 1))], received={3: 0})
    store.commit(server(2), {}, [], received={1: 1}, still=True)
    store.commit(server(3), {}, [], received={2: 2}, still=True)
    assert [store.current.synchronised(client) for client in range(4)] == [0, 3, 3, 0]
    store.commit(server(4), {}, [store.add(1, state(1, 4))])
    assert [store.current.synchronised(client) for client in range(4)] == [0, 3, 3, 0]


def check_best(folder: Path, cohorts: Sequence[Sequence[int]], rounds: int | None) -> None:
    """Check that the best checkpoint is that of `rounds` rounds, whole, and that no other is there."""
    found = checkpoints.read(folder, best=True)
    assert [file.name for file in checkpoints.root(folder).glob("best-*")] == (
        [] if rounds is None else [f"best-{rounds:06d}.json"]
    )
    if rounds is None or found is None:
        assert found is rounds
        return
    memory = {"server/layer/weight/v": torch.full((2,), float(rounds))}
    assert (found.round, bits(found.server)) == (rounds, bits({**server(rounds).tensors, **memory}))
    last = {client: n + 1 for n in range(rounds) for client in cohorts[n]}
    assert dict(found.state_files) == {key: found.state_files[key] for key in last.items()}
    for client, n in last.items():
        assert bits(checkpoints.stored_state(folder, found, client).tensors) == bits(state(client, n).tensors)


cohorts_of_rounds = st.lists(st.lists(st.integers(0, 5), unique=True, max_size=4), min_size=1, max_size=5)


@settings(deadline=None, max_examples=60)
@given(
    cohorts=cohorts_of_rounds,
    every=st.integers(1, 3),
    budget=st.sampled_from([0, 402, 1000, 10**6]),
    late=st.booleans(),
)
def test_any_order_and_any_budget_lead_to_the_same_state(
    cohorts: list[list[int]], every: int, budget: int, late: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = state_store(Path(folder), budget)
        walk(store, cohorts, every, late=late)
        check(store, cohorts, len(cohorts))
        assert store.stored(99) is None
        # The files on disk lead to the newest checkpoint's state, and on to the same end.
        again = state_store(Path(folder), budget)
        check(again, cohorts, len(cohorts) // every * every)
        walk(again, cohorts, every, late=late)
        check(again, cohorts, len(cohorts))


@settings(deadline=None, max_examples=150)
@given(data=st.data(), cohorts=cohorts_of_rounds, budget=st.sampled_from([0, 500, 10**6]))
def test_write_interrupted_anywhere_leaves_a_complete_checkpoint(
    data: st.DataObject, cohorts: list[list[int]], budget: int
) -> None:
    """The n-th change of a file is cut in the middle, as by SIGKILL or a full disk; then a new process resumes."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        fatal = data.draw(st.integers(0, 30), label="the change that is cut")
        full = data.draw(st.booleans(), label="full disk, not SIGKILL")
        late = data.draw(st.booleans(), label="checkpoints are written while the next round is committed")
        bests = data.draw(st.sets(st.integers(1, len(cohorts))), label="rounds that are better than all before")
        changes = 0

        def dies() -> bool:
            nonlocal changes
            changes += 1
            return changes == fatal + 1

        write, unlink = atomic_files.write, Path.unlink

        def torn_write(target: Path, *parts: bytes | memoryview) -> None:
            if dies():
                content = b"".join(parts)
                target.with_name(f".{target.name}").write_bytes(content[: len(content) // 2])
                raise RunError("writing files", "No space left on device") if full else Crash
            write(target, *parts)

        def torn_unlink(target: Path, missing_ok: bool = False) -> None:
            if dies() and not full:
                raise Crash
            unlink(target, missing_ok)

        patch.setattr(atomic_files, "write", torn_write)
        patch.setattr(Path, "unlink", torn_unlink)
        with contextlib.suppress(Crash, RunError):
            walk(state_store(Path(folder), budget), cohorts, bests=bests, late=late)
        patch.undo()

        newest = checkpoints.newest(Path(folder)) or 0
        again = state_store(Path(folder), budget)
        check(again, cohorts, newest)
        walk(again, cohorts, bests=bests, late=late)
        check(again, cohorts, len(cohorts))
        check_best(Path(folder), cohorts, max(bests, default=None))
        # No partial file is left, and no state that neither of the two checkpoints nor the best one names.
        named = again.current.keys | checkpoints.older(Path(folder)) | checkpoints.best_states(Path(folder))
        assert {file.name for file in checkpoints.clients(Path(folder)).iterdir()} == {
            path(Path(), key).name for key in named
        }


def test_only_changed_states_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = state_store(tmp_path)
    walk(store, [[0, 1, 2]])
    written: list[str] = []
    write = atomic_files.write
    monkeypatch.setattr(
        atomic_files, "write", lambda target, *parts: (written.append(target.name), write(target, *parts))
    )
    walk(store, [[0, 1, 2], [1]])
    assert written == ["000001-000002.safetensors", "server-000002.safetensors", "manifest-000002.json"]
    store.pin()
    store.checkpoint()  # nothing new
    assert len(written) == 3


def test_two_checkpoints_are_kept(tmp_path: Path) -> None:
    walk(state_store(tmp_path), [[0], [1], [0]])
    assert sorted(file.name for file in checkpoints.root(tmp_path).iterdir()) == [
        *("clients", "manifest-000002.json", "manifest-000003.json"),
        *("server-000002.safetensors", "server-000003.safetensors"),
    ]
    assert sorted(file.name for file in checkpoints.clients(tmp_path).iterdir()) == [
        "000000-000001.safetensors",  # named by the checkpoint of round 2
        "000000-000003.safetensors",
        "000001-000002.safetensors",
    ]


def test_best_checkpoint_stays_until_a_better_one(tmp_path: Path) -> None:
    """Each round's client trains no more, so the states of round 1 are in all checkpoints."""
    walk(state_store(tmp_path), [[0, 1], [0], [0], [0], [0]], bests={2})
    assert sorted(file.name for file in checkpoints.root(tmp_path).iterdir()) == [
        *("best-000002.json", "clients", "manifest-000004.json", "manifest-000005.json"),
        *("server-000002.safetensors", "server-000004.safetensors", "server-000005.safetensors"),
    ]
    assert sorted(file.name for file in checkpoints.clients(tmp_path).iterdir()) == [
        *(f"000000-00000{n}.safetensors" for n in (2, 4, 5)),
        "000001-000001.safetensors",
    ]
    walk(state_store(tmp_path), [[0, 1], [0], [0], [0], [0], [1]], bests={2, 6})
    assert {file.name for file in checkpoints.root(tmp_path).iterdir()} == {
        *("best-000006.json", "clients", "manifest-000005.json", "manifest-000006.json"),
        *("server-000005.safetensors", "server-000006.safetensors"),
    }
    assert sorted(file.name for file in checkpoints.clients(tmp_path).iterdir()) == [
        *("000000-000005.safetensors", "000001-000001.safetensors", "000001-000006.safetensors"),
    ]


def test_best_checkpoint_may_be_of_an_earlier_round_than_the_one_before(tmp_path: Path) -> None:
    """A run goes on from the checkpoint before a torn one, which was the best."""
    walk(state_store(tmp_path), [[0], [0], [0]], bests={3})
    checkpoints.go_back(tmp_path)
    walk(state_store(tmp_path), [[0], [0]], bests={2})
    check_best(tmp_path, [[0], [0]], 2)


def test_torn_best_checkpoint_is_named(tmp_path: Path) -> None:
    walk(state_store(tmp_path), [[0], [0]], bests={1})
    torn = checkpoints.root(tmp_path) / "best-000001.json"
    torn.write_bytes(torn.read_bytes()[:9])
    for read in (lambda: state_store(tmp_path), lambda: checkpoints.read(tmp_path, best=True)):
        with pytest.raises(UserError, match=r"a whole checkpoint: .*; delete best-000001.json to go on without it"):
            read()


def test_memory_stays_within_its_budget(tmp_path: Path) -> None:
    """402 bytes a state: two fit into 1,000."""
    states = ClientStates(tmp_path, 1000, lambda value: [value], lambda box: box[0])
    for client in range(5):
        states.add(client, state(client, 1))
        assert states.held_bytes == 402 * min(2, client + 1)
    assert sorted(file.name[:6] for file in tmp_path.iterdir()) == ["000000", "000001", "000002"]
    assert states.reference((0, 1))[0].step == 4  # back from its file: client 3, the longest unused, makes room
    assert states.held_bytes == 804
    assert (tmp_path / "000003-000001.safetensors").exists()


def test_state_added_again_replaces_the_first(tmp_path: Path) -> None:
    """A round that is run again in the same process, with no room for two states."""
    states = ClientStates(tmp_path, 402, lambda value: [value], lambda box: box[0])
    for step in (4, 99):
        states.add(0, ClientState(1, 4, step, state(0, 1).tensors))
    states.add(1, state(1, 1))  # client 0 goes to disk
    assert states.reference((0, 1))[0].step == 99


def test_full_disk_is_reported_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = state_store(tmp_path)
    walk(store, [[0]])

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(atomic_files.os, "fsync", full)
        with pytest.raises(RunError, match=r"writing files: .*000000-000002.safetensors: No space left on device"):
            walk(store, [[0], [0]])
    check(state_store(tmp_path), [[0]], 1)
    store.pin()
    store.checkpoint()  # there is space again
    check(state_store(tmp_path), [[0], [0]], 2)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk hangs with the first state's file; meanwhile a round is committed that replaces all states, which lie in
    memory for one state only, so that others go to disk beside."""
    hangs, goes_on = Event(), Event()
    write = atomic_files.write

    def slow_write(target: Path, *parts: bytes | memoryview) -> None:
        if current_thread() is not main_thread():
            hangs.set()
            assert goes_on.wait(20)
        write(target, *parts)

    store = state_store(tmp_path, budget=10**6)
    for client in range(3):
        store.add(client, state(client, 1))
    store.commit(server(1), {"layer/weight/v": torch.full((2,), 1.0)}, [(client, 1) for client in range(3)])
    store.pin()
    monkeypatch.setattr(atomic_files, "write", slow_write)
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(store.checkpoint)
        assert hangs.wait(20)
        try:
            for client in range(3):
                store.stored(client)
                store.add(client, state(client, 2))
            store.commit(server(2), {"layer/weight/v": torch.full((2,), 2.0)}, [(client, 2) for client in range(3)])
            assert checkpoints.newest(tmp_path) is None
        finally:
            goes_on.set()
        writing.result()
    check(store, [[0, 1, 2], [0, 1, 2]], 2)
    check(state_store(tmp_path), [[0, 1, 2]], 1)


def test_state_is_written_once_by_a_checkpoint_and_by_a_full_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for one state: while the checkpoint writes the first one, the second one comes, and the first has to go."""
    hangs, goes_on, written = Event(), Event(), list[str]()
    write = atomic_files.write

    def slow_write(target: Path, *parts: bytes | memoryview) -> None:
        hangs.set()
        assert goes_on.wait(20)
        written.append(target.name)
        write(target, *parts)

    states = ClientStates(tmp_path, 402, lambda value: [value], lambda box: box[0])
    key = states.add(0, state(0, 1))
    monkeypatch.setattr(atomic_files, "write", slow_write)
    with ThreadPoolExecutor(2) as pool:
        saved = pool.submit(states.save, [key], states.unsaved([key]))
        assert hangs.wait(20)
        added = pool.submit(states.add, 1, state(1, 1))
        Timer(0.1, goes_on.set).start()
        added.result()
        assert saved.result()[key].size == path(tmp_path, key).stat().st_size
    assert written == ["000000-000001.safetensors"]
    assert bits(states.reference(key)[0].tensors) == bits(state(0, 1).tensors)


def test_server_that_a_method_changes_in_place_is_in_no_checkpoint(tmp_path: Path) -> None:
    store = state_store(tmp_path)
    walk(store, [[0]])
    store.commit(server(2), {}, [])
    store.pin()
    store.current.server.tensors["layer/weight"].add_(1)
    with pytest.raises(RunError, match="tensor layer/weight was written in place"):
        store.checkpoint()
    assert checkpoints.newest(tmp_path) == 1


def test_halted_run_s_checkpoint_is_of_the_last_round(tmp_path: Path) -> None:
    """An interruption between the pin and its checkpoint, during which another round was committed."""
    store = state_store(tmp_path)
    walk(store, [[0]])
    store.pin()
    key = store.add(1, state(1, 2))
    store.commit(server(2), {"layer/weight/v": torch.full((2,), 2.0)}, [key])
    assert store.halt() == 2
    store.checkpoint()
    check(state_store(tmp_path), [[0], [1]], 2)


def test_no_round_counts_after_a_halt(tmp_path: Path) -> None:
    store = state_store(tmp_path)
    walk(store, [[0]])
    assert store.halt() == 1
    assert not store.commit(server(2), {}, [store.add(1, state(1, 2))])
    check(store, [[0]], 1)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("manifest-000002.json", "Expecting"),
        ("server-000002.safetensors", "server-000002.safetensors is not as it was written"),
        ("clients/000001-000002.safetensors", "000001-000002.safetensors is cut or gone"),
    ],
)
def test_corrupt_checkpoint_is_refused_and_the_previous_one_is_used(file: str, message: str, tmp_path: Path) -> None:
    walk(state_store(tmp_path), [[0], [1]])
    torn = checkpoints.root(tmp_path) / file
    torn.write_bytes(torn.read_bytes()[:-10] if not file.startswith("manifest") else b"")
    with pytest.raises(UserError) as caught:
        state_store(tmp_path)
    assert caught.value.field == "checkpoint"
    assert message in caught.value.allowed
    assert caught.value.advice == "delete manifest-000002.json to go on from round 1"
    Path(str(caught.value.value)).unlink()
    again = state_store(tmp_path)
    check(again, [[0], [1]], 1)


def test_corrupt_state_is_reported_with_its_client_when_read(tmp_path: Path) -> None:
    walk(state_store(tmp_path), [[3]])
    file = path(checkpoints.clients(tmp_path), (3, 1))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(RunError, match=r"round 1, client 3, reading a client's state: .*not as it was written"):
        state_store(tmp_path).stored(3)


def test_manifest_names_its_files(tmp_path: Path) -> None:
    walk(state_store(tmp_path), [[7]])
    tree = json.loads((checkpoints.root(tmp_path) / "manifest-000001.json").read_text())
    client, round, *entry = tree["clients"][0]
    assert (client, round, StateFile(*entry).cursor, StateFile(*entry).step) == (7, 1, 4, 11)


def test_server_file_can_be_read_by_safetensors(tmp_path: Path) -> None:
    """Names, types and numbers; the widest numbers come first, so that all begin at multiples of their size."""
    store = state_store(tmp_path)
    walk(store, [[0]])
    file = checkpoints.root(tmp_path) / "server-000001.safetensors"
    rule = {"server/layer/weight/v": torch.full((2,), 1.0)}
    assert bits(load_file(file)) == bits({**server(1).tensors, **rule})
    header = json.loads(file.read_bytes()[8:].split(b"}}")[0] + b"}}")
    assert list(header) == ["history/ranks", "step", "layer/weight", "odd", "server/layer/weight/v", "layer/half"]
    # 2 ranks and a step of 8 bytes; 12 weights, 4 odd numbers and 2 of the rule's of 4; 8 halves of 2
    assert [entry["data_offsets"][1] for entry in header.values()] == [16, 24, 72, 88, 96, 112]


def test_server_can_move_to_other_memory(tmp_path: Path) -> None:
    store = state_store(tmp_path)
    walk(store, [[3]])
    before = store.current
    there = before.server.tensors["layer/weight"].clone()
    store.move({"layer/weight": there})
    assert store.current.server.tensors["layer/weight"] is there
    assert store.current.server.tensors["odd"] is before.server.tensors["odd"]
    check(store, [[3]], 1)


def test_folder_has_one_run_at_a_time(tmp_path: Path) -> None:
    """The lock ends with its holder: a closed file stands for a process that has ended."""
    holder = checkpoints.claim(tmp_path, 1)
    with pytest.raises(RunError, match=r"start: .*checkpoints: another run is at work here"):
        checkpoints.claim(tmp_path, 0.2)
    Timer(0.3, holder.close).start()
    checkpoints.claim(tmp_path, 10).close()


def test_settled_tensors_are_contiguous_and_aligned_with_the_same_numbers() -> None:
    """A transposed view becomes contiguous, as it would be when read from a file."""
    before = server(3)
    after = settled(before.tensors)
    assert after["layer/weight"].is_contiguous()
    assert all(tensor.data_ptr() % 64 == 0 for tensor in after.values())
    assert bits(after) == bits(before.tensors)
