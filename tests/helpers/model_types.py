"""Every type of transformers' models, tiny and random, judged one by one: what of this engine works with it.

    python -m tests.helpers.model_types [TYPE ...] [--kind KIND] [--jobs N]

Without types it judges all.  The rows go into experiments/results/models.csv in place of their own earlier ones, and
experiments/MODELS.md is made of all rows there.
"""

from __future__ import annotations

import argparse
import csv
import logging
import math
import multiprocessing
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional

from rayfed_sub.config.schema import Model, Optimizer
from rayfed_sub.core.arrays import Guard
from rayfed_sub.core.errors import UserError
from rayfed_sub.core.types import Start, Subspace
from rayfed_sub.models.architecture import Architecture, architecture, loading_class, sees_or_hears
from rayfed_sub.models.experts import matrix_of, place
from rayfed_sub.models.hub import quiet
from rayfed_sub.models.image_processors import load_image_processor
from rayfed_sub.models.model_folder import write_folder
from rayfed_sub.models.presets import CLASSIFIERS_IN_ANY_PACK, SAME_IN_ANY_PACK
from rayfed_sub.models.targets import some
from rayfed_sub.models.weights import assemble, load_weights, target_weights
from rayfed_sub.training.losses import predicted
from tests.helpers.tiny_models import (
    PAD,
    VOCABULARY,
    Tiny,
    change,
    draw_batches,
    draw_pairs,
    draw_sentences,
    draw_tokens,
    galore_start,
    lora_start,
    run_pack,
    run_reference,
    worst,
)

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
ROWS, PAGE = EXPERIMENTS / "results" / "models.csv", EXPERIMENTS / "MODELS.md"
MAPPINGS = {
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "seq2seq-lm": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "image-text-to-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "text-classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "image-classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
}
SPEAKING = ("seq2seq-lm", "image-text-to-text", "causal-lm")
"""Kinds that write text: one kind of task, whose model's configuration says the rest."""
CLASSES = ("few", "many", "some")
END = 1
"""The token that ends a text, as of all configurations here."""
LARGEST = 60_000_000
"""Parameters of a model that counts as tiny, at most."""
SIZES: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 1, "initializer_range": 0.1},
    **{"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 128, "encoder_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_experts": 4, "num_local_experts": 4},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "rotary_dim": 4},
    **{"shared_expert_intermediate_size": 16, "attention_chunk_size": 6, "sliding_window": 6, "max_window_layers": 0},
    **{"use_sliding_window": True, "n_embd": 32, "n_head": 2, "n_positions": 128},
    **{"floor_scale": 8, "ffn_dim": 48, "word_embed_proj_dim": 32, "d_model": 32},
    **{"decoder_attention_heads": 2, "encoder_attention_heads": 2},
    **{"decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "d_inner": 48, "n_inner": 48, "emb_dim": 32},
    **{"n_heads": 2, "dim": 32, "hidden_dim": 48, "embedding_size": 32, "image_size": 32, "patch_size": 8},
    **{"num_heads": 2, "dff": 48, "attention_heads": 2, "num_local_heads": 2, "d_ff": 48, "d_kv": 16},
    **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16, "kv_lora_rank": 8, "q_lora_rank": 16},
    **{"embed_dim": 32, "projection_dim": 32, "init_std": 0.1, "vocab_size_per_layer_input": VOCABULARY},
    **{"hidden_size_per_layer_input": 8},
}
_BLOCKS = ("num_hidden_layers", "n_layer", "num_layers", "decoder_layers", "n_layers", "num_decoder_layers")
LEAVE_OUT = ((), ("sliding_window",), ("head_dim",), ("num_key_value_heads",), ("head_dim", "num_key_value_heads"))
"""Sizes that some types do not take together."""
_GROUPED = {"n_group": 2, "topk_group": 1}
_LOW_RANK = {"num_key_value_heads": 2, "head_dim": 8, **_GROUPED}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}
_STAGES = {"patch_size": 4, "window_size": 2}
_FOUR = {"depths": [1, 1, 1, 1], "initializer_range": 0.05, "layer_scale_init_value": 0.1}
_PYRAMID = {"hidden_sizes": [32, 32, 64, 64], "num_attention_heads": [1, 1, 2, 2]}
_SMALL = {"initializer_range": 0.05}
"""Weights with which gradients are far enough from zero: close to it, Adam's steps are rounding."""


