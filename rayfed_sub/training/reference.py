"""The reference executor: one client at a time, on a float32 copy of the plain model, with the real libraries.

It is slow and stores every gradient: its purpose is to be simple enough to trust.  Tests compare the pack executor with
it.  `libraries.py` puts a client's tensors into the libraries.

Legend: m, n layer sizes, r rank, l = size of the side that is not projected.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rayfed_sub.core.finite import not_finite
from rayfed_sub.core.lowrank import sides
from rayfed_sub.core.types import LocalResult, LocalStep, ModelShape, OptimizerRule, Start, Tensors
from rayfed_sub.data.batching import Batch
from rayfed_sub.data.objects import OwnBatch
from rayfed_sub.models.flat_rows import pass_rule
from rayfed_sub.models.text_to_text import decoder_inputs
from rayfed_sub.models.weights import answered
from rayfed_sub.training.client_errors import drawn
from rayfed_sub.training.dropout import GivenDropout
from rayfed_sub.training.executor import ClientWork
from rayfed_sub.training.libraries import Moving, moving_tensors, roles, stepper_of
from rayfed_sub.training.own_loss import trained_loss
from rayfed_sub.training.pack_step import LocalRule
from rayfed_sub.training.passes import of_tokens
from rayfed_sub.training.stacks import Clock, expert_step


def train_reference(
    model: nn.Module,
    shape: ModelShape,
    weights: Tensors,
    works: Sequence[ClientWork],
    rule: LocalRule,
) -> list[LocalResult]:
    """Trains every client from its start, one optimiser step for each of its batches; results in the given order.

    model: the plain transformers model, left as it is.  weights: `<target>/weight` (m, n) float32 with which the round
    begins, where a Start has none of its own.  The results are as `train_pack`'s, with two differences of form: a
    GaLore client's blocks are its whole dense change times a unit matrix, and its trained factor comes back as zeros
    where the basis is renewed (what it held is in the blocks).  A client stops at its first batch that cannot be drawn,
    or its first non-finite loss or gradient, and has `failure` set.
    """
    assert not rule.proximal, "the reference executor has no FedProx"
    return [_client(model, shape, weights, work, rule) for work in works]


def _client(
    model: nn.Module,
    shape: ModelShape,
    weights: Tensors,
    work: ClientWork,
    rule: LocalRule,
) -> LocalResult:
    client, start, batches, optimizer, lr = work.client, work.start, work.batches, rule.optimizer, rule.lr
    model = copy.deepcopy(model).float().eval().requires_grad_(False)
    begun = {**_with_frozen(weights, start.frozen), **start.tensors}
    moving = moving_tensors(model, shape, begun, start, (rule.seed, client), optimizer)
    stepper = stepper_of(moving, start, optimizer, lr)
    losses: list[float] = []
    labels, clock = 0, Clock(start.step)
    clocks = dict.fromkeys((x.layer for x in moving), clock)
    clocks |= {layer.name: Clock(expert_step(start, layer)) for layer in shape.experts}
    failure, memory = None, start.memory
    for t in range(len(batches)):
        batch = drawn(batches, t)
        if isinstance(batch, str):
            failure = batch
            break
        for x in moving:  # which need not be parameters of the model
            x.parameter.grad = None
        loss, count = _loss(model, batch, work.taken + t)
        losses.append(loss.item())
        labels += count
        loss.backward()
        still = _still(moving, shape)
        if start.penalty is not None:
            start.penalty({**start.tensors, **{x.name: x.parameter for x in moving}}).backward()
        failure = _not_finite(t, losses[-1], moving)
        if failure:
            break
        _count(moving, clocks, work.taken - start.step)
        _clip(moving, optimizer.clip_norm, clocks)
        memory = _correct(start, memory, moving, begun, clocks, t, lr)
        _step(stepper, [x for x in moving if x.layer not in still], start, optimizer, lr, clocks)
        _advance(clock, clocks, still, start, 1 - lr * optimizer.weight_decay if start.decays_base else 1.0)
    periods = max(1, *(own.periods for own in (clock, *clocks.values())))
    metrics = {
        "loss": sum(losses) / max(1, len(losses)),
        "loss_last": losses[-1] if losses else 0.0,
        "labels": float(labels),
        "steps": float(len(losses)),
        "periods": float(periods),
    }
    failure = failure or not_finite({x.name: x.parameter for x in moving})
    if failure:
        return LocalResult(
            client,
            start.tensors,
            start.moments,
            clock.step,
            {},
            clock.base_scale,
            1,
            metrics,
            failure,
            start.trained,
            memory,
        )
    tensors = {name: tensor.cpu().clone() for name, tensor in start.tensors.items()}
    moments = {}
    for x in moving:
        for role, key in roles(optimizer).items():
            moments[f"{x.name}/{role}"] = stepper.state[x.stepped][key].detach().cpu().clone()
        tensors[x.name] = x.parameter.detach().cpu().clone()
    blocks = _blocks(shape, start, moving, begun, clocks, tensors)
    moments = {**start.moments, **moments}  # of a factor at rest they stay as they were
    scales = {layer.name: clocks[layer.name].base_scale for layer in shape.experts if start.decays_base}
    for layer in shape.experts:
        moments[f"{layer.name}/step"] = torch.tensor(float(clocks[layer.name].step), dtype=torch.float64)
    step, scale = clock.step, clock.base_scale
    return LocalResult(
        client, tensors, moments, step, blocks, scale, periods, metrics, None, start.trained, memory, scales
    )


def _with_frozen(weights: Tensors, frozen: Tensors) -> dict[str, Tensor]:
    """The round's weights plus the client's frozen blocks, multiplied out."""
    layers = [name.removesuffix("/left") for name in frozen if name.endswith("/left")]
    added = {name: weights[f"{name}/weight"] + frozen[f"{name}/left"] @ frozen[f"{name}/right"] for name in layers}
    return {**weights, **{f"{name}/weight": weight for name, weight in added.items()}}


def _blocks(
    shape: ModelShape,
    start: Start,
    moving: Sequence[Moving],
    begun: Tensors,
    clocks: Mapping[str, Clock],
    tensors: dict[str, Tensor],
) -> dict[str, tuple[Tensor, Tensor]]:
    """GaLore's blocks by layer; bases and trained factors as they come back are put into `tensors`."""
    blocks: dict[str, tuple[Tensor, Tensor]] = {}
    if start.subspace is None:
        return blocks
    for layer in shape.targets:
        fixed, trained = sides(layer)
        x = next(x for x in moving if x.name == trained)
        tensors[fixed] = x.projector.ortho_matrix.cpu().contiguous().clone()
        own = clocks[layer.name]
        change_mn = tensors[trained] - own.base_scale * begun[f"{layer.name}/weight"].cpu()
        U_mq, S_q, V_qn = torch.linalg.svd(change_mn.double(), full_matrices=False)
        R = min(len(S_q), max(1, own.periods) * start.subspace.rank)  # a period adds r; beyond that is rounding
        blocks[layer.name] = ((U_mq * S_q)[:, :R].float(), V_qn[:R].float())
        renewed, at_rest = start.subspace.refresh_every > 0, torch.zeros_like(start.tensors[trained])
        tensors[trained] = at_rest if renewed else _factor(x, begun, own.base_scale).cpu()
    return blocks


