"""A step's batches as forward passes: one flat row of all tokens (of a classifier up to its head), or rows grouped by
canonical length.

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
from rayfed_sub.training.pass_rows import Seen

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
    seen: by the layers; before: by those before the head of a classifier whose rows lie flat until there (`head`).
    flat: where the rows lie in a flat pass.  tokens: the real ones, and all that linear layers see.  filled: of rows
    with an attention mask, whether any of them is filled up.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    places: Tensor
    rows: Tensor
    clients: Tensor
    counts: tuple[int, ...]
    seen: Seen
    tokens: tuple[int, int]
    of_tokens: bool = False
    flat: FlatRows | None = None
    answers: Tensor | None = None
    filled: bool | None = None
    before: Seen | None = None
    head: Callable[[str], bool] | None = None

    def seen_by(self, layer: str) -> Seen:
        """The rows as a layer sees them."""
        return self.seen if self.before is None or self.head is None or self.head(layer) else self.before

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
            self._each_seen(lambda seen: replace(seen, where=change(seen.where))),
            inputs={name: change(tensor) for name, tensor in self.inputs.items()},
            labels=change(self.labels),
            places=change(self.places),
            clients=change(self.clients),
            flat=None if self.flat is None else self.flat.each(change),
            answers=None if self.answers is None else change(self.answers),
        )

    def from_row(self, first: int) -> Pass:
        """The pass of rows that stand so many further back in their clients' batches; `rows` stays."""
        return self.moved(lambda where: where + torch.tensor([0, first, 0])) if first else self

    def moved(self, change: Callable[[Tensor], Tensor]) -> Pass:
        """The pass with `where` changed, of all that layers see."""
        return self._each_seen(lambda seen: replace(seen, where=change(seen.where)))

    def _each_seen(self, change: Callable[[Seen], Seen]) -> Pass:
        before = None if self.before is None else change(self.before)
        return replace(self, seen=change(self.seen), before=before)


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
    if not rule.alone or len(batches) > 1:
        return found
    return [replace(one, seen=replace(one.seen, parts=(1,), size=1)) for one in found]


def _labelled(batches: Sequence[Labelled], rule: PassRule, pad: int) -> list[Pass]:
    if "input_ids" not in batches[0]:
        return [_images(batches, rule)]
    if rule.apart:
        return _apart(batches, rule, pad)
    texts = [_texts(batch) for batch in batches]
    if rule.flat and of_tokens(batches[0]["labels"]):
        return [_flat(texts, rule, pad)]
    if rule.pooled:
        return [_pooled(texts, rule, pad)]
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


@dataclass(frozen=True, eq=False)
class _Side:
    """Texts side by side in a flat row of S tokens, each client's part filled up to a multiple of the granule: tokens
    of each client, without and with what fills up."""

    texts: Sequence[_Texts]
    own: tuple[int, ...]
    parts: tuple[int, ...]

    @property
    def tokens(self) -> tuple[int, int]:
        """The real ones, and all."""
        return sum(self.own), sum(self.parts)

    def placed(self, numbers: Sequence[Numbers], empty: int) -> Numbers:
        """(S,) int64 of every client's numbers, which are (B, T) or broadcast to that."""
        flat_S = np.full(sum(self.parts), empty, np.int64)
        begin = 0
        for text, own, part, own_BT in zip(self.texts, self.own, self.parts, numbers, strict=True):
            flat_S[begin : begin + own] = np.broadcast_to(own_BT, text.ids.shape)[text.real]
            begin += part
        return flat_S

    def inputs(self, place_S: Numbers, pad: int) -> dict[str, Numbers]:
        """The model's, (1, S); place_S: each token's position."""
        ids_S = self.placed([text.ids for text in self.texts], pad)
        return {"input_ids": ids_S[None], "position_ids": place_S[None], "attention_mask": np.ones_like(ids_S)[None]}

    def seen(self, place_S: Numbers) -> Seen:
        """The tokens as layers see them; place_S: in their rows."""
        client_S = np.repeat(np.arange(len(self.texts)), self.parts)
        own_S = self.placed([np.arange(len(text.ids))[:, None] for text in self.texts], 0)
        where = np.stack([client_S, own_S, place_S], axis=1)
        return Seen(self.parts, len(where), torch.from_numpy(where))

    def rows(self, rule: PassRule, pooled: int | None = None) -> FlatRows:
        """Places of the rows; pooled: as for `flat_rows`."""
        begins, begin = list[int](), 0
        for text, part in zip(self.texts, self.parts, strict=True):
            begins += (begin + np.cumsum(text.lengths) - text.lengths).tolist()
            begin += part
        lengths = np.concatenate([text.lengths for text in self.texts]).tolist()
        return flat_rows(begins, lengths, begin, rule, pooled)


