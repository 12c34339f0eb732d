"""Tiny random models, batches and starts that several tests share.

Targets are chosen so that each model has layers with m > n, m < n and, in the language models, m = n.  A model is built
once for all tests, which leave it as it is."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    ConvBertConfig,
    ConvBertForSequenceClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from rayfed_sub.config.schema import Optimizer
from rayfed_sub.core.lowrank import inner_core, sides
from rayfed_sub.core.types import Layer, LocalResult, ModelShape, Start, Subspace, Tensors
from rayfed_sub.data.objects import OwnBatch
from rayfed_sub.models.experts import experts_of, matrix_of
from rayfed_sub.models.logits import logit_rule
from rayfed_sub.privacy.examples import RowPrivacy
from rayfed_sub.training.executor import ClientWork, train_pack
from rayfed_sub.training.layers import PackLinear, based_on
from rayfed_sub.training.pack_experts import install
from rayfed_sub.training.pack_step import LocalRule
from rayfed_sub.training.reference import train_reference

torch.set_num_threads(1)  # matrices of 16 x 24: a second thread only waits (ten times slower on a busy machine)

Batch = dict[str, Tensor]

VOCABULARY, CLASSES, PAD = 64, 3, 0


SHARED: list[Tiny] = []
"""The models that were made, which `tests/conftest.py` checks after each file that uses them."""


@dataclass(frozen=True, repr=False)
class Tiny:
    """A model, its shape, and how to draw one batch: draw(generator, rows, tokens, labels a row).  made: the checksum
    of a model that all tests share, "" for others."""

    model: nn.Module
    shape: ModelShape
    draw: Callable[[torch.Generator, int, int, int], Batch]
    made: str = ""

    @cached_property
    def packed(self) -> tuple[nn.Module, dict[str, PackLinear]]:
        """A copy with PackLinear installed, to be left with the base weights with which it was found."""
        return installed(self)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The pretrained `<layer>/weight` (m, n), and the head's biases, float32."""
        tensors, stored = {}, dict(self.model.named_parameters())
        matrices = {
            name: matrix for one in experts_of(self.model).values() for matrix in one.matrices for name in matrix.names
        }
        for layer in self.shape.experts:
            turned = matrices[layer.name].transposed
            weight = matrix_of(stored, layer, transposed=turned).detach()
            tensors[f"{layer.name}/weight"] = weight.T if turned else weight
        for layer in (layer for layer in (*self.shape.targets, *self.shape.head) if not layer.expert):
            module = self.model.get_submodule(layer.name)
            stored = module.weight.detach()
            tensors[f"{layer.name}/weight"] = stored if isinstance(module, nn.Linear) else stored.T
            if layer in self.shape.head and layer.bias:
                tensors[f"{layer.name}/bias"] = module.bias.detach()
        return tensors

    @property
    def intact(self) -> bool:
        """Whether model and `packed` have the weights with which the model was made."""
        layers = self.packed[1] if "packed" in vars(self) else {}
        based = all(torch.equal(layer.weight, self.weights[f"{name}/weight"]) for name, layer in layers.items())
        return based and checksum(self.model) == self.made


@cache
def llama(targets: str = r"(up_proj|down_proj|o_proj)$", hidden: int = 16, inner: int = 24) -> Tiny:
    """up_proj is inner x hidden (24 x 16), down_proj 16 x 24, o_proj 16 x 16."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return _tiny(LlamaForCausalLM, config, targets, "", draw_tokens)


@cache
def gpt2(targets: str = r"(mlp\.c_fc|mlp\.c_proj|attn\.c_proj)$") -> Tiny:
    """Conv1D layers: c_fc is 32 x 16, mlp.c_proj 16 x 32, attn.c_proj 16 x 16."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_inner=32,
        n_layer=2,
        n_head=2,
        n_positions=32,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=1,
    )
    return _tiny(GPT2LMHeadModel, config, targets, "", draw_tokens)


