"""Both halves of a federation without messages: the simulation's bits and bytes, and what failures leave."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from rayfed_sub import deployment, export, load_config, run
from rayfed_sub.config.schema import Config
from rayfed_sub.core.errors import RunError, UserError
from rayfed_sub.core.types import ClientState, ServerState, Update
from rayfed_sub.data.dataset import Dataset
from rayfed_sub.deployment import app, deltas, node, server
from rayfed_sub.deployment.server import Federation, Reply
from rayfed_sub.deployment.setup import Setup, pretrained, rows_of, run_config, set_up
from rayfed_sub.models.weights import target_weights
from rayfed_sub.storage import checkpoints

ROUNDS = 3
CONFIG = {
    "name": "small",
    "model": {
        "path": "random",
        "random": {
            **{"type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
            **{"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128},
        },
    },
    "task": {"name": "python-docs", "max_length": 96, "max_rows": 60},
    "federation": {"clients": 3, "sampled": 2, "rounds": ROUNDS, "local_steps": 2, "batch_size": 2},
    "method": {"name": "fedftg", "rank": 2},
    "optimizer": {"lr": 0.003},
    "evaluation": {"eval_rows": 4},
    "diagnostics": {"every": 0},
    "resources": {"workers": 0},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulation."""
    path = tmp_path_factory.mktemp("simulation") / "run"
    run(load_config(CONFIG), out=path)
    return path


@pytest.fixture(scope="module")
def setup(folder: Path) -> Setup:
    return set_up(load_config(folder / "config.yaml"))


@pytest.fixture(scope="module")
def weights(setup: Setup) -> dict[str, torch.Tensor]:
    return pretrained(setup)


@pytest.fixture(scope="module")
def dataset(setup: Setup) -> Dataset:
    return rows_of(setup, 0)


class Nodes:
    """Nodes of one machine."""

    def __init__(self, federation: Federation, weights: dict[str, torch.Tensor], dataset: Dataset, root: Path) -> None:
        self.federation, self._weights, self._dataset, self.root = federation, weights, dataset, root

    def train(self, client: int, *, anew: bool = False, start: Path | None = None) -> Reply:
        got = server.download(self.federation, client, anew=anew)
        given = {} if start is None else {"checkpoint": str(start)}
        return node.train(
            self.federation.setup,
            self._weights,
            self._dataset,
            self.root / str(client),
            client,
            got,
            checkpoint=app.checkpoint_state(given, client),
        )

    def round(self, start: Path | None = None) -> Sequence[Reply]:
        replies = [self.train(client, start=start) for client in server.cohort(self.federation)]
        self.federation = server.finish(self.federation, replies[::-1])
        return replies


def summary(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / "summary.json").read_text())
    return found


def test_the_same_bits_and_bytes_as_the_simulation(
    folder: Path, setup: Setup, weights: dict[str, torch.Tensor], dataset: Dataset, tmp_path: Path
) -> None:
    nodes = Nodes(server.begin(setup, weights), weights, dataset, tmp_path)
    rows = pd.read_parquet(folder / "clients.parquet").set_index(["round", "client"])
    while nodes.federation.round < ROUNDS:
        n, cohort = nodes.federation.round, server.cohort(nodes.federation)
        down = [server.download(nodes.federation, client) for client in cohort]
        counted = [server.counted_bytes(nodes.federation, client) for client in cohort]
        replies = nodes.round()
        assert [deltas.wire(got) for got in down] == counted == [rows.downlink_bytes[n, k] for k in cohort]
        assert [one.update.wire_bytes for one in replies] == [rows.uplink_bytes[n, k] for k in cohort]
    assert server.weights_sha256(nodes.federation, weights) == summary(folder)["weights_sha256"]


def test_goes_on_from_a_simulation_s_checkpoint(
    folder: Path, setup: Setup, weights: dict[str, torch.Tensor], dataset: Dataset, tmp_path: Path
) -> None:
    """The simulation's checkpoint before the last round, and one round of the federation, are the whole simulation."""
    earlier, start = tmp_path / "run", tmp_path / "checkpoint"
    shutil.copytree(folder, earlier)
    checkpoints.go_back(earlier)
    found = checkpoints.read(earlier)
    assert found is not None
    states = {client: checkpoints.stored_state(earlier, found, client) for client, _ in found.state_files}
    app.write_checkpoint(start, found.round, found.server, states)
    nodes = Nodes(server.begin(setup, weights, app.read_checkpoint(str(start))), weights, dataset, tmp_path)
    assert nodes.federation.round == ROUNDS - 1
    nodes.round(start)
    assert server.weights_sha256(nodes.federation, weights) == summary(folder)["weights_sha256"]