def _in_text(**numbers: Any) -> dict[str, Any]:
    return {"text_config": numbers}


def _mrope(*sections: int) -> dict[str, Any]:
    """Rotary positions of text, height and width, in so many frequencies each."""
    return _in_text(rope_parameters={"rope_type": "default", "mrope_section": list(sections)})


_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), _LOW_RANK),
    **dict.fromkeys(("minicpm3", "youtu"), _LOW_RANK),
    "mistral4": {**_LOW_RANK, "head_dim": 16},
    **dict.fromkeys(("bailing_hybrid", "beam"), _GROUPED),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker"), _mrope(2, 3, 3)),
    **dict.fromkeys(("glm4v", "glm46v", "glmga"), _mrope(2, 3, 3)),
    **dict.fromkeys(("glm4v_moe", "glm_ocr"), _mrope(1, 1, 2)),
    **dict.fromkeys(("dots3_note", "glm5_next"), _in_text(num_key_value_heads=2)),
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "kimi_k25": _in_text(**_LOW_RANK),
    **dict.fromkeys(("bamba", "granitemoehybrid"), _MAMBA),
    **{name: {**_STAGES, **_FOUR, "hidden_sizes": [16, 32, 32, 48]} for name in ("convnext", "convnextv2")},
    **{name: {**_STAGES, **_FOUR, "embed_dim": 24, "image_size": 64} for name in ("swin", "swinv2", "donut-swin")},
    **{name: {**_FOUR, **_PYRAMID} for name in ("pvt", "pvt_v2", "segformer")},
    "cvt": {"embed_dim": [16, 32, 48], "depth": [1, 2, 3], "num_heads": [1, 2, 3]},
    "efficientnet": {"hidden_dim": 2560},
    "focalnet": _FOUR,
    "levit": {"image_size": 64, "patch_size": 16, "depths": [1, 1, 1], "initializer_range": 0.02},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8, "input_size": 32, "patch_size": 8},
    "lilt": {"hidden_size": 48},
    "luke": {"entity_vocab_size": 64, "entity_emb_size": 16},
    "longformer": {"attention_window": 8, "max_position_embeddings": 130},
    "mobilevitv2": {"image_size": 64, "patch_size": 2},
    "cohere_compass": _in_text(rope_parameters={"full_attention": _ROPE, "sliding_attention": _ROPE}),
    "granite_docling": {"vision_config": {"out_hidden_size": 32}},
    "inkling2": {"vision_config": {"text_hidden_size": 32}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [3, 2]}},
    "muse_spark": {"audio_config": {"out_hidden_size": 32}},
    "nemo_speechlm": {"head_config": {"audio_hidden_size": 32}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "codegen": {"n_head": 4, "num_attention_heads": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {
        "attn_config": {"rope_theta": 10_000.0, "kv_n_heads": 1, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "dots3_note_text": {"num_key_value_heads": 2},
    "encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}, "decoder_start_token_id": 1},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 32, "mamba_d_head": 8},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text", "olmo_hybrid", "qwen3_5_text", "qwen3_5_moe_text"), _SMALL),
    **dict.fromkeys(("gemma4", "gemma4_unified"), _SMALL),
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 6},
    "granitemoeshared": {"shared_intermediate_size": 16},
    "led": {"attention_window": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 2},
    "kimi_linear": {"linear_num_heads": 2, "linear_head_dim": 8},
    "longcat_flash": {**_LOW_RANK, "zero_expert_num": 2},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 16, "chunk_size": 16, "n_groups": 1},
    "perceiver": {
        **{"d_latents": 32, "d_model": 32, "num_latents": 8, "num_self_attends_per_block": 2},
        **{"num_self_attention_heads": 2, "num_cross_attention_heads": 2},
    },
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16]},
    "switch_transformers": {"num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 10, "n_mamba_heads": 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "num_mem_blocks": 1, "n_mamba_heads": 4, "chunk_size": 16},
    "zaya": {"num_experts_per_tok": 1},
}
"""Sizes of single types."""
SECONDS = 240
"""A type that takes longer is given up."""