@cache
def bent(name: str) -> Tiny:
    """Models whose logits are more than a matrix product: soft-capping (`gemma2`, `xlstm`, `nanochat`), a factor (the
    others)."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    bends = {
        "gemma2": {"final_logit_softcapping": 2.0},
        "cohere": {"logit_scale": 0.3},
        "granite": {"logits_scaling": 3.0},
        "xlstm": {"output_logit_soft_cap": 2.0, "num_heads": 2, "hidden_size": 32, "num_blocks": 2},
        "nanochat": {"final_logit_softcapping": 2.0},
        # A row is filled up to whole chunks, by default to 256 tokens.
        "falcon_h1": {
            **{"lm_head_multiplier": 0.3, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
            **{"mamba_chunk_size": 16, "mamba_d_state": 16},
        },
    }
    config = AutoConfig.for_model(name, **{**sizes, **bends[name]})
    targets = {"xlstm": r"proj_up$", "nanochat": r"fc1$"}.get(name, r"up_proj$")
    return _tiny(AutoModelForCausalLM.from_config, config, targets, "", draw_tokens)


@cache
def mixture(name: str = "mixtral", targets: str = r"experts\.|o_proj$") -> Tiny:
    """Four experts, of which a token takes two: gate and projection are 48 x 16, the projection back is 16 x 24.
    `gpt_oss` stores them transposed, gate and projection in turns, with biases."""
    config = AutoConfig.for_model(
        name,
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_local_experts=4,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=1,
    )
    return _tiny(AutoModelForCausalLM.from_config, config, targets, "", draw_tokens)


_ENCODER = {
    **{"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "max_position_embeddings": 32, "num_labels": CLASSES, "initializer_range": 0.3},
}


@cache
def bert(targets: str = r"(intermediate\.dense|\d\.output\.dense)$") -> Tiny:
    """Sequence classification: 24 x 16, 16 x 24, and a trained head 3 x 16 with bias."""
    config = BertConfig(**_ENCODER)
    return _tiny(BertForSequenceClassification, config, targets, "classifier", draw_sentences)


@cache
def convbert() -> Tiny:
    """Sequence classification whose rows nothing may fill up; layers as BERT's."""
    config = ConvBertConfig(**_ENCODER, embedding_size=16)
    targets = r"(intermediate\.dense|\d\.output\.dense)$"
    return _tiny(ConvBertForSequenceClassification, config, targets, "classifier.out_proj", draw_sentences)


@cache
def albert(targets: str = r"albert_layers\.\d+\.(ffn|ffn_output)$") -> Tiny:
    """Sequence classification whose two blocks are one: 24 x 16, 16 x 24, and a trained head 3 x 16 with bias."""
    config = AlbertConfig(**_ENCODER, embedding_size=16)
    return _tiny(AlbertForSequenceClassification, config, targets, "classifier", draw_sentences)


@cache
def vit(targets: str = r"(fc1|fc2)$") -> Tiny:
    """Image classification: 24 x 16, 16 x 24, and a trained head 3 x 16 with bias."""
    config = ViTConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=2,
        num_labels=CLASSES,
        initializer_range=0.3,
    )
    return _tiny(ViTForImageClassification, config, targets, "classifier", draw_images)


@cache
def dinov2(targets: str = r"(fc1|fc2)$") -> Tiny:
    """Image classification at 8 x 8 pixels, to which the positions of a 12 x 12 model are fitted: 32 x 16, 16 x 32,
    and a trained head 3 x 32 with bias, over the class token and the mean of the patches."""
    config = Dinov2Config(
        hidden_size=16,
        mlp_ratio=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=12,
        patch_size=2,
        num_labels=CLASSES,
        initializer_range=0.3,
    )
    return _tiny(Dinov2ForImageClassification, config, targets, "classifier", draw_images)


class OwnEncoder(nn.Module):
    """A module that transformers does not know: torch's Transformer layer, then a layer that sees positions before
    rows, as no pack could lie."""

    def __init__(self, config: object = None) -> None:
        super().__init__()
        self.embed, self.block = nn.Linear(5, 16), nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.mix, self.out = nn.Linear(16, 12), nn.Linear(12, CLASSES)

    def forward(self, x_BTk: Tensor) -> Tensor:
        h_BTd = self.block(self.embed(x_BTk))
        z_TBd = torch.tanh(self.mix(h_BTd.transpose(0, 1)))
        logits: Tensor = self.out(z_TBd.mean(0))
        return logits


