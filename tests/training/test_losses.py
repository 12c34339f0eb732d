"""The loss under a frozen output matrix, in float32."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from rayfed_sub.models.flat_rows import pass_rule
from rayfed_sub.models.logits import LogitRule, logit_rule
from rayfed_sub.training.losses import _HeadLoss, client_losses, predicted
from rayfed_sub.training.passes import passes
from tests.helpers.tiny_models import CLASSES, PAD, Tiny, bent, bert, draw_batches, llama, vit


def mean_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """One client's loss, summed over the passes of its batch."""
    turns = passes([batch], pass_rule(model), PAD)
    count_G = torch.tensor([one.counts for one in turns]).sum(0)
    return torch.stack([client_losses(model, one, count_G) for one in turns]).sum()


@pytest.mark.parametrize("behind", [1.0, 8.0, 12.0])
def test_loss_of_a_confident_prediction_keeps_its_precision(behind: float) -> None:
    """Two tokens' logits, 20 and 20 - behind: the loss of the first is ln(1 + e^-behind), 6.1e-6 for 12, where floats
    near 20 are 1.9e-6 apart."""
    head_V1, hidden_L1 = torch.tensor([[20.0], [20.0 - behind]]), torch.ones(1, 1)
    loss = _HeadLoss.apply(hidden_L1, head_V1, None, torch.tensor([0]), LogitRule())
    assert loss.item() == pytest.approx(math.log1p(math.exp(-behind)), rel=0.02)


def test_loss_of_a_wrong_prediction_is_the_logit_difference() -> None:
    """Logits 20 and 8, the second is right: 12 + ln(1 + e^-12)."""
    loss = _HeadLoss.apply(torch.ones(1, 1), torch.tensor([[20.0], [8.0]]), None, torch.tensor([1]), LogitRule())
    assert loss.item() == pytest.approx(12.0000061, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("gemma2", "output layer, soft cap 2"),
        ("xlstm", "output layer, soft cap 2"),
        ("nanochat", "output layer, soft cap 2"),
        ("cohere", "output layer x 0.3"),
        ("granite", "output layer x 0.333333"),
        ("falcon_h1", "output layer x 0.3"),
    ],
)
def test_rule_from_output_layer_to_logits_is_detected(name: str, rule: str) -> None:
    """On the model with its weights as on the meta device, where a run detects it, in either dtype."""
    model = bent(name).model
    assert str(logit_rule(model)) == rule
    for dtype in (torch.float32, torch.bfloat16):
        with torch.device("meta"):
            bare = AutoModelForCausalLM.from_config(model.config, dtype=dtype).eval()
        assert str(logit_rule(bare)) == rule


def test_experts_are_skipped() -> None:
    """The routing of tokens is unknown to meta tensors; the steps after the output layer are detected all the same."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 1}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **sizes, **heads))
    assert str(logit_rule(model.eval())) == "output layer"


@pytest.mark.parametrize(
    "after",
    [
        lambda z: z + 1.0,
        lambda z: z.clamp(max=20.0),
        lambda z: z.index_fill(-1, torch.tensor([3]), -1e9),  # tokens that are never generated
        lambda z: z * torch.arange(64.0),
        lambda z: z.log_softmax(-1),
        lambda z: 9 * torch.atan(z / 9),
    ],
)
def test_other_output_functions_are_left_to_the_model(after: Callable[[Tensor], Tensor]) -> None:
    """The loss is that of the model's own logits."""
    tiny = llama()
    model = copy.deepcopy(tiny.model)
    plain = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        out.logits = after(out.logits)
        return out

    model.forward = forward
    assert logit_rule(model) is None
    (batch,) = draw_batches(tiny, 0, 1)
    logits_RTV = model(input_ids=batch["input_ids"]).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits_RTV.flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert mean_loss(model, batch).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["llama4_text", "bert", "gemma2", "phi", "gpt_bigcode"])
def test_losses_match_the_model_s_own(name: str) -> None:
    """Hidden states are the inputs of the output layer: llama4_text's inner model has none, BERT's are transformed once
    more, Phi's output layer has a bias."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "pad_token_id": 0}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_local_experts": 2}
    known = AutoConfig.for_model(name)
    given = {key: value for key, value in {**sizes, **heads}.items() if hasattr(known, key)}
    config = AutoConfig.for_model(name, **given, **({"is_decoder": True} if name == "bert" else {}))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    moving = next(parameter for parameter in model.base_model.parameters() if parameter.ndim == 1).requires_grad_()
    rule = model.logit_rule = logit_rule(model)
    assert rule is not None
    (batch,) = draw_batches(llama(), 0, 1)
    logits_RTV = model(input_ids=batch["input_ids"]).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits_RTV.flatten(0, 1), batch["labels"][:, 1:].flatten())
    loss = mean_loss(model, batch)
    ours, theirs = (torch.autograd.grad(one, moving)[0] for one in (loss, expected))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.dist(ours, theirs) < 1e-5 * theirs.norm()


def numbers(tiny: Tiny, problem: str, rows: int) -> dict[str, Tensor]:
    """A batch whose labels are numbers, or 0 and 1 for each of CLASSES labels."""
    (batch,) = draw_batches(tiny, 3, 1, rows=rows)
    rng = torch.Generator().manual_seed(4)
    labels = torch.randn(rows, 1, generator=rng)
    several = torch.randint(2, (rows, CLASSES), generator=rng).float()
    return {**batch, "labels": labels if problem == "regression" else several}


@pytest.mark.parametrize("make", [bert, vit])
@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_loss_of_numbers_and_of_several_labels_is_transformers_own(make: Callable[[], Tiny], problem: str) -> None:
    """Over rows of several lengths, one pass each, with rows that only fill the passes up."""
    model: Any = copy.deepcopy(make().model)
    if problem == "regression":
        model.classifier = nn.Linear(16, 1)
    model.config.problem_type, model.num_labels = problem, 1 if problem == "regression" else CLASSES
    model.config.num_labels = model.num_labels
    batch = numbers(make(), problem, rows=5)
    theirs = model(**{**batch, "labels": batch["labels"].squeeze(1) if problem == "regression" else batch["labels"]})
    assert mean_loss(model, batch).item() == pytest.approx(theirs.loss.item(), rel=1e-5)
    seen = predicted(model, batch, PAD)
    assert torch.equal(seen.label_L, batch["labels"])
    said = theirs.logits if problem == "regression" else (theirs.logits > 0).float()
    torch.testing.assert_close(seen.best_L, said.detach(), rtol=1e-5, atol=1e-6)
    assert seen.loss_L.mean().item() == pytest.approx(theirs.loss.item(), rel=1e-5)