LIMITS = {"loss": 1e-5, "pack": 1e-5, "fedftg": 1e-4, "fedit": 1e-4, "export": 1e-5}
"""The largest relative difference that is a yes."""


@dataclass(frozen=True)
class Verdict:
    """What works with a type.  Words: `yes`, `no` or what was found; empty where it was not reached.

    built: a model of at most LARGEST parameters can be built.  targets: the default's.  causal: of a language model.
    loss: as of the model's own logits, row by row.  gradient: every target gets one.  pack: three clients together
    against each alone.  fedftg, fedit: largest relative difference from the reference.  export: the written folder
    gives the trained logits.  reason: why not.
    """

    type: str
    kind: str
    built: bool = False
    targets: str = ""
    causal: str = ""
    loss: str = ""
    gradient: str = ""
    pack: str = ""
    fedftg: str = ""
    fedit: str = ""
    export: str = ""
    reason: str = ""

    @property
    def works(self) -> bool:
        return not self.reason


def types_of(kind: str) -> list[str]:
    """The model types that transformers has for a kind, by name; one that writes text stands in one list alone, which
    says what a run makes of it."""
    found = _known(kind)
    if kind in SPEAKING:
        found -= set().union(*(_known(other) for other in SPEAKING[: SPEAKING.index(kind)]))
    return sorted(found)


def _known(kind: str) -> set[str]:
    return {config.model_type for config in getattr(transformers, MAPPINGS[kind]) if config.model_type}


def sizes(name: str, left_out: Sequence[str] = (), blocks: int = 4) -> dict[str, Any]:
    """`model.random` for a tiny model of the type, nested configurations filled in."""
    with quiet():
        default = transformers.AutoConfig.for_model(name)
    known = default.to_dict().keys() | default.attribute_map.keys()
    own = {key: value for key, value in OWN.get(name, {}).items() if key in known}
    return {"type": name, **_merged(_filled(default, left_out, blocks), own)}


def _filled(config: Any, left_out: Sequence[str], blocks: int) -> dict[str, Any]:
    own = config.to_dict()
    given = SIZES | dict.fromkeys(_BLOCKS, blocks)
    known = (own.keys() | config.attribute_map.keys()) & given.keys() - set(left_out)
    # Where a type has a size for each of its stages, its own are small.
    staged = {key for key in known if isinstance(own.get(config.attribute_map.get(key, key)), list | tuple)}
    found = {key: given[key] for key in sorted(known - staged)}
    for key in config.sub_configs:
        part = getattr(config, key, None)
        if part is not None:
            found[key] = {"model_type": part.model_type, **_filled(part, left_out, blocks)}
    return found


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: _merged(one[key], other[key]) for key in one if isinstance(other.get(key), dict) and key in one}
    return {**one, **other, **both}


def built(name: str, kind: str, blocks: int = 4, **fields: Any) -> tuple[Model, Architecture]:
    """A tiny model of the type, and fields of `model`, and its architecture.  Raises UserError."""
    last: Exception | None = None
    for left_out in LEAVE_OUT:
        model = Model(path="random", random=sizes(name, left_out, blocks), **fields)
        try:
            classes = ("causal-lm", ()) if kind in SPEAKING else (kind, CLASSES)
            bones = architecture(model, *classes, _vocabulary(kind), PAD)
        except UserError as error:
            if error.field == "model.targets" and "without its weights" not in str(error):
                raise
            last = last or error
            continue
        return model, bones
    assert last is not None
    raise last