def class_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x_BTk, y_B = batch
    return nn.functional.cross_entropy(model(x_BTk), y_B)


@cache
def own() -> Tiny:
    """linear1 is 24 x 16, linear2 16 x 24, mix 12 x 16, and a trained head 3 x 12 with bias."""

    def draw(rng: torch.Generator, rows: int, tokens: int, labels: int) -> OwnBatch:
        content = (torch.randn(rows, tokens, 5, generator=rng), _classes(rng, rows, 1))
        return OwnBatch(content, rows)

    tiny = _tiny(OwnEncoder, None, r"(linear1|linear2|mix)$", "out", draw)  # type: ignore[arg-type]
    vars(tiny.model).update(own_loss=class_loss, own_measure=None)
    return tiny


def _tiny(
    architecture: Callable[..., nn.Module], config: object, targets: str, head: str, draw: Callable[..., Batch]
) -> Tiny:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = architecture(config).eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero at first: a lost bias must show
                parameter.normal_(std=0.1)
    chosen = [
        _layer(name, module)
        for name, module in model.named_modules()
        if re.search(targets, name) and getattr(module, "weight", None) is not None
    ]
    for matrix in (matrix for one in experts_of(model).values() for matrix in one.matrices):
        chosen += [
            Layer(name, matrix.m, matrix.n, matrix.bias, expert=True)
            for name in matrix.names
            if re.search(targets, name)
        ]
    heads = (_layer(head, model.get_submodule(head)),) if head else ()
    SHARED.append(Tiny(model, ModelShape(tuple(chosen), heads), draw, checksum(model)))
    return SHARED[-1]


def checksum(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers."""
    read = hashlib.sha256()
    for tensor in model.state_dict().values():
        read.update(tensor.contiguous().numpy())
    return read.hexdigest()


def _layer(name: str, module: nn.Module) -> Layer:
    m, n = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
    return Layer(name, m, n, module.bias is not None)


def draw_tokens(rng: torch.Generator, rows: int, tokens: int, labels: int) -> Batch:
    """The last `labels` tokens of each row carry a label; row b is b tokens shorter than the longest, padded right."""
    input_ids = torch.full((rows, tokens), PAD)
    targets = torch.full((rows, tokens), -100)
    for b in range(rows):
        length = max(labels + 1, tokens - b)
        input_ids[b, :length] = torch.randint(1, VOCABULARY, (length,), generator=rng)
        targets[b, length - labels : length] = input_ids[b, length - labels : length]
    return {"input_ids": input_ids, "attention_mask": (input_ids != PAD).long(), "labels": targets}


def draw_pairs(rng: torch.Generator, rows: int, tokens: int, labels: int) -> Batch:
    """Sources as in `draw_tokens`, and answers of an encoder-decoder; row b's has b tokens more than `labels`."""
    batch = draw_tokens(rng, rows, tokens, 0)
    answers = torch.full((rows, labels + rows - 1), -100)
    for b in range(rows):
        answers[b, : labels + b] = torch.randint(1, VOCABULARY, (labels + b,), generator=rng)
    return {**batch, "labels": answers}


def draw_sentences(rng: torch.Generator, rows: int, tokens: int, labels: int) -> Batch:
    batch = draw_tokens(rng, rows, tokens, 0)
    batch["labels"] = _classes(rng, rows, labels)
    return batch


def draw_images(rng: torch.Generator, rows: int, tokens: int, labels: int) -> Batch:
    return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=rng), "labels": _classes(rng, rows, labels)}


def _classes(rng: torch.Generator, rows: int, labels: int) -> Tensor:
    """One class a row; labels = 0 stands for none."""
    return torch.randint(CLASSES, (rows,), generator=rng) if labels else torch.full((rows,), -100)