def _due(start: Start, clock: Clock) -> bool:
    """Whether this step has a new basis."""
    period = 0 if start.subspace is None else start.subspace.refresh_every
    return bool(period) and clock.step % period == 0


def _begin_dropout(model: nn.Module, step: int, rows: Sequence[int]) -> None:
    """Before a forward pass of these rows of the batch; step: local steps of the client's life before this one."""
    for part in model.modules():
        if isinstance(part, GivenDropout):
            part.begin(step, rows)


def _advance(clock: Clock, clocks: Mapping[str, Clock], still: Collection[str], start: Start, decay: float) -> None:
    """Counts a step of the client's clock and of its experts' that took one."""
    stepped = {id(clock): clock, **{id(own): own for name, own in clocks.items() if name not in still}}
    for own in stepped.values():
        own.touched = own.touched and not _due(start, own)
        own.advance(decay)


def _count(moving: Sequence[Moving], clocks: Mapping[str, Clock], before: int) -> None:
    """Gives the projectors, whose draws depend on it, the number of steps of the client's life; before: those that its
    clock no longer counts."""
    for x in moving:
        if x.projector is not None:
            x.projector.taken = before + clocks[x.layer].step


def _still(moving: Sequence[Moving], shape: ModelShape) -> set[str]:
    """Experts' matrices without a gradient, which take no step."""
    sent = {x.layer for x in moving if x.parameter.grad is not None and x.parameter.grad.any()}
    return {layer.name for layer in shape.experts} - sent