def _vocabulary(kind: str) -> int | None:
    return None if kind == "image-classification" else VOCABULARY


def judged(name: str, kind: str, blocks: int = 4) -> Verdict:
    """The verdict on a type, on a model of so many blocks, made of as many checks as it passes until one raises."""
    verdict = Verdict(name, kind)
    try:
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(0)
            for verdict in _checks(name, kind, blocks):  # noqa: B007
                pass
    except Exception as error:  # each type fails in its own way: that is what the table is for
        known = f"{type(error).__name__}: {error}"
        if isinstance(error, UserError):
            known = f"{error.allowed}; {error.advice}"
        built_ = verdict.built or (isinstance(error, UserError) and error.field == "model.targets")
        verdict = replace(verdict, built=built_, reason=" ".join(known.split())[:300])
    return verdict


def _checks(name: str, kind: str, blocks: int) -> Iterator[Verdict]:
    """The verdict after each check."""
    verdict = Verdict(name, kind)
    model, bones = built(name, kind, blocks)
    tensors = load_weights(model, bones, seed=0)
    numbers = sum(tensor.numel() for tensor in tensors.values())
    assert numbers <= LARGEST, f"{numbers:,} parameters in the smallest form that was found"
    names = (place(layer)[0] if layer.expert else layer.name for layer in bones.shape.targets)
    yield (verdict := replace(verdict, built=True, targets=some(names)))
    if kind in SPEAKING:
        yield (verdict := replace(verdict, causal="made so" if bones.causal else "yes"))
    tiny, shared = Tiny(assemble(bones, tensors), bones.shape, _draw(bones.kind, model)), Guard(tensors.items())
    yield (verdict := replace(verdict, loss=_word(_loss(tiny), LIMITS["loss"])))
    yield (verdict := replace(verdict, gradient=_gradient(tiny)))
    yield (verdict := replace(verdict, pack="one at a time" if bones.alone else _pack(tiny)))
    shared.check()
    for method, start in (("fedftg", galore_start(tiny, Subspace(2, 2))), ("fedit", lora_start(tiny, 2))):
        yield (verdict := replace(verdict, **{method: _word(_reference(tiny, start), LIMITS[method])}))
    yield (verdict := replace(verdict, export=_word(_export(tiny, bones, tensors), LIMITS["export"])))
    wrong = [f.name for f in fields(verdict) if str(getattr(verdict, f.name)).startswith("no, ")]
    if wrong:
        yield replace(verdict, reason=f"differs: {', '.join(wrong)}")


def _word(found: float, allowed: float) -> str:
    return "yes" if found <= allowed else f"no, {found:.0e}"


def anywhere(verdict: Verdict) -> Verdict:
    """What of a verdict every processor gives.  Rounding moves a difference past its limit where it is near: up to
    three times the limit, as its one digit says, counts as a yes here, and a larger one as a no without its size.

    >>> near, far = (Verdict("a", "b", pack=f"no, {size}e-05", reason="differs: pack") for size in (2, 4))
    >>> anywhere(near).pack, anywhere(near).reason, anywhere(far).pack
    ('yes', '', 'no')
    """
    words = {}
    for name, limit in LIMITS.items():
        word = getattr(verdict, name)
        if word.startswith("no, "):
            words[name] = "yes" if float(word.removeprefix("no, ")) <= 3.05 * limit else "no"
    listed = verdict.type in SAME_IN_ANY_PACK | CLASSIFIERS_IN_ANY_PACK
    if verdict.pack == "same bits" and not listed:
        words["pack"] = "yes"
    reason = "" if verdict.reason.startswith("differs: ") else verdict.reason
    return replace(verdict, **words, reason=reason)