def draw_batches(tiny: Tiny, seed: int, steps: int, *, rows: int = 3, tokens: int = 9, labels: int = 4) -> list[Batch]:
    """`steps` different batches of one client."""
    rng = torch.Generator().manual_seed(seed)
    return [tiny.draw(rng, rows, tokens, labels) for _ in range(steps)]


def lora_start(tiny: Tiny, rank: int, *, roles: Sequence[str] = ("left", "right"), scale: float = 0.5) -> Start:
    """LoRA with both factors non-zero, so that both have a gradient from the first step on."""
    rng = torch.Generator().manual_seed(rank)
    tensors = _head(tiny)
    trained = list(tensors)
    for layer in tiny.shape.targets:
        tensors[f"{layer.name}/left"] = 0.1 * torch.randn(layer.m, rank, generator=rng)
        tensors[f"{layer.name}/right"] = torch.randn(rank, layer.n, generator=rng) / layer.n**0.5
        trained += [f"{layer.name}/{role}" for role in roles]
    return Start(tensors, tuple(trained), scale)


def core_start(tiny: Tiny, rank: int, *, scale: float = 3.0) -> Start:
    """A trained core, neither zero nor symmetric, between two factors at rest."""
    start, rng = lora_start(tiny, rank, roles=(), scale=scale), torch.Generator().manual_seed(rank)
    cores = {f"{layer.name}/core": torch.randn(rank, rank, generator=rng) for layer in tiny.shape.targets}
    return replace(start, tensors={**start.tensors, **cores}, trained=(*start.trained, *cores))


def dense_start(tiny: Tiny) -> Start:
    """Every target and head tensor trained directly."""
    tensors = {name: tensor.clone() for name, tensor in tiny.weights.items()}
    return Start(tensors, tuple(tensors))


def galore_start(tiny: Tiny, subspace: Subspace, *, scale: float = 0.25, step: int = 0) -> Start:
    """GaLore before its first step, or at `step` with an orthonormal basis of its own and zero moments."""
    rng = torch.Generator().manual_seed(step)
    tensors = _head(tiny)
    trained = list(tensors)
    for layer in tiny.shape.targets:
        fixed, moving = sides(layer)
        left, right = torch.zeros(layer.m, subspace.rank), torch.zeros(subspace.rank, layer.n)
        tensors |= {f"{layer.name}/left": left, f"{layer.name}/right": right}
        if step:
            columns = torch.linalg.qr(torch.randn(min(layer.m, layer.n), subspace.rank, generator=rng)).Q
            tensors[fixed] = columns.T if fixed.endswith("/right") else columns
        trained.append(moving)
    return Start(tensors, tuple(trained), scale, step=step, subspace=subspace, decays_base=True)


def next_start(start: Start, result: LocalResult, tiny: Tiny) -> Start:
    """A second round with kept state: basis, moments and step continue, the trained factors begin at zero again."""
    tensors = dict(result.tensors)
    for layer in tiny.shape.targets if start.subspace else ():
        moving = sides(layer)[1]
        tensors[moving] = torch.zeros_like(tensors[moving])
    return replace(start, tensors=tensors, moments=result.moments, step=result.step)


def start_of(kind: str, tiny: Tiny) -> Start:
    """One start of each kind, by name: `dense`, `lora`, `ffa` (left only), `core`, `galore` (rank 2, every 2 steps), or
    `shared` (GaLore in a basis that is never renewed)."""
    if kind == "dense":
        return dense_start(tiny)
    if kind == "core":
        return core_start(tiny, 3)
    if kind == "shared":
        return galore_start(tiny, Subspace(2, 0), step=1)
    if kind == "galore":
        return galore_start(tiny, Subspace(2, 2))
    return lora_start(tiny, 2, roles=("left",) if kind == "ffa" else ("left", "right"))


def _head(tiny: Tiny) -> dict[str, Tensor]:
    return {name: tiny.weights[name].clone() for name in tiny.shape.head_names}