def test_the_model_of_a_quantised_backbone_is_whole(tmp_path: Path) -> None:
    """With the server's trained weights, and what was quantised in float32."""
    found = set_up(load_config(CONFIG, ["model.quantize=int8", "method={name: fedit, rank: 2}"]))
    weights = pretrained(found)
    app.write_model(server.begin(found, weights), weights, tmp_path)
    module, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    wanted = target_weights(found.shape, found.architecture.transposed, weights)
    for layer in found.shape.targets:
        assert torch.equal(module.get_submodule(layer.name).weight, wanted[f"{layer.name}/weight"])


def test_a_node_without_files_says_so_and_receives_all(
    setup: Setup, weights: dict[str, torch.Tensor], dataset: Dataset, tmp_path: Path
) -> None:
    nodes = Nodes(server.begin(setup, weights), weights, dataset, tmp_path)
    nodes.round()
    client = next(iter(nodes.federation.since))
    shutil.rmtree(tmp_path / str(client))
    assert not nodes.train(client).holds
    reply = nodes.train(client, anew=True)
    assert reply.holds
    assert reply.update.failure is None


def test_pretrained_weights_lie_once_a_run_and_go_when_nobody_reads_them(
    setup: Setup, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    def folder(run: int, client: int) -> Path:
        return app.node_folder({"cache": str(tmp_path), "partition-id": client}, run)

    first, second = folder(1, 0), folder(1, 1)
    assert first.parent == second.parent
    for one in (first, second):
        held = node.kept_weights(setup, one.parent)
        assert all(torch.equal(held[name], tensor) for name, tensor in weights.items())
    file = first.parent / node.WEIGHTS
    folder(2, 0)
    assert file.exists()
    two_days, two_months = (time.time() - days * 24 * 3600 for days in (2, 60))
    os.utime(file, (two_days, two_days))
    folder(3, 0)
    assert not file.exists()
    assert first.exists()
    os.utime(first, (two_months, two_months))
    folder(4, 0)
    assert not first.exists()
    assert second.exists()


def test_an_answer_that_never_came_leaves_no_trace(
    setup: Setup, weights: dict[str, torch.Tensor], dataset: Dataset, tmp_path: Path
) -> None:
    """A client trains twice in a row for the same round: the second time as if the first answer had not been sent."""
    nodes = Nodes(server.begin(setup, weights), weights, dataset, tmp_path)
    nodes.round()
    client = next(iter(nodes.federation.since))
    first, second = nodes.train(client), nodes.train(client)
    assert first.update.tensors.keys() == second.update.tensors.keys()
    assert all(torch.equal(x, second.update.tensors[name]) for name, x in first.update.tensors.items())


def test_an_answer_that_nobody_waits_for_leaves_later_versions(tmp_path: Path) -> None:
    """The process of a round that the server has given up ends after that of a later round."""
    for n, before in ((0, -1), (2, 0), (1, 0)):
        version = node.Version(ServerState(n, {"a": torch.zeros(1)}), ClientState(n + 1, n, n, {"b": torch.zeros(1)}))
        node._keep(tmp_path, n, version, before)
    assert node.stored_state(tmp_path, 2) is not None
    assert node.stored_state(tmp_path, 0) is not None  # the server may not have had that of round 2


def test_a_client_goes_on_from_its_file_or_begins_anew(tmp_path: Path) -> None:
    state = ClientState(3, 7, 9, {"b": torch.ones(1)})
    app.write_checkpoint(tmp_path / "checkpoint", 3, {"a": torch.zeros(1)}, {1: state})
    folder = tmp_path / "checkpoint"
    for place in (folder, folder / "clients" / "1.safetensors"):
        found = app.checkpoint_state({"checkpoint": str(place)}, 1)
        assert found is not None
        assert (found.round, found.cursor, found.step, found.tensors["b"].item()) == (3, 7, 9, 1.0)
    assert app.checkpoint_state({"checkpoint": str(folder)}, 0) is None
    assert app.checkpoint_state({}, 1) is None
    (tmp_path / "text.safetensors").write_text("none")
    for wrong in ("nowhere", "checkpoint/clients", "checkpoint/server.safetensors", "text.safetensors", "."):
        with pytest.raises(UserError) as error:
            app.checkpoint_state({"checkpoint": str(tmp_path / wrong)}, 1)
        assert error.value.field == "checkpoint"
        assert len(str(error.value).splitlines()) == 1


class Word:
    """A message of Flower's."""

    numbers = count()

    def __init__(
        self, content: Any, dst_node_id: int, message_type: str, *, ttl: float, group_id: str = "", reply_to: str = ""
    ) -> None:
        self.content, self.error, self.made = content, SimpleNamespace(reason=content, code=5), time.monotonic()
        self.metadata = SimpleNamespace(message_id=f"{next(self.numbers)}", dst_node_id=dst_node_id, ttl=ttl)
        self.metadata.reply_to_message_id, self.metadata.src_node_id = reply_to, dst_node_id

    def has_error(self) -> bool:
        return isinstance(self.content, str)


def answered(to: Any, content: Any) -> Word:
    return Word(content, to.metadata.dst_node_id, "query", ttl=1.0, reply_to=to.metadata.message_id)


def _log(level: int, text: str, *words: object) -> None:
    print(text % words)


def without_flower(monkeypatch: pytest.MonkeyPatch, others: Mapping[str, Mapping[str, Any]]) -> None:
    """Names that Flower's half imports, for Flower needs an environment of its own."""

    class ServerApp:
        def main(self) -> Any:
            return lambda function: function

    names = ("ArrayRecord", "ConfigRecord", "Context", "Metadata", "MetricRecord", "RecordDict")
    app = {**dict.fromkeys(names, dict), "Message": Word, "MessageType": SimpleNamespace(QUERY="query")}
    for name, parts in {
        **{"flwr": {}, "flwr.common": {}, "flwr.common.logger": {"log": _log}, "flwr.app": app},
        **{"flwr.serverapp": {"Grid": object, "ServerApp": ServerApp}, "flwr.serverapp.strategy": {"Strategy": object}},
        **others,
    }.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**parts))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`MethodStrategy`."""
    names = ("download_record", "payload_bytes", "reply_of", "tensor_bytes")
    without_flower(monkeypatch, {"rayfed_sub.deployment.records": dict.fromkeys(names)})
    found = runpy.run_path(str(Path(deployment.__file__).parent / "strategy.py"))["MethodStrategy"]
    found.__init__.__globals__.update(_LOOK=0.01, _ANSWER=0.2, _AGAIN=0.05)
    return found


def test_answers_belong_to_the_client_and_round_of_their_message(
    setup: Setup, weights: dict[str, torch.Tensor], made: Any
) -> None:
    """The SuperLink, node 1, answers for a node that is gone; an answer to an earlier round's message is dropped."""
    strategy = made(server.begin(setup, weights), wait=0.0, answer=0.0)
    old, new = (Word({}, node, "train", ttl=1.0) for node in (40, 42))
    strategy._nodes, strategy._sent, strategy._words = {2: 42}, {2: {}}, {2: new.metadata}
    messages = [answered(one, "the node is gone") for one in (new, old)]
    for one in messages:
        one.metadata.src_node_id = 1
    (found,) = strategy._replies(messages).items()
    assert found[0] == found[1].update.client == 2
    assert found[1].update.failure == "the node is gone (Flower's error 5)"