def _loss(model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, int]:
    """The mean cross-entropy over labelled tokens (or rows), and how many there are; without labels 0.  Of numbers the
    mean squared error, of several labels a row binary cross-entropy.  Of the caller's own loss the mean over the
    batch's rows.  step: as in `_begin_dropout`."""
    device = next(model.parameters()).device
    if isinstance(batch, OwnBatch):
        _begin_dropout(model, step, range(1))
        return trained_loss(model, batch.to(device)), batch.rows
    parts = []
    for rows, inputs in _turns(model, {name: tensor.to(device) for name, tensor in batch.items()}):
        _begin_dropout(model, step, rows)
        parts.append(_logits(model, inputs))
    logits, labels = (x[0] if len(x) == 1 else torch.cat(x) for x in zip(*parts, strict=True))
    if labels.is_floating_point():
        several = labels.shape[1] > 1
        function = functional.binary_cross_entropy_with_logits if several else functional.mse_loss
        return function(logits, labels), len(labels)
    count = int((labels != -100).sum())
    return functional.cross_entropy(logits, labels) if count else 0.0 * logits.sum(), count


def _turns(model: nn.Module, inputs: Mapping[str, Tensor]) -> Iterator[tuple[Sequence[int], dict[str, Tensor]]]:
    """The rows that go through the model together, by their numbers: all, or of a model that sees what fills them up
    each alone, as long as it is."""
    rows = range(len(inputs["labels"]))
    if pass_rule(model).exact is None or len(rows) == 1:
        yield rows, dict(inputs)
        return
    for row, length in zip(rows, inputs["attention_mask"].sum(dim=1).tolist(), strict=True):
        one = {name: x[row : row + 1] for name, x in inputs.items()}
        labels = one.pop("labels")
        one = {name: x[:, :length] for name, x in one.items()}
        if of_tokens(labels):
            labels = labels[:, labels[0] != -100] if pass_rule(model).apart else labels[:, :length]
        yield [row], {**one, "labels": labels}