def run_pack(
    tiny: Tiny,
    starts: Sequence[Start],
    batches: Sequence[Sequence[Mapping[str, Tensor]]],
    optimizer: Optimizer,
    *,
    lr: float,
    weights: Tensors | None = None,
    clients: Sequence[int] | None = None,
    taken: int = 0,
    privacy: RowPrivacy | None = None,
    expected: int = 1,
) -> list[LocalResult]:
    """`train_pack` on a model whose targets hold `weights` (None: the pretrained ones); taken, expected: as in
    `ClientWork`, of all clients."""
    model, layers = tiny.packed
    held = {
        name.removesuffix("/weight"): tensor for name, tensor in (weights or {}).items() if name.endswith("/weight")
    }
    bases = {name: tensor for name, tensor in held.items() if name in layers}
    with based_on(layers, bases):
        rule = LocalRule(optimizer, lr, 0, PAD, privacy=privacy)
        given = [replace(work, taken=taken, expected=expected) for work in works(starts, batches, clients)]
        return train_pack(model, layers, tiny.shape, given, rule).results


def run_reference(
    tiny: Tiny,
    starts: Sequence[Start],
    batches: Sequence[Sequence[Mapping[str, Tensor]]],
    optimizer: Optimizer,
    *,
    lr: float,
    weights: Tensors | None = None,
    clients: Sequence[int] | None = None,
    taken: int = 0,
) -> list[LocalResult]:
    """`train_reference` with the same arguments."""
    begun = {**tiny.weights, **(weights or {})}
    rule = LocalRule(optimizer, lr, 0, PAD)
    given = [replace(work, taken=taken) for work in works(starts, batches, clients)]
    return train_reference(tiny.model, tiny.shape, begun, given, rule)


def works(
    starts: Sequence[Start], batches: Sequence[Sequence[Mapping[str, Tensor]]], clients: Sequence[int] | None = None
) -> list[ClientWork]:
    """The work of clients 0, 1, ... or of those named."""
    names = range(len(starts)) if clients is None else clients
    return [ClientWork(*work) for work in zip(names, starts, batches, strict=True)]


def installed(tiny: Tiny, weights: Tensors | None = None):
    """A copy of the model's modules over the same tensors, with PackLinear installed."""
    import copy

    shared = {id(tensor): tensor for tensor in (*tiny.model.parameters(), *tiny.model.buffers())}
    model = copy.deepcopy(tiny.model, memo=dict(shared))
    if not tiny.shape.head:
        model.logit_rule = logit_rule(model)
    layers = install(model, tiny.shape)
    for name, tensor in (weights or {}).items():
        layer, _, role = name.rpartition("/")
        if role == "weight" and layer in layers:
            layers[layer].weight = tensor
    return model, layers


def change(tiny: Tiny, start: Start, result: LocalResult, weights: Tensors | None = None) -> dict[str, Tensor]:
    """A round's change of every effective weight: (m, n) per target, and the head's tensors, end minus beginning."""
    begun = {**tiny.weights, **(weights or {}), **start.tensors}
    changes = {name: result.tensors[name] - begun[name] for name in tiny.shape.head_names}
    for layer in tiny.shape.targets:
        W_mn = begun[f"{layer.name}/weight"]
        if start.subspace is not None:
            left, right = result.blocks[layer.name]
            kept = result.base_scales.get(layer.name, result.base_scale)
            changes[layer.name] = kept * W_mn + left @ right - W_mn
        elif f"{layer.name}/left" in start.tensors:  # with or without a core
            moved = product(layer, result.tensors) - product(layer, start.tensors)
            changes[layer.name] = start.scale_of(layer.name) * moved
        else:
            changes[layer.name] = result.tensors[f"{layer.name}/weight"] - W_mn
    return changes


def product(layer: Layer, tensors: Tensors) -> Tensor:
    left, right, core = tensors[f"{layer.name}/left"], tensors[f"{layer.name}/right"], inner_core(tensors, layer.name)
    return left @ right if core is None else left @ core @ right


def distance(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs|, Frobenius; 0 for two zeros."""
    gap = float((ours.detach().double() - theirs.double()).norm())
    return gap / float(theirs.double().norm()) if gap else 0.0


def worst(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest `distance` over tensors of the same names."""
    assert ours.keys() == theirs.keys()
    return max((distance(ours[name], theirs[name]) for name in theirs), default=0.0)
