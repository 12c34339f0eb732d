"""A step's batches as forward passes: one flat row of all tokens, or rows grouped by canonical length.

What a client computes follows from its own rows, whatever stands beside them: to which length they are filled up, and
in which order its parts are added.

Legend: G clients, B rows of a client, R of a pass, T tokens of a row, L a canonical length, S tokens of a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayfed_sub.core.devices import pinned, sent
from rayfed_sub.data.batching import IGNORED, Batch
from rayfed_sub.data.objects import OwnBatch
from rayfed_sub.models.flat_rows import FlatRows, PassRule, flat_rows
from rayfed_sub.training.own_loss import OwnPass

Labelled = Mapping[str, Tensor]
Numbers = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Pass:
    """One forward pass.

    inputs: the model's.  labels: those that there are, (L,) tokens or classes, or (L, C) numbers; places: (L,), where
    in the model's flattened output each is predicted, in language modelling at the token before it (of an
    encoder-decoder at its own place); rows: the number of each label's row, counted client by client over the step's
    batches; clients: its client's place in the step.  counts: labels of each client.
    of_tokens: True where labels are tokens of a language model.  answers: of an encoder-decoder the labels as (R, T),
    -100 where there is none, from which the decoder's inputs follow.
    parts: each client's tokens in a flat pass, its rows else; size: all of those, with what only fills the pass up.
    where: of each row of the pass, a token in a flat pass, (size, 3) int64: its client's place in the step, its row in
    the client's batch, its place in that row (of a whole row 0); anything for what only fills the pass up.
    flat: where the rows lie in a flat pass.  tokens: the real ones, and all that linear layers see.  filled: of rows
    with an attention mask, whether any of them is filled up.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    places: Tensor
    rows: Tensor
    clients: Tensor
    counts: tuple[int, ...]
    parts: tuple[int, ...]
    size: int
    tokens: tuple[int, int]
    where: Tensor
    of_tokens: bool = False
    flat: FlatRows | None = None
    answers: Tensor | None = None
    filled: bool | None = None

    def to(self, device: torch.device) -> Pass:
        """The pass on a device; the rows of its labels stay, for the model does not read them."""
        if device.type == self.labels.device.type:
            return self
        return self._each(partial(sent, device=device))

    def pinned(self, device: torch.device) -> Pass:
        """The pass where the device reads it by itself, before it is sent there."""
        return self if device.type == "cpu" else self._each(partial(pinned, device=device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Pass:
        """The pass with all of its tensors changed that go to the device."""
        return replace(
            self,
            inputs={name: change(tensor) for name, tensor in self.inputs.items()},
            labels=change(self.labels),
            places=change(self.places),
            clients=change(self.clients),
            where=change(self.where),
            flat=None if self.flat is None else self.flat.each(change),
            answers=None if self.answers is None else change(self.answers),
        )

    def from_row(self, first: int) -> Pass:
        """The pass of rows that stand so many further back in their clients' batches; `rows` stays."""
        return replace(self, where=self.where + torch.tensor([0, first, 0])) if first else self


AnyPass = Pass | OwnPass


def passes(batches: Sequence[Batch], rule: PassRule, pad: int, micro_batch: int | None = None) -> Sequence[AnyPass]:
    """The passes of a step, in the order in which their gradients are added.

    batches: one for each client, as `Batches` gives them; a text ends where its attention mask does.  pad: the token
    that fills up.  micro_batch: rows of a client in a pass at most.  Batches of the caller's own come one at a time,
    and whole.
    """
    if isinstance(batches[0], OwnBatch):
        assert len(batches) == 1, "the rows of several clients' own batches are not known"
        return [OwnPass(batches[0])]
    labelled = [batch for batch in batches if not isinstance(batch, OwnBatch)]
    rows = max(len(batch["labels"]) for batch in labelled)
    found = list[Pass]()
    for first in range(0, rows, micro_batch or rows):
        some = [{name: x[first : first + (micro_batch or rows)] for name, x in batch.items()} for batch in labelled]
        found += [one.from_row(first) for one in labelled_passes(some, rule, pad)]
    return found


def labelled_passes(batches: Sequence[Labelled], rule: PassRule, pad: int) -> list[Pass]:
    """The passes of batches with labels."""
    found = _labelled(batches, rule, pad)
    # All tokens of a pass are the client's, whatever the layers see of its rows.
    return [replace(one, parts=(1,), size=1) for one in found] if rule.alone and len(batches) == 1 else found


def _labelled(batches: Sequence[Labelled], rule: PassRule, pad: int) -> list[Pass]:
    if "input_ids" not in batches[0]:
        return [_images(batches, rule)]
    if rule.apart:
        return _apart(batches, rule, pad)
    texts = [_texts(batch) for batch in batches]
    if rule.flat and of_tokens(batches[0]["labels"]):
        return [_flat(texts, rule, pad)]
    lengths = {rule.canonical(int(length)) for text in texts for length in text.lengths}
    return [_grouped(texts, rule, pad, length) for length in sorted(lengths)]


def of_tokens(labels: Tensor) -> bool:
    """True for labels of tokens (B, T), which are whole numbers, as those of rows (B, C) are not."""
    return labels.dim() == 2 and not labels.is_floating_point()


@dataclass(frozen=True, eq=False)
class _Texts:
    """A client's rows, (B, T) each: tokens, whether a token is real, labels (B, T), or (B,) or (B, C) of rows; lengths
    (B,); types (B, T), of which text of a pair a token is, or None.  shifted: labels are of tokens."""

    ids: Numbers
    real: Numbers
    labels: Numbers
    lengths: Numbers
    types: Numbers | None
    shifted: bool


def _texts(batch: Labelled) -> _Texts:
    ids, labels, shifted = batch["input_ids"].numpy(), batch["labels"].numpy(), of_tokens(batch["labels"])
    real = batch["attention_mask"].numpy() != 0 if "attention_mask" in batch else np.ones(ids.shape, bool)
    if shifted:
        labels = labels.copy()
        labels[:, 0] = IGNORED
    types = batch["token_type_ids"].numpy() if "token_type_ids" in batch else None
    return _Texts(ids, real, labels, real.sum(axis=1), types, shifted)


def _flat(texts: Sequence[_Texts], rule: PassRule, pad: int) -> Pass:
    """All rows as one, each client's part filled up to a multiple of the granule."""
    own_G = [int(text.lengths.sum()) for text in texts]
    part_G = [-(-own // rule.granule) * rule.granule for own in own_G]
    S, begins = sum(part_G), list[Numbers]()
    ids_S, labels_S = np.full(S, pad, np.int64), np.full(S, IGNORED, np.int64)
    place_S, row_S, own_S = np.zeros(S, np.int64), np.zeros(S, np.int64), np.zeros(S, np.int64)
    begin = number = 0
    for text, own, part in zip(texts, own_G, part_G, strict=True):
        B, T = text.ids.shape
        here = slice(begin, begin + own)
        ids_S[here], labels_S[here] = text.ids[text.real], text.labels[text.real]
        place_S[here] = np.broadcast_to(np.arange(T), (B, T))[text.real]
        own_S[here] = np.repeat(np.arange(B), text.lengths)
        row_S[here] = number + own_S[here]
        begins.append(begin + np.cumsum(text.lengths) - text.lengths)
        begin, number = begin + part, number + B
    client_S = np.repeat(np.arange(len(texts)), part_G)
    inputs = {"input_ids": ids_S[None], "position_ids": place_S[None], "attention_mask": np.ones((1, S), np.int64)}
    lengths = np.concatenate([text.lengths for text in texts])
    flat = flat_rows(np.concatenate(begins).tolist(), lengths.tolist(), S, rule)
    where = np.stack([client_S, own_S, place_S], axis=1)
    tokens = (sum(own_G), S)
    return _pass(inputs, labels_S, row_S, client_S, part_G, S, tokens, where, of_tokens=True, shifted=True, flat=flat)


def _grouped(texts: Sequence[_Texts], rule: PassRule, pad: int, length: int) -> Pass:
    """The rows of one canonical length.  More rows fill the pass up where layers see one vector of each."""
    shifted = texts[0].shifted
    found, first = list[tuple[int, int, int]](), 0  # client, row of the client, number
    for g, text in enumerate(texts):
        found += [(g, b, first + b) for b, own in enumerate(text.lengths) if rule.canonical(int(own)) == length]
        first += len(text.lengths)
    R = len(found) if shifted else -(-len(found) // rule.rows) * rule.rows
    ids_RL, mask_RL = np.full((R, length), pad, np.int64), np.zeros((R, length), np.int64)
    labels = np.full((R, length) if shifted else R, IGNORED, np.int64)
    if texts[0].labels.dtype.kind == "f":
        labels = np.full((R, texts[0].labels.shape[1]), np.nan, np.float32)
    types_RL = None if texts[0].types is None else np.zeros((R, length), np.int64)
    for r, (g, b, _) in enumerate(found):
        text, own = texts[g], slice(int(texts[g].lengths[b]))
        ids_RL[r, own], mask_RL[r, own] = text.ids[b, own], 1
        if types_RL is not None and text.types is not None:
            types_RL[r, own] = text.types[b, own]
        if shifted:
            labels[r, own] = text.labels[b, own]
        else:
            labels[r] = text.labels[b]
    mask_RL[len(found) :, 0] = 1  # attention over nothing is NaN
    if rule.twins:
        ids_RL[len(found) :], mask_RL[len(found) :] = ids_RL[0], mask_RL[0]
    # Tokens of a causal model look to the left, where nothing is filled up.
    inputs = {"input_ids": ids_RL} if shifted else {"input_ids": ids_RL, "attention_mask": mask_RL}
    inputs |= {} if types_RL is None else {"token_type_ids": types_RL}
    row_R, client_R = (np.array([one[i] for one in found] + [0] * (R - len(found))) for i in (2, 0))
    where = np.array([(g, b, 0) for g, b, _ in found] + [(0, 0, 0)] * (R - len(found)))
    if shifted:
        labels, row_R, client_R = labels.reshape(-1), np.repeat(row_R, length), np.repeat(client_R, length)
    part_G = np.bincount([g for g, _, _ in found], minlength=len(texts)).tolist()
    tokens = (int(mask_RL[: len(found)].sum()), R * length)
    made = _pass(inputs, labels, row_R, client_R, part_G, R, tokens, where, of_tokens=shifted, shifted=shifted)
    return made if shifted else replace(made, filled=not mask_RL.all())


def _apart(batches: Sequence[Labelled], rule: PassRule, pad: int) -> list[Pass]:
    """Sources and answers, rows of equal canonical lengths of both in a pass."""
    found: dict[tuple[int, int], list[_Pair]] = {}
    number = 0
    for g, batch in enumerate(batches):
        ids, mask, labels = (batch[name].numpy() for name in ("input_ids", "attention_mask", "labels"))
        for b in range(len(ids)):
            pair = _Pair(g, b, number + b, ids[b, mask[b] != 0], labels[b, labels[b] != IGNORED])
            sizes = rule.of_sources().canonical(len(pair.source)), rule.canonical(len(pair.answer))
            found.setdefault(sizes, []).append(pair)
        number += len(ids)
    return [_pairs(found[sizes], *sizes, len(batches), pad) for sizes in sorted(found)]


@dataclass(frozen=True, eq=False)
class _Pair:
    """A row: its client's place, its own in the client's batch, its number, its tokens in the encoder, and those to be
    written."""

    client: int
    own: int
    number: int
    source: Numbers
    answer: Numbers


def _pairs(pairs: Sequence[_Pair], sources: int, answers: int, clients: int, pad: int) -> Pass:
    R = len(pairs)
    ids_RS, mask_RS = np.full((R, sources), pad, np.int64), np.zeros((R, sources), np.int64)
    labels_RT = np.full((R, answers), IGNORED, np.int64)
    for r, pair in enumerate(pairs):
        ids_RS[r, : len(pair.source)], mask_RS[r, : len(pair.source)] = pair.source, 1
        labels_RT[r, : len(pair.answer)] = pair.answer
    row_R, client_R = np.array([pair.number for pair in pairs]), np.array([pair.client for pair in pairs])
    part_G = np.bincount(client_R, minlength=clients).tolist()
    tokens = int(mask_RS.sum() + (labels_RT != IGNORED).sum()), R * (sources + answers)
    inputs = {"input_ids": ids_RS, "attention_mask": mask_RS}
    row, client = np.repeat(row_R, answers), np.repeat(client_R, answers)
    where = np.array([(pair.client, pair.own, 0) for pair in pairs])
    made = _pass(inputs, labels_RT.reshape(-1), row, client, part_G, R, tokens, where, of_tokens=True)
    return replace(made, answers=torch.from_numpy(labels_RT), filled=not mask_RS.all())


def _images(batches: Sequence[Labelled], rule: PassRule) -> Pass:
    """All images, and empty ones that fill the pass up."""
    part_G = [len(batch["labels"]) for batch in batches]
    real = sum(part_G)
    more = -real % rule.rows
    filled = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    labels = filled.pop("labels").numpy()
    if more:
        filled = {name: torch.cat([x, x.new_zeros(more, *x.shape[1:])]) for name, x in filled.items()}
    client_R = np.repeat(np.arange(len(part_G)), part_G)
    own = [(g, b, 0) for g, part in enumerate(part_G) for b in range(part)] + [(0, 0, 0)] * more
    sizes = (part_G, real + more, (real, real + more))
    return _pass(filled, labels, np.arange(real), client_R, *sizes, np.array(own))


def _pass(
    inputs: Mapping[str, Numbers | Tensor],
    labels: Numbers,
    row: Numbers,
    client: Numbers,
    part_G: Sequence[int],
    size: int,
    tokens: tuple[int, int],
    where: Numbers,
    *,
    of_tokens: bool = False,
    shifted: bool = False,
    flat: FlatRows | None = None,
) -> Pass:
    """A pass; labels: one for each token, -100 where there is none and, of shifted ones, at a row's first token, which
    nothing predicts; or for each row, of several numbers NaN where there are none; row, client: of each.  Where labels
    are is worked out here, as whoever asks a GPU for it waits."""
    there = ~np.isnan(labels[:, 0]) if labels.dtype.kind == "f" else labels != IGNORED
    (at_L,) = there.nonzero()
    counts = np.bincount(client[at_L], minlength=len(part_G)).tolist()
    label, place, rows, clients = (torch.from_numpy(x) for x in (labels[at_L], at_L - shifted, row[at_L], client[at_L]))
    tensors = {name: x if isinstance(x, Tensor) else torch.from_numpy(x) for name, x in inputs.items()}
    at, sizes = torch.from_numpy(where), (tuple(part_G), size, tokens)
    return Pass(tensors, label, place, rows, clients, tuple(counts), *sizes, at, of_tokens, flat)