def _draw(kind: str, model: Model) -> Any:
    if kind == "causal-lm":
        return draw_tokens
    if kind == "seq2seq-lm":
        return draw_pairs
    if kind == "text-classification":
        return _draw_ended
    side = load_image_processor(model).side

    def draw(rng: torch.Generator, rows: int, tokens: int, labels: int) -> dict[str, Tensor]:
        pixels = torch.randn(rows, 3, side, side, generator=rng)
        return {"pixel_values": pixels, "labels": torch.randint(len(CLASSES), (rows,), generator=rng)}

    return draw


def _draw_ended(rng: torch.Generator, rows: int, tokens: int, labels: int) -> dict[str, Tensor]:
    """Sentences that end with the tokenizer's end, and have no other: encoder-decoders that classify look at it."""
    batch = draw_sentences(rng, rows, tokens, labels)
    ids, lengths = batch["input_ids"], batch["attention_mask"].sum(dim=1)
    ids[ids == END] = END + 1
    ids[torch.arange(rows), lengths - 1] = END
    return batch


def _loss(tiny: Tiny) -> float:
    """The largest relative difference of a row's loss from that of the model's own logits for the row alone."""
    (batch,) = draw_batches(tiny, 0, 1, tokens=20)
    ours = predicted(tiny.packed[0], batch, PAD)
    how = {} if tiny.shape.head else {"use_cache": False}
    writes, apart = vars(tiny.model)["text_to_text"], 0.0
    for row in range(len(batch["labels"])):
        alone = {key: tensor[row : row + 1] for key, tensor in batch.items()}
        labels = alone.pop("labels")
        if "attention_mask" in alone:
            real = int(alone["attention_mask"].sum())
            alone = {key: tensor[:, :real] for key, tensor in alone.items()}
        if writes:
            alone["labels"] = labels = labels[:, labels[0] != -100]
        with torch.no_grad():
            logits: Tensor = tiny.model(**alone, **how).logits.float()
        if writes:
            logits, labels = logits[0], labels[0]
        elif labels.dim() == 2:
            logits, labels = logits[0, :-1], labels[0, 1 : logits.shape[1]]
        theirs = functional.cross_entropy(logits, labels, reduction="sum")
        mine = ours.loss_L[ours.row_L == row].sum()
        apart = max(apart, float((mine - theirs).abs() / theirs))
    return apart


def _gradient(tiny: Tiny) -> str:
    """Whether both factors of every target move in one step; of experts those that are sent a token, of each parameter
    one at least."""
    start = lora_start(tiny, 2)
    (result,) = run_pack(tiny, [start], [draw_batches(tiny, 1, 1)], Optimizer(name="sgd"), lr=1.0)
    assert result.failure is None, result.failure
    still = [name for name in start.trained if torch.equal(result.tensors[name], start.tensors[name])]
    layers = dict.fromkeys(name.rpartition("/")[0] for name in still)
    steps = {layer.name: place(layer)[0] for layer in tiny.shape.experts if result.moments[f"{layer.name}/step"]}
    idle = {layer.name for layer in tiny.shape.experts if place(layer)[0] in steps.values()} - steps.keys()
    layers = {name: None for name in layers if name not in idle}
    return f"no, {some(layers)}" if layers else "yes"


def _pack(tiny: Tiny) -> str:
    """`same bits`, `yes` up to 1e-5, or how far the three clients are from each of them alone."""
    starts = [lora_start(tiny, rank) for rank in (1, 2, 2)]
    data = [draw_batches(tiny, 2 + k, 2, rows=1 + k, tokens=(16, 9, 21)[k]) for k in range(3)]
    together = run_pack(tiny, starts, data, Optimizer(), lr=1e-2)
    apart = 0.0
    same = True
    for k, result in enumerate(together):
        (alone,) = run_pack(tiny, [starts[k]], [data[k]], Optimizer(), lr=1e-2, clients=[k])
        assert result.failure is None, result.failure
        same = same and all(torch.equal(result.tensors[name], alone.tensors[name]) for name in alone.tensors)
        apart = max(apart, worst(change(tiny, starts[k], result), change(tiny, starts[k], alone)))
    return "same bits" if same else _word(apart, LIMITS["pack"])