def _side(texts: Sequence[_Texts], rule: PassRule) -> tuple[_Side, Numbers]:
    """The texts side by side, and each token's place in its row (S,)."""
    own = tuple(int(text.lengths.sum()) for text in texts)
    side = _Side(texts, own, tuple(-(-tokens // rule.granule) * rule.granule for tokens in own))
    return side, side.placed([np.arange(text.ids.shape[1]) for text in texts], 0)


def _flat(texts: Sequence[_Texts], rule: PassRule, pad: int) -> Pass:
    """All rows of a language model as one."""
    side, place_S = _side(texts, rule)
    seen, first_G = side.seen(place_S), np.cumsum([0, *(len(text.ids) for text in texts[:-1])])
    row_G = [first + np.arange(len(text.ids))[:, None] for first, text in zip(first_G, texts, strict=True)]
    row_S = side.placed(row_G, 0)
    labels_S = side.placed([text.labels for text in texts], IGNORED)
    client_S = np.repeat(np.arange(len(texts)), side.parts)
    made = _pass(side.inputs(place_S, pad), labels_S, row_S, client_S, seen, side.tokens, of_tokens=True, shifted=True)
    return replace(made, flat=side.rows(rule))


def _pooled(texts: Sequence[_Texts], rule: PassRule, pad: int) -> Pass:
    """All rows of a classification, as one until the head sees the first token of each.  More rows fill the pass up
    there."""
    side, place_S = _side(texts, rule)
    inputs = side.inputs(side.placed([rule.positions(text.ids) for text in texts], 0), pad)
    types = [text.types for text in texts if text.types is not None]
    inputs |= {"token_type_ids": side.placed(types, 0)[None]} if types else {}
    at = [(g, b, 0) for g, text in enumerate(texts) for b in range(len(text.ids))]
    more = -len(at) % rule.rows
    where = np.array(at + [(0, 0, 0)] * more)
    labels = np.concatenate([text.labels for text in texts])
    empty = np.full((more, *labels.shape[1:]), np.nan if labels.dtype.kind == "f" else IGNORED, labels.dtype)
    seen = Seen(tuple(len(text.ids) for text in texts), len(where), torch.from_numpy(where))
    row_R, all_labels = np.arange(len(where)), np.concatenate([labels, empty])
    made = _pass(inputs, all_labels, row_R, where[:, 0], seen, side.tokens)
    return replace(made, flat=side.rows(rule, len(where)), before=side.seen(place_S), head=rule.sees_rows)


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
    seen = Seen(tuple(part_G), R, torch.from_numpy(where))
    made = _pass(inputs, labels, row_R, client_R, seen, tokens, of_tokens=shifted, shifted=shifted)
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
    seen = Seen(tuple(part_G), R, torch.from_numpy(where))
    made = _pass(inputs, labels_RT.reshape(-1), row, client, seen, tokens, of_tokens=True)
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
    seen = Seen(tuple(part_G), real + more, torch.from_numpy(np.array(own)))
    return _pass(filled, labels, np.arange(real), client_R, seen, (real, real + more))


def _pass(
    inputs: Mapping[str, Numbers | Tensor],
    labels: Numbers,
    row: Numbers,
    client: Numbers,
    seen: Seen,
    tokens: tuple[int, int],
    *,
    of_tokens: bool = False,
    shifted: bool = False,
) -> Pass:
    """A pass; labels: one for each token, -100 where there is none and, of shifted ones, at a row's first token, which
    nothing predicts; or for each row, of several numbers NaN where there are none; row, client: of each.  Where labels
    are is worked out here, as whoever asks a GPU for it waits."""
    there = ~np.isnan(labels[:, 0]) if labels.dtype.kind == "f" else labels != IGNORED
    (at_L,) = there.nonzero()
    counts = np.bincount(client[at_L], minlength=len(seen.parts)).tolist()
    label, place, rows, clients = (torch.from_numpy(x) for x in (labels[at_L], at_L - shifted, row[at_L], client[at_L]))
    tensors = {name: x if isinstance(x, Tensor) else torch.from_numpy(x) for name, x in inputs.items()}
    return Pass(tensors, label, place, rows, clients, tuple(counts), seen, tokens, of_tokens)