def _logits(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits and labels, of tokens (L, V) and (L,), of rows as they are."""
    labels = inputs.pop("labels")
    if not of_tokens(labels):
        return answered(model, inputs, causal=False).logits.float(), labels
    writes = pass_rule(model).apart
    if writes:
        inputs["decoder_input_ids"] = decoder_inputs(model, labels)
    logits = answered(model, inputs, causal=True).logits.float()
    if writes:
        return logits.flatten(0, 1), labels.flatten()
    return logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()  # a token is predicted from those before it


def _not_finite(t: int, loss: float, moving: Sequence[Moving]) -> str | None:
    """Why the client cannot go on; a parameter without a part in the loss gets a zero gradient on the way."""
    if not math.isfinite(loss):
        return f"non-finite loss at local step {t}"
    for x in moving:
        if x.parameter.grad is None:
            x.parameter.grad = torch.zeros_like(x.parameter)
        if not torch.isfinite(x.parameter.grad).all():
            return f"non-finite gradient in {x.name.rpartition('/')[0]}"
    return None


@torch.no_grad()
def _step(
    stepper: torch.optim.Optimizer,
    moving: Sequence[Moving],
    start: Start,
    optimizer: OptimizerRule,
    lr: float,
    clocks: Mapping[str, Clock],
) -> None:
    """Optimiser step of these tensors: moments moved into the new basis, the library's step, SGD's decay."""
    _only(stepper, moving)
    projected = [x for x in moving if x.projector is not None]
    if start.subspace is not None and start.subspace.moments != "keep":
        for x in (x for x in projected if _due(start, clocks[x.layer])):
            step = clocks[x.layer].step
            ahead = copy.copy(x.projector)
            ahead.project(x.parameter.grad, step)
            right, old, new = x.name.endswith("/left"), x.projector.ortho_matrix, ahead.ortho_matrix
            C_rr = new @ old.T if right else new.T @ old
            _move_moments(stepper.state[x.stepped], C_rr, right, start.subspace.moments, optimizer, step)
    for x in projected if optimizer.name == "sgd" else ():
        x.stepped.grad = x.projector.project(x.parameter.grad, clocks[x.layer].step)
    stepper.step()
    if optimizer.name == "sgd":
        for x in projected:
            x.parameter.add_(x.projector.project_back(x.stepped))
            x.stepped.zero_()
        for x in moving:
            x.parameter.mul_(1 - lr * optimizer.weight_decay)


def _only(stepper: torch.optim.Optimizer, moving: Sequence[Moving]) -> None:
    """Takes the gradients of all other tensors away, which libraries then leave alone."""
    kept = {id(x.stepped) for x in moving}
    for group in stepper.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in kept:
                parameter.grad = None


def _correct(
    start: Start,
    memory: Tensors,
    moving: Sequence[Moving],
    begun: Tensors,
    clocks: Mapping[str, Clock],
    number: int,
    lr: float,
) -> Tensors:
    """Replaces the gradients by those of the client's hook, if it has one; returns the hook's memory.  Within a
    subspace the hook's change of the projected gradient is projected back."""
    if start.correct is None:
        return memory
    now = {x.name: _factor(x, begun, clocks[x.layer].base_scale) for x in moving}
    own = {x.name: _projected(x, number) for x in moving}
    given, memory = start.correct(memory, LocalStep(now, {n: g.clone() for n, g in own.items()}, number, lr))
    for x in moving:
        assert x.parameter.grad is not None
        if x.projector is None:
            x.parameter.grad.copy_(given[x.name])
        else:  # galore_torch multiplies by its scale
            x.parameter.grad.add_(x.projector.project_back(given[x.name] - own[x.name]) / x.projector.scale)
    return memory


def _projected(x: Moving, step: int) -> Tensor:
    """The gradient, GaLore's in its subspace; the basis stays as it is."""
    assert x.parameter.grad is not None
    return x.parameter.grad if x.projector is None else _coefficients(x, x.parameter.grad, step)


def _factor(x: Moving, begun: Tensors, base_scale: float) -> Tensor:
    """A copy of the trained tensor; of GaLore in one orthonormal basis Q all along its L: change = scale L Q."""
    if x.projector is None:
        return x.parameter.detach().clone()
    W_mn = begun[f"{x.name.rpartition('/')[0]}/weight"]
    change_mn = x.parameter.detach() - base_scale * W_mn.to(x.parameter.device)
    return _coefficients(x, change_mn, 0) / float(x.projector.scale)


def _coefficients(x: Moving, matrix_mn: Tensor, step: int) -> Tensor:
    """The matrix in the projector's basis, which stays as it is."""
    found: Tensor = copy.copy(x.projector).project(matrix_mn, step)
    return found


def _clip(moving: Sequence[Moving], norm: float | None, clocks: Mapping[str, Clock]) -> None:
    """Scales all gradients so that their joint norm, GaLore's measured in its subspace, is at most `norm`, if set."""
    if norm is None:
        return
    squares = 0.0
    for x in moving:
        squares += float(_projected(x, clocks[x.layer].step).square().sum())
    for x in moving:
        assert x.parameter.grad is not None
        x.parameter.grad.mul_(min(1.0, norm / (math.sqrt(squares) + 1e-6)))


def _move_moments(
    state: dict[str, Any], C_rr: Tensor, right: bool, rule: str, optimizer: OptimizerRule, step: int
) -> None:
    """`reset`: zeros, and Adam's bias correction begins anew.  `rotate`: LDAdam's rule (arXiv 2410.16103) for
    coordinates along the last axis, C = Q_new Q_old^T, bias-corrected by the steps that the moments have seen."""
    keys = roles(optimizer)
    if rule == "reset":
        for key in keys.values():
            state[key] = torch.zeros_like(state[key])
        state["step"] = 0
        return
    moments = {role: state[key] if right else state[key].T for role, key in keys.items()}
    moved = {role: x_lr @ C_rr.T for role, x_lr in moments.items()}
    if "m2" in moments:
        seen1, seen2 = (1 - b ** max(1, step) for b in optimizer.betas)
        mean_lr, square_lr = moments["m1"] / seen1, moments["m2"] / seen2
        variance_lr = (square_lr - mean_lr.square()) @ C_rr.square().T
        moved["m2"] = seen2 * (variance_lr + (mean_lr @ C_rr.T).square()).abs()
    for role, key in keys.items():
        state[key] = moved[role] if right else moved[role].T.contiguous()