def _reference(tiny: Tiny, start: Start) -> float:
    """The largest relative difference of a change from the reference executor's, over two steps."""
    batches, optimizer = draw_batches(tiny, 5, 2, tokens=18), Optimizer()
    (ours,) = run_pack(tiny, [start], [batches], optimizer, lr=1e-2)
    (theirs,) = run_reference(tiny, [start], [batches], optimizer, lr=1e-2)
    assert ours.failure is None, ours.failure
    return worst(change(tiny, start, ours), change(tiny, start, theirs))


def _export(tiny: Tiny, bones: Architecture, tensors: Mapping[str, Tensor]) -> float:
    """The relative difference of logits of the written folder from those of the trained weights."""
    weights = target_weights(bones.shape, bones.transposed, tensors)
    changed = {name: tensor * 1.1 + 0.01 for name, tensor in weights.items()}
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    for layer in bones.shape.targets:
        turned = layer.name in bones.transposed
        W_mn = changed[f"{layer.name}/weight"]
        matrix_of(copies, layer, transposed=turned).copy_(W_mn.T if turned else W_mn)
    for name in bones.shape.head_names:
        copies[name.replace("/", ".")].copy_(changed[name])
    trained = assemble(bones, copies)
    (batch,) = draw_batches(tiny, 6, 1, rows=1, tokens=16)
    labels = batch.pop("labels")
    how = {"use_cache": False} if bones.kind in SPEAKING else {}
    if bones.kind == "seq2seq-lm":
        batch["decoder_input_ids"] = labels
    with TemporaryDirectory() as folder, torch.no_grad():
        write_folder(bones, tensors, changed, folder)
        loaded = getattr(transformers, loading_class(bones)).from_pretrained(folder).eval()
        theirs, ours = loaded(**batch, **how).logits, trained(**batch, **how).logits
    ours_, theirs_ = trained.state_dict(), loaded.state_dict()
    if sees_or_hears(bones.hf_config) and any(not torch.equal(x, theirs_[name]) for name, x in ours_.items()):
        return math.inf
    if bones.kind in SPEAKING:  # of some types (Youtu) transformers loads no embedding of the padding token
        theirs, ours = theirs[..., PAD + 1 :], ours[..., PAD + 1 :]
    return float((ours - theirs).abs().max() / ours.abs().max())


class TooLongError(Exception):
    """A type took longer than SECONDS."""


def _alarmed(job: tuple[str, str]) -> Verdict:
    def stop(*_: object) -> None:
        raise TooLongError(f"longer than {SECONDS} s")

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        return judged(*job)
    finally:
        signal.alarm(0)


def verdicts(jobs: Sequence[tuple[str, str]], processes: int) -> Iterator[Verdict]:
    """The verdicts of types and kinds, in their order; each is printed once it is there."""
    with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=40) as pool:
        for verdict in pool.imap(_alarmed, jobs):
            print(_row(verdict), flush=True)
            yield verdict


