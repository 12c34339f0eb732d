"""One client's round around its local steps, as every place that trains clients walks it: its batches, the rule of its
steps, and what becomes of the result."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rayfed_sub.core.finite import not_finite
from rayfed_sub.core.types import Broadcast, ClientState, LocalResult, ModelShape, Update
from rayfed_sub.data.batching import ClientBatches
from rayfed_sub.data.rows import Ints
from rayfed_sub.methods.protocol import Method
from rayfed_sub.privacy.examples import row_privacy
from rayfed_sub.training.pack_step import LocalRule

if TYPE_CHECKING:
    from rayfed_sub.config.schema import Config
    from rayfed_sub.data.dataset import Dataset


def batches(
    config: Config, dataset: Dataset, rows: Ints, client: int, cursor: int, steps: int, *, pad: int, apart: bool
) -> ClientBatches:
    """The batches of the client's next `steps` local steps.  rows: its indices into dataset.train; cursor: steps that
    it has ever taken; apart: whether a row's prompt and answer are two texts."""
    federation, task = config.federation, config.task
    return ClientBatches(
        dataset.train,
        rows,
        config.seed,
        client,
        federation.batch_size,
        0 if federation.same_batches else cursor,
        steps,
        task.mask_prompt,
        pad,
        federation.batching,
        apart,
        config.privacy.of_examples,
    )


def local_rule(config: Config, lr: float, *, pad: int, recompute: bool, noise: float | None = None) -> LocalRule:
    """The rule of a round's local steps.  lr, pad, recompute: see `LocalRule`; noise: of privacy for single rows."""
    how = (config.federation.proximal, config.resources.micro_batch, recompute)
    return LocalRule(config.optimizer, lr, config.seed, pad, *how, privacy=row_privacy(config.privacy, noise))


def ended(
    method: Method,
    broadcast: Broadcast,
    result: LocalResult,
    state: ClientState | None,
    weight: float,
    shape: ModelShape,
) -> tuple[Update, ClientState] | str:
    """A client's update and next state, or the cause of its failure.  state: with which it began; weight: see
    `Method.upload`."""
    if result.failure is not None:
        return result.failure
    update = method.upload(broadcast, result, weight, shape)
    cursor = (state.cursor if state else 0) + int(result.metrics["steps"])
    new = ClientState(broadcast.round + 1, cursor, result.step, method.client_state(broadcast, result, shape))
    return not_finite(update.tensors) or not_finite(new.tensors) or (update, new)