class Grid:
    """Nodes that are online; says: by node what it answers when it is asked who it is, None for no answer."""

    def __init__(self, **says: Any) -> None:
        self.says = {int(name[1:]): what for name, what in says.items()}
        self.asked: list[int] = []
        self._waiting: dict[str, Word] = {}

    def get_node_ids(self) -> list[int]:
        return list(self.says)

    def push_messages(self, messages: Sequence[Word]) -> list[str]:
        self.asked += [one.metadata.dst_node_id for one in messages]
        self._waiting |= {one.metadata.message_id: one for one in messages}
        return [one.metadata.message_id for one in messages]

    def pull_messages(self, numbers: Sequence[str]) -> list[Word]:
        found = []
        for number in numbers:
            content = self._content(self._waiting[number])
            if content is not None:
                found.append(answered(self._waiting.pop(number), content))
        return found

    def _content(self, question: Word) -> Any:
        what = self.says.get(question.metadata.dst_node_id)
        if what is None:
            return "expired" if time.monotonic() - question.made > question.metadata.ttl else None
        return what if isinstance(what, str) else {"node": {"partition-id": what}}


def test_a_silent_node_costs_no_round_more_than_once(setup: Setup, weights: dict[str, torch.Tensor], made: Any) -> None:
    """The first round waits for its answer, later ones do not, also when its question has expired and it is asked
    again."""
    strategy, grid = made(server.begin(setup, weights), wait=0.3, answer=9.0), Grid(n40=0, n41=None)
    seconds = []
    for _ in range(6):
        began = time.monotonic()
        assert strategy._connected(grid, [0]) == {0: 40}
        seconds.append(time.monotonic() - began)
        time.sleep(0.15)
    assert grid.asked[:3] == [40, 41, 41]
    assert seconds[0] > 0.2
    assert max(seconds[1:]) < 0.1
    grid.says[41] = 1
    assert strategy._connected(grid, [0, 1]) == {0: 40, 1: 41}


