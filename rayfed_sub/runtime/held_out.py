"""Held-out evaluation by the workers, in a fixed order of rows: the same scores for any number of workers.

A global model is evaluated on shards of the chosen rows.  Where every client has a model of its own, each row is
evaluated by the client whose data it resembles (`Dataset.held_out_clients`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from rayfed_sub.config.schema import Config
from rayfed_sub.core.schemas import AnswerRow, Score
from rayfed_sub.data.dataset import Dataset
from rayfed_sub.data.objects import Objects
from rayfed_sub.evaluation.named_metrics import Compute
from rayfed_sub.evaluation.scores import batch_scores, label_scores, number_and_set_scores, text_scores, token_scores
from rayfed_sub.planning.sampling import judged_rows
from rayfed_sub.runtime.scheduler import WorkItem
from rayfed_sub.runtime.workers import Workers

T = TypeVar("T")


@dataclass(frozen=True)
class JudgedModel:
    """Model to evaluate.  broadcast: handle; stored: function to a client's stored state, for methods whose clients
    have models of their own (None: one model for all)."""

    broadcast: Any
    stored: Callable[[int], Any] | None


def scores(
    workers: Workers, config: Config, dataset: Dataset, model: JudgedModel, metrics: Mapping[str, Compute]
) -> list[Score]:
    """The scores of `evaluation.eval_rows` held-out rows; metrics: those of the configuration."""
    shards = _shards(config, dataset, config.evaluation.eval_rows, model)
    if isinstance(dataset.held_out, Objects):
        measured = _each(workers, shards, model, lambda worker: worker.measure, "held-out rows")
        clients = [int(dataset.held_out_clients[rows[0]]) for _, rows in shards]
        return [
            replace(score, split=dataset.split) for score in batch_scores(list(zip(clients, measured, strict=True)))
        ]
    done = _each(workers, shards, model, lambda worker: worker.evaluate, "held-out rows")
    rows = [(int(dataset.held_out_clients[row]), prediction) for row, prediction in _by_row(shards, done)]
    names = dataset.class_names
    if dataset.kind in ("regression", "multi-label"):
        found = number_and_set_scores(rows, names, metrics)
    else:
        found = label_scores(rows, names, metrics) if names else token_scores(rows)
    return [replace(score, split=dataset.split) for score in found]


def answers(
    workers: Workers,
    config: Config,
    dataset: Dataset,
    model: JudgedModel,
    metrics: Mapping[str, Compute],
    rounds: int,
) -> tuple[list[Score], list[AnswerRow]]:
    """The answers to `evaluation.generate_rows` held-out questions, by row, and their scores; nothing where that is 0.
    rounds: finished ones."""
    if not config.evaluation.generate_rows:
        return [], []
    shards = _shards(config, dataset, config.evaluation.generate_rows, model)
    done = _each(workers, shards, model, lambda worker: worker.generate, "generated answers")
    found = [(row, int(dataset.held_out_clients[row]), answer) for row, answer in _by_row(shards, done)]
    given = [AnswerRow(rounds, row, k, one.question, one.reference, one.answer) for row, k, one in found]
    scored = text_scores([(client, answer) for _, client, answer in found], metrics)
    return [replace(score, split=dataset.split) for score in scored], sorted(given, key=lambda answer: answer.row)


def _by_row(shards: Sequence[tuple[int | None, list[int]]], done: Sequence[Sequence[T]]) -> Iterator[tuple[int, T]]:
    """Each held-out row with its result."""
    pairs = zip(shards, done, strict=True)
    return ((row, found) for (_, rows), all_found in pairs for row, found in zip(rows, all_found, strict=True))


def _shards(config: Config, dataset: Dataset, most: int, model: JudgedModel) -> list[tuple[int | None, list[int]]]:
    """Shards of the rows to evaluate: (client or None, rows).  Rows of a shard that is scored as a whole are of one
    client, too."""
    chosen = judged_rows(config, len(dataset.held_out), most)
    size, personal = config.evaluation.batch_size, model.stored is not None
    if not personal and not isinstance(dataset.held_out, Objects):
        return [(None, chosen[i : i + size]) for i in range(0, len(chosen), size)]
    owned: dict[int, list[int]] = {}
    for row in chosen:
        owned.setdefault(int(dataset.held_out_clients[row]), []).append(row)
    by_client = [(k, rows[i : i + size]) for k, rows in sorted(owned.items()) for i in range(0, len(rows), size)]
    return [(client if personal else None, rows) for client, rows in by_client]


def _each(
    workers: Workers,
    shards: Sequence[tuple[int | None, list[int]]],
    model: JudgedModel,
    call: Callable[[Any], Any],
    stage: str,
) -> list[Any]:
    def item(index: int, client: int | None, rows: list[int]) -> WorkItem:
        def submit(worker: Any) -> Any:
            state = None if client is None or model.stored is None else model.stored(client)
            return call(worker).remote(rows, model.broadcast, client, state)

        return WorkItem(submit, index % workers.count, f"shard {index}")

    items = [item(index, client, rows) for index, (client, rows) in enumerate(shards)]
    return [done.result for done in workers.in_order(items, stage)]
