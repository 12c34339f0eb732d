"""Held-out evaluation by the workers, on fixed shards, folded in order: the same numbers for any number of workers.

Methods with one model for all are judged on shards of the chosen rows.  Where every client has a model of its own, each
row is judged by the client whose partition key it carries, or, without such keys, by the clients in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rayfed_sub.config import Config
from rayfed_sub.data.dataset import Dataset
from rayfed_sub.engine.schedule import Crew, Piece, in_order
from rayfed_sub.metrics import rouge_l
from rayfed_sub.streams import stream


@dataclass(frozen=True)
class Model:
    """The model to judge: the broadcast of finished round `round`; stored: a client's stored state, for methods whose
    clients have models of their own (None: one model for all)."""

    round: int
    broadcast: Any
    stored: Callable[[int], Any] | None


def held_out_loss(crew: Crew, config: Config, dataset: Dataset, model: Model) -> float:
    """Mean loss (nats per label) on `evaluation.examples` held-out rows."""
    shards = _shards(config, dataset, config.evaluation.examples, model)
    done = _each(crew, shards, model, lambda worker: worker.evaluate, "held-out loss")
    total, labels = (sum(column) for column in zip(*done, strict=True))
    return float(total) / max(1, int(labels))


def held_out_rouge(crew: Crew, config: Config, dataset: Dataset, model: Model) -> float | None:
    """ROUGE-L (0..1) of greedy answers to `evaluation.generate` held-out questions; None when none are asked for."""
    if not config.evaluation.generate:
        return None
    shards = _shards(config, dataset, config.evaluation.generate, model)
    done = _each(crew, shards, model, lambda worker: worker.generate, "generated answers")
    told = [text for texts in done for text in texts]
    return rouge_l(told, [dataset.references[row] for _, rows in shards for row in rows])


def _shards(config: Config, dataset: Dataset, most: int, model: Model) -> list[tuple[int | None, list[int]]]:
    """(client or None, rows): a fixed, seeded choice of held-out rows; a longer choice contains the shorter one."""
    chosen = sorted(stream(config.seed, "held-out choice").permutation(len(dataset.held_out))[:most].tolist())
    size = config.evaluation.batch_size
    if model.stored is None:
        return [(None, chosen[i : i + size]) for i in range(0, len(chosen), size)]
    owned: dict[int, list[int]] = {}
    for row in chosen:
        owner = int(dataset.held_out_clients[row])
        owned.setdefault(owner if owner >= 0 else row % config.federation.clients, []).append(row)
    return [(k, rows[i : i + size]) for k, rows in sorted(owned.items()) for i in range(0, len(rows), size)]


def _each(
    crew: Crew,
    shards: Sequence[tuple[int | None, list[int]]],
    model: Model,
    call: Callable[[Any], Any],
    stage: str,
) -> list[Any]:
    def piece(index: int, client: int | None, rows: list[int]) -> Piece:
        def submit(worker: Any) -> Any:
            state = None if client is None or model.stored is None else model.stored(client)
            return call(worker).remote(model.round, rows, model.broadcast, client, state)

        return Piece(submit, index % len(crew.workers), f"shard {index}")

    pieces = [piece(index, client, rows) for index, (client, rows) in enumerate(shards)]
    return [done.result for done in in_order(crew, pieces, stage)]
