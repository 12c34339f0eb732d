"""A Flower strategy whose rounds are those of a method of rayfed_sub.

Clients are numbers, the `partition-id` of their nodes: sampling, batches and the order of every sum follow from them,
so neither the order in which nodes connect nor that in which they answer changes the result.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from logging import INFO, WARNING
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, Metadata, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from rayfed_sub.core.types import Update
from rayfed_sub.deployment import server
from rayfed_sub.deployment.records import download_record, payload_bytes, reply_of, tensor_bytes
from rayfed_sub.deployment.server import Federation, Reply

PARTITION = "partition-id"
"""Key of a node's configuration with the number of its client."""
CLIENT = "client"
"""Record of a message with the number of the client that it is for, under `PARTITION`."""
_LOOK = 1.0  # seconds between two looks for nodes
_ANSWER = 60.0  # seconds for a new node to say which client it is, before a round begins without it
_AGAIN = 30.0  # seconds after which a node that answered by an error is asked again
_AFTER = 60.0  # seconds that a message outlives the round's time for answers, which begins once it has been sent
_RAISED = 2  # Flower's error of a ClientApp that raised one


class MethodStrategy(Strategy):  # type: ignore[misc]  # Flower's classes have no types here
    """Sends every client of a round's cohort what it lacks, and adds up what comes back.

    federation: where the run stands; its property `federation` has the present one.  wait: seconds to wait for nodes of
    the cohort's clients before a round; answer: seconds that a round's answers may take.  A client without a node, or
    without an answer in time, has failed, as one whose training fails: federation.on_client_failure decides.
    log_file: gets a line of JSON for every client and round, with its bytes as counted and as sent; None: no file.
    finished: gets the federation after every round.
    """

    def __init__(
        self,
        federation: Federation,
        *,
        wait: float,
        answer: float,
        log_file: Path | None = None,
        finished: Callable[[Federation], None] = lambda federation: None,
    ) -> None:
        self.federation = federation
        self._wait, self._answer, self._log_file, self._finished = wait, answer, log_file, finished
        self._clients: dict[int, int] = {}  # node -> its client, of nodes that have said so
        self._asked: dict[str, int] = {}  # question -> node, of those that have not answered yet
        self._later: dict[int, float] = {}  # node -> when it may be asked again
        self._met: set[int] = set()  # nodes that have been asked before
        self._sent: dict[int, dict[str, Any]] = {}  # client -> what the log says of its message
        self._words: dict[int, Metadata] = {}  # client -> its message's metadata
        self._grid: Grid | None = None
        self._nodes: dict[int, int] = {}  # client -> node, of the round

    def summary(self) -> None:
        """Logs the run in a line."""
        config = self.federation.setup.config
        of = f"{config.federation.cohort} of {config.federation.clients} clients a round"
        log(INFO, "\t└──> %s, %s, %s rounds", config.method["name"], of, config.federation.rounds)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """A message for each client of the cohort that has a node."""
        cohort = server.cohort(self.federation)
        self._grid, self._sent = grid, {client: {} for client in cohort}
        self._nodes = self._connected(grid, cohort)
        log(INFO, "configure_train: clients %s", ", ".join(map(str, self._nodes)) or "none")
        return list(self._messages(self._nodes))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Finishes the round.  Raises RunError where a client has failed and that is not to be skipped."""
        found = self._replies(replies)
        without = [client for client, reply in found.items() if not reply.holds]
        if without and self._grid is not None:  # the node is a new one, or has lost its files: all of it again
            log(WARNING, "clients %s hold no version: they receive all", ", ".join(map(str, without)))
            messages = self._messages({client: self._nodes[client] for client in without}, anew=True)
            found |= self._replies(self._grid.send_and_receive(list(messages), timeout=self._answer))
        for client in self._sent:
            cause = "no answer in time" if client in self._nodes else f"no node with {PARTITION}={client}"
            found.setdefault(client, Reply(Update(client, 0.0, {}, {}, cause)))
        rows = [self._row(client, reply) for client, reply in sorted(found.items())]
        self._write(rows)
        for row in rows:
            if row["failure"] is not None:
                log(WARNING, "client %s failed: %s", row["client"], row["failure"])
        self.federation = server.finish(self.federation, list(found.values()))
        self._finished(self.federation)
        return None, MetricRecord(_summed(rows))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """None: evaluation would send the model to clients that do not train."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """None, see `configure_evaluate`."""
        return None

    def _connected(self, grid: Grid, cohort: Sequence[int]) -> dict[int, int]:
        """The nodes of these clients, by client, of those that come within the time to wait."""
        began, waited, new = time.monotonic(), False, set[int]()
        while True:
            online = list(grid.get_node_ids())
            self._clients = {node: client for node, client in self._clients.items() if node in online}
            new |= self._ask(grid, online)
            self._listen(grid)
            nodes = {client: node for node, client in self._clients.items()}  # of two of one client the later one
            found = {client: nodes[client] for client in cohort if client in nodes}
            passed = time.monotonic() - began
            # A new node may be a client's that was here before: the one that it was may be gone without a word.
            asking = passed < _ANSWER and not new.isdisjoint(self._asked.values())
            if passed > self._wait or (len(found) == len(cohort) and not asking):
                return found
            if not waited and len(found) < len(cohort):
                absent = ", ".join(str(client) for client in cohort if client not in found)
                log(INFO, "waiting for nodes with %s %s", PARTITION, absent)
                waited = True
            time.sleep(_LOOK)

    def _ask(self, grid: Grid, online: Sequence[int]) -> set[int]:
        """Asks the nodes whose client is not known which it is; returns those that were never asked before."""
        known, now = {*self._clients, *self._asked.values()}, time.monotonic()
        new = [node for node in online if node not in known and self._later.get(node, now) <= now]
        ttl = max(self._wait, _ANSWER)
        questions = [Message(RecordDict(), node, MessageType.QUERY, ttl=ttl) for node in new]
        if questions:
            grid.push_messages(questions)
        self._asked |= {one.metadata.message_id: one.metadata.dst_node_id for one in questions}
        never = {*new} - self._met
        self._met |= never
        return never

    def _listen(self, grid: Grid) -> None:
        """Reads the answers that have come."""
        for answer in grid.pull_messages(list(self._asked)) if self._asked else ():
            node = self._asked.pop(answer.metadata.reply_to_message_id)
            if answer.has_error():
                log(WARNING, "node %s does not say which client it is: %s", node, _cause(answer))
                self._later[node] = time.monotonic() + _AGAIN
                continue
            client = int(answer.content["node"][PARTITION])
            if others := [other for other, its in self._clients.items() if its == client]:
                known = ", ".join(map(str, others))
                log(WARNING, "node %s has %s=%s, as node %s has: the later one counts", node, PARTITION, client, known)
            self._clients[node] = client

    def _messages(self, nodes: Mapping[int, int], *, anew: bool = False) -> Iterator[Message]:
        for client, node in nodes.items():
            content = download_record(server.download(self.federation, client, anew=anew))
            content[CLIENT] = ConfigRecord({PARTITION: client})
            counted = server.counted_bytes(self.federation, client, anew=anew)
            down, before = {"down_counted": counted, **_sizes("down", content)}, self._sent[client]
            self._sent[client] = {name: value + before.get(name, 0) for name, value in down.items()}
            # A node that is late forgets what nobody waits for any more.
            how = {"ttl": self._answer + _AFTER, "group_id": str(self.federation.round + 1)}
            message = Message(content, dst_node_id=node, message_type=MessageType.TRAIN, **how)
            self._words[client] = message.metadata
            yield message

    def _replies(self, messages: Iterable[Message]) -> dict[int, Reply]:
        """The answers by client; an error of Flower's is its client's failure."""
        # By the message that is answered, not by the sender: the error of a node that is gone comes from the SuperLink.
        of = {self._words[client].message_id: client for client in self._nodes}
        found = dict[int, Reply]()
        for message in messages:
            client = of.get(message.metadata.reply_to_message_id, -1)
            if client < 0:  # to what a round before has asked
                continue
            if message.has_error():
                found[client] = Reply(Update(client, 0.0, {}, {}, _cause(message)))
                if message.error.code == _RAISED:  # it may have another number now: it is asked again
                    self._clients.pop(self._nodes[client], None)
                continue
            reply = reply_of(message.content)
            self._sent[client] |= _sizes("up", message.content)
            found[client] = replace(reply, update=replace(reply.update, client=client))  # whatever the node says
        return found

    def _row(self, client: int, reply: Reply) -> dict[str, Any]:
        update = server.checked(reply.update)
        about = {"round": self.federation.round, "client": client, "failure": update.failure, "weight": update.weight}
        up = {} if update.failure is not None else {"up_counted": update.wire_bytes}
        return {**about, **self._sent[client], **up, "loss": update.metrics.get("loss")}

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        if self._log_file is not None:
            with self._log_file.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)


def _cause(message: Message) -> str:
    return f"{message.error.reason or 'error'} (Flower's error {message.error.code})"


def _sizes(way: str, content: RecordDict) -> dict[str, int]:
    """What a message's content takes: number of its arrays, bytes of their tensors, and bytes with all framing."""
    arrays, tensors = len(content["arrays"]), tensor_bytes(content)
    return {f"{way}_arrays": arrays, f"{way}_bytes": tensors, f"{way}_payload": payload_bytes(content)}


def _summed(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """A round's sums for Flower's log: mean training loss, failed clients, bytes of tensors."""
    losses = [row["loss"] for row in rows if row["failure"] is None and row["loss"] is not None]
    loss = {"train-loss": sum(losses) / len(losses)} if losses else {}
    failed = sum(row["failure"] is not None for row in rows)
    up, down = (sum(row.get(f"{way}_bytes", 0) for row in rows) for way in ("up", "down"))
    return {**loss, "failed": failed, "uplink-bytes": up, "downlink-bytes": down}