def test_a_node_that_cannot_say_who_it_is_is_named_and_asked_again(
    setup: Setup, weights: dict[str, torch.Tensor], made: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    strategy, grid = made(server.begin(setup, weights), wait=0.3, answer=9.0), Grid(n40="no partition-id")
    assert strategy._connected(grid, [0]) == {}
    assert len(grid.asked) > 2
    assert "no partition-id (Flower's error 5)" in capsys.readouterr().out
    grid.says[40] = 0
    assert strategy._connected(grid, [0]) == {0: 40}


def test_of_two_nodes_of_one_client_the_later_one_counts(
    setup: Setup, weights: dict[str, torch.Tensor], made: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    strategy, grid = made(server.begin(setup, weights), wait=5.0, answer=9.0), Grid(n40=0)
    assert strategy._connected(grid, [0]) == {0: 40}
    grid.says[41] = 0
    assert strategy._connected(grid, [0]) == {0: 41}
    assert "node 41 has partition-id=0, as node 40 has" in capsys.readouterr().out
    assert strategy._connected(grid, [0]) == {0: 41}
    assert grid.asked == [40, 41]
    del grid.says[41]
    assert strategy._connected(grid, [0]) == {0: 40}


def test_finished_rounds_outlive_a_round_that_fails(
    setup: Setup, weights: dict[str, torch.Tensor], dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ServerApp of a run that ends in its second round writes what another one goes on from."""
    server_rule = setup.config.server.model_copy(update={"optimizer": "momentum"})
    setup = replace(setup, config=setup.config.model_copy(update={"server": server_rule}))
    whole = Nodes(server.begin(setup, weights), weights, dataset, tmp_path / "whole")
    whole.round()
    after = whole.federation

    class Failing:
        def __init__(self, federation: Federation, finished: Callable[[Federation], None], **_: object) -> None:
            self.federation, self._finished = federation, finished

        def start(self, **_: object) -> None:
            self.federation = after
            self._finished(after)
            raise RunError("client", "lost", round=1, resume=None)

    without_flower(monkeypatch, {"rayfed_sub.deployment.strategy": {"MethodStrategy": Failing}})
    monkeypatch.setattr(app, "setup_of", lambda values: setup)
    main = runpy.run_path(str(Path(export.__file__).parent / "flower_app" / "server_app.py"))["main"]
    values = {**app.APP_KEYS, "output-dir": str(tmp_path)}
    with pytest.raises(RunError, match="lost"):
        main(None, SimpleNamespace(run_config=values, run_id=5))
    found = app.read_checkpoint(str(tmp_path / "5"))
    assert found is not None
    assert found[0].round == 1
    assert after.memory
    for wanted, tensors in ((after.server.tensors, found[0].tensors), (after.memory, found[1])):
        assert wanted.keys() == tensors.keys()
        assert all(torch.equal(x, tensors[name]) for name, x in wanted.items())


@pytest.mark.parametrize("rule", ["stop", "skip"])
def test_an_update_that_is_not_finite_is_a_failed_client(
    rule: str, setup: Setup, weights: dict[str, torch.Tensor], dataset: Dataset, tmp_path: Path
) -> None:
    config = setup.config
    federation = config.federation.model_copy(update={"on_client_failure": rule})
    changed = replace(setup, config=config.model_copy(update={"federation": federation}))
    nodes = Nodes(server.begin(changed, weights), weights, dataset, tmp_path)
    good, bad = map(nodes.train, server.cohort(nodes.federation))
    name, tensor = next(iter(bad.update.tensors.items()))
    update = replace(bad.update, tensors={**bad.update.tensors, name: tensor * float("nan")})
    replies = [good, replace(bad, update=update)]
    if rule == "stop":
        with pytest.raises(RunError, match=f"round 0, client {update.client}.*non-finite values in {name}"):
            server.finish(nodes.federation, replies)
        return
    after = server.finish(nodes.federation, replies)
    alone = server.finish(nodes.federation, [good])
    assert server.weights_sha256(after, weights) == server.weights_sha256(alone, weights)
    assert set(after.since) == {good.update.client}


def with_task(setup: Setup, **changes: object) -> Setup:
    task = setup.config.task.model_copy(update={"name": "table", "path": "none.csv", "prompt": "{q}", **changes})
    return replace(setup, config=setup.config.model_copy(update={"task": task}))


@pytest.mark.parametrize("rows", [1, 30])
def test_a_node_s_own_rows_are_its_client_s(setup: Setup, tmp_path: Path, rows: int) -> None:
    """All of them, whatever splits and how many rows the federation's task names."""
    (tmp_path / "mine.csv").write_text("q,a\n" + "".join(f"what {i},{i * i}\n" for i in range(rows)))
    others = {"test": ("not-here.csv",), "split_column": "part", "validation_share": 0.2, "max_rows": 8}
    for changes in ({}, others):
        dataset = rows_of(with_task(setup, answer="a", **changes), 2, tmp_path / "mine.csv")
        assert len(dataset.rows_of(2)) == len(dataset.train) == rows
        assert len(dataset.rows_of(0)) == len(dataset.rows_of(1)) == len(dataset.held_out) == 0


def test_a_node_s_own_rows_may_lack_classes(setup: Setup, tmp_path: Path) -> None:
    """They are numbered as the federation's; strange ones are refused."""
    (tmp_path / "mine.jsonl").write_text(
        '{"q": "a", "kind": "pos", "score": 2, "tags": ["y"]}\n{"q": "b", "kind": "neu", "score": 3, "tags": []}\n'
    )
    told = {
        "kind": ("classification", ("pos", "neg", "neu"), [0, 2]),
        "score": ("regression", (), [[2.0], [3.0]]),
        "tags": ("multi-label", ("x", "y", "z"), [[0, 1, 0], [0, 0, 0]]),
    }
    for column, (problem, classes, targets) in told.items():
        own = replace(with_task(setup, label=column), problem=problem, classes=classes)
        dataset = rows_of(own, 1, tmp_path / "mine.jsonl")
        assert sorted(dataset.train.classes.tolist()) == sorted(targets)  # type: ignore[union-attr]
        assert dataset.class_names == classes
    numbered = replace(with_task(setup, label="tags"), problem="multi-label", classes=("0", "1", "2", "3"))
    (tmp_path / "numbers.jsonl").write_text('{"q": "a", "tags": [0, 1]}\n{"q": "b", "tags": [1, 0]}\n')
    with pytest.raises(UserError, match="rows with all of the labels 0, 1, 2, 3"):
        rows_of(numbered, 1, tmp_path / "numbers.jsonl")
    strange = replace(with_task(setup, label="kind"), classes=("neg", "neu"))
    with pytest.raises(UserError, match="rows of the classes neg, neu; these have pos"):
        rows_of(strange, 1, tmp_path / "mine.jsonl")


def test_a_node_s_own_rows_have_the_federation_s_spelling_of_classes(setup: Setup, tmp_path: Path) -> None:
    """What 1.0 and true stand for follows from all names of a column, of which the node's are a part."""
    for classes, cells, numbers in (
        (("1.0", "2.5", "none"), ["1.0"], [0]),
        (("maybe", "true"), ["true", "maybe"], [0, 1]),
        (("False", "True"), ["true"], [1]),
        (("1", "2"), ["1.0", "2"], [0, 1]),
    ):
        (tmp_path / "mine.csv").write_text("q,kind\n" + "".join(f"row {i},{cell}\n" for i, cell in enumerate(cells)))
        own = replace(with_task(setup, label="kind"), problem="classification", classes=classes)
        dataset = rows_of(own, 1, tmp_path / "mine.csv")
        assert sorted(dataset.train.classes.tolist()) == numbers  # type: ignore[union-attr]


def test_a_node_s_own_rows_of_a_split_are_trained_on(setup: Setup, tmp_path: Path) -> None:
    """Where the node's table has the task's column of splits, its rows of training alone; test rows may lack labels."""
    rows = [("a", "fit", 1), ("b", "fit", 0), ("c", "test", -1)]
    (tmp_path / "mine.csv").write_text("q,part,kind\n" + "".join(f"{q},{part},{kind}\n" for q, part, kind in rows))
    own = with_task(setup, label="kind", split_column="part", train="fit")
    own = replace(own, problem="classification", classes=("0", "1"))
    assert len(rows_of(own, 1, tmp_path / "mine.csv").train) == 2


def test_a_checkpoint_needs_rounds_to_go_on_to(setup: Setup, weights: dict[str, torch.Tensor]) -> None:
    done = setup.config.federation.rounds
    assert done is not None
    before = server.begin(setup, weights).server
    allowed = f"federation.rounds: got {done}; allowed: more than {done}, the rounds of the checkpoint"
    with pytest.raises(UserError, match=f"^{allowed}"):
        server.begin(setup, weights, (replace(before, round=done), {}))
    assert server.begin(setup, weights, (replace(before, round=done - 1), {})).round == done - 1


@pytest.mark.parametrize(
    "change",
    [
        {"privacy": {"clip": 1.0, "noise": 1.0}},
        {"devices": {"classes": {"a": {"seconds_per_step": 1.0}}}},
        {"model": {"path": "random", "start_from": "somewhere"}},
        {"early_stopping": {"metric": "held_out_loss"}, "evaluation": {"split": "validation"}},
        {"resources": {"executor": "reference"}},
        {"callbacks": ["package.module:function"]},
        {"task": {"name": "given"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_real_machines_cannot_have_is_refused(change: dict[str, dict[str, object]]) -> None:
    field = next(iter(change))
    with pytest.raises(UserError) as error:
        set_up(Config(**{**CONFIG, "method": {"name": "fedit"}, **change}))
    assert error.value.field.startswith(field)
    assert "real machines" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_flat_keys_are_a_configuration() -> None:
    found = run_config(
        {"name": "x", "optimizer.lr": 1e-05, "method.name": "fedit", "federation.normalise_steps": False}
    )
    assert (found.optimizer.lr, found.method, found.federation.normalise_steps) == (1e-05, {"name": "fedit"}, False)


def test_updates_are_added_by_work_and_number(setup: Setup, weights: dict[str, torch.Tensor]) -> None:
    """1e8 - 1e8 + 1 is 1 in float32, 1 + 1e8 - 1e8 is 0: the order of the sum shows."""
    federation = server.begin(setup, weights)
    layer = setup.shape.targets[0]

    def reply(client: int, place: tuple[int, int], value: float) -> Reply:
        tensors = {}
        for target in setup.shape.targets:
            tensors[f"{target.name}/weight"] = torch.full((target.m, target.n), value)
        return Reply(Update(client, 1.0, tensors), place)

    replies = [reply(0, (-2, -1), 1e8), reply(1, (-2, -1), -1e8), reply(2, (-1, -9), 1.0)]
    sums = [server.finish(federation, order).server for order in (replies, replies[::-1])]
    name = f"{layer.name}/weight"
    before = federation.server.tensors[name]
    assert torch.equal(sums[0].tensors[name], sums[1].tensors[name])
    assert torch.allclose(sums[0].tensors[name], before + 1 / 3)