COLUMNS = {
    "type": "type",
    "targets": "targets of `lower-mlp`",
    "causal": "causal",
    "loss": "loss",
    "gradient": "gradient",
    "pack": "pack of three",
    "fedftg": "FedFTG",
    "fedit": "FedIT",
    "export": "export",
    "reason": "why not",
}
TITLES = {
    "causal-lm": "Language models",
    "seq2seq-lm": "Encoder-decoders",
    "image-text-to-text": "Texts beside images",
    "text-classification": "Texts",
    "image-classification": "Images",
}
HEAD = """# Types of models

What works with the defaults, type by type of `config.model_type`, on a tiny random model of each (transformers
{transformers}, torch {torch}, peft {peft}, one thread of a CPU, float32). `make models` makes this file; a model of
another size may differ where its configuration switches on other parts. The models' numbers, among them how large
initial weights are, were chosen so that gradients lie clear of rounding, which Adam makes steps of.

- targets: what `model.targets=lower-mlp`, the default, trains, a name for each place in a block. Where it finds none,
  `attention`, `all-linear` or a regular expression may.
- causal: no token sees later ones; "made so" where a key of the configuration had to be set, which a run does itself.
- loss: equal to the cross-entropy of the model's own logits for each row alone, to 1e-5.
- gradient: every target moves in one step; of experts those that are sent a token.
- pack of three: clients trained together as each alone, "same bits", or to 1e-5 ("yes"); "one at a time" where layers
  see something else than row after row, so that packs have one client. What a run relies on is the
  shorter list that more tests hold (`SAME_IN_ANY_PACK` and `CLASSIFIERS_IN_ANY_PACK` in `models/presets.py`); outside
  it the processor, whose kernels round in their own way, decides which of the two it is.
- FedFTG, FedIT: change of all targets equal to that of galore-torch and peft, to 1e-4.
- export: the written folder, loaded by transformers, has the logits of the trained weights, to 1e-5; of models that
  see or hear every other weight is as it was, to the bit.

A type that writes text stands in one list. Encoder-decoders read a source and write an answer; models that see or hear
get text alone, and some of these have a list of encoder-decoders in transformers although they are none.

| | types | built with at most {largest} M parameters | all of it works |
| --- | --- | --- | --- |
{counts}
"""


def page(found: Sequence[Verdict]) -> str:
    """The verdicts as a Markdown page."""
    import peft

    counts, tables = [], []
    for kind, title in TITLES.items():
        own = [verdict for verdict in found if verdict.kind == kind]
        built_, works = (sum(getattr(verdict, key) for verdict in own) for key in ("built", "works"))
        counts.append(f"| {title.lower()} | {len(own)} | {built_} | {works} |")
        columns = [text for key, text in COLUMNS.items() if key != "causal" or kind in SPEAKING]
        tables.append("\n".join([f"## {title}", "", f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]))
        tables[-1] += "".join(f"\n{_row(verdict)}" for verdict in own)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__, "peft": peft.__version__}
    head = HEAD.format(**versions, largest=LARGEST // 10**6, counts="\n".join(counts))
    return "\n\n".join([head.rstrip(), *tables]) + "\n"


def _row(verdict: Verdict) -> str:
    cells = [getattr(verdict, key) for key in COLUMNS if key != "causal" or verdict.kind in SPEAKING]
    cells[0], cells[1] = f"`{cells[0]}`", f"`{cells[1]}`" if cells[1] else ""
    return f"| {' | '.join(cell.replace('|', '/').replace('<', '(').replace('>', ')') for cell in cells)} |"


def stored() -> list[Verdict]:
    """The verdicts of models.csv."""
    with ROWS.open(newline="", encoding="utf-8") as file:
        return [Verdict(**{**row, "built": row["built"] == "True"}) for row in csv.DictReader(file)]


def store(made: Iterable[Verdict]) -> None:
    """Puts verdicts into models.csv, in place of those of the same types and kinds, and writes the page anew.  Types
    that transformers no longer has are left out."""
    rows = {(verdict.kind, verdict.type): verdict for verdict in [*(stored() if ROWS.exists() else ()), *made]}
    known = [(kind, name) for kind in MAPPINGS for name in types_of(kind)]
    ordered = [rows[key] for key in known if key in rows]
    with ROWS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Verdict)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(verdict) for verdict in ordered)
    PAGE.write_text(page(ordered), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--kind", choices=list(MAPPINGS))
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    kinds = [given.kind] if given.kind else list(MAPPINGS)
    work = [(name, kind) for kind in kinds for name in types_of(kind) if name in given.types or not given.types]
    store(verdicts(work, given.jobs))
