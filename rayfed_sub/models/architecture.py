"""A model without its weights: the configuration, which layers are trained, how it is built on the meta device."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from inspect import signature
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from rayfed_sub.core.errors import UserError
from rayfed_sub.core.types import Layer, ModelShape
from rayfed_sub.models.class_rows import class_rows, named_classes
from rayfed_sub.models.experts import Matrix
from rayfed_sub.models.flat_rows import is_flat
from rayfed_sub.models.hub import RANDOM, Source, locate, quiet, reading
from rayfed_sub.models.logits import LogitRule, logit_rule
from rayfed_sub.models.own_model import Loss, Measure
from rayfed_sub.models.positions import position_limit, positions_padding
from rayfed_sub.models.presets import CLASSIFIERS_IN_ANY_PACK, SAME_IN_ANY_PACK
from rayfed_sub.models.quantisation import checked_config, quantised_forms
from rayfed_sub.models.targets import find_targets, layer_size, linear_layers
from rayfed_sub.models.text_to_text import KIND, LANGUAGE, check_start, text_to_text
from rayfed_sub.models.tokenizers import ByteTokenizer

if TYPE_CHECKING:
    from rayfed_sub.config.schema import Model

log = logging.getLogger(__name__)

AUTO_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "text-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
}
PROBLEM_TYPES = {
    "classification": "single_label_classification",
    "regression": "regression",
    "multi-label": "multi_label_classification",
}
"""transformers' names of problems."""
_HEADS = ("classifier", "score", "pre_classifier", "pooler")
"""Top-level modules that classification adds to an encoder; an encoder's own pooler lies inside the encoder."""
_CAUSAL = ("is_decoder", "causal")
"""Keys of a transformers configuration by which an encoder's attention becomes causal."""
_NOT_NUMBERS = {"architectures", "dtype", "id2label", "label2id", "model_type", "problem_type", "rescale_every"}
"""Entries of a transformers configuration that follow from the rest of ours, or are fixed here."""


@dataclass(frozen=True)
class Architecture:
    """A model without its weights.  It can be pickled; treat it as read-only.

    hf_config: the transformers configuration, number of classes and dtype included, never a quantisation; None where
    there is a module.
    kind: causal-lm, seq2seq-lm, text-classification or image-classification, or own: with a loss of the caller's own.
    shape: the target layers in the model's order, and the classification head.
    tied: names of parameters that are another parameter (alias -> the name that stays).
    transposed: target layers whose stored weight is (n, m): transformers' Conv1D of GPT-2, experts of some types.
    logits: how a causal model's logits follow from its output layer; None where they are the model's own affair.
    positions: the longest row in tokens, where the model has a table of positions; of an encoder-decoder the longest
    answer, and `sources` the longest source.
    causal: keys of the model's own configuration that were false and are true here, or its tokens would see later ones.
    alone: True where target layers see something else than row after row, so that clients train one at a time.
    module: a module of the caller's own that transformers does not build, on the meta device; loss, measure: the
    caller's own, see `OwnModel`.
    quantised: parameters that lie in memory quantised, and in which form (`models/quantised.py`).
    class_rows: rows of a checkpoint's classification head in the order of the classes; () where they are in it, None
    where the head is for other classes and is drawn anew (`models/class_rows.py`).
    """

    hf_config: Any
    kind: str
    shape: ModelShape
    tied: Mapping[str, str]
    transposed: frozenset[str] = frozenset()
    logits: LogitRule | None = None
    positions: int | None = None
    causal: tuple[str, ...] = ()
    alone: bool = False
    module: nn.Module | None = None
    loss: Loss | None = None
    measure: Measure | None = None
    sources: int | None = None
    quantised: Mapping[str, str] = field(default_factory=dict)
    class_rows: tuple[int, ...] | None = ()

    @property
    def one_at_a_time(self) -> bool:
        """True where packs have one client: nothing says how the model treats the rows of several."""
        return self.alone or self.module is not None

    @property
    def any_pack(self) -> bool:
        """True where a client's result has the same bits in any pack: for types for which the tests show it."""
        if self.one_at_a_time or self.shape.experts:  # an expert has the bits of all its tokens together
            return False
        if self.kind == KIND:
            return False
        if self.kind == "causal-lm":
            return is_flat(self.hf_config) and self.hf_config.model_type in SAME_IN_ANY_PACK
        return self.hf_config.model_type in CLASSIFIERS_IN_ANY_PACK


def architecture(
    model: Model,
    kind: str,
    class_names: Sequence[str] = (),
    vocabulary: int | None = None,
    pad: int | None = None,
    given: Any = None,
    problem: str = "classification",
) -> Architecture:
    """The architecture of `model` as a `causal-lm`, `text-classification` or `image-classification` model; the first
    becomes `seq2seq-lm` where the model is an encoder-decoder.

    Reads the model's configuration only; given: a transformers configuration in its place.  class_names: of a
    classification, in order; problem: what its labels are, `config.schema.Problem`.  vocabulary: tokens the processor
    can give; the model must have as many.  pad: the processor's padding token, which decoders that classify need.
    Raises UserError on model.path, model.targets, model.random or one of its keys, task.label.
    """
    classifies = kind not in LANGUAGE
    if classifies and problem != "regression" and len(class_names) < 2:
        what = "labels" if problem == "multi-label" else "classes"
        raise UserError("task.label", len(class_names), f"at least 2 {what}", "choose a column with more values")
    hf_config = copy.deepcopy(given) if given is not None else bare_config(model, kind, vocabulary)
    hf_config.dtype = getattr(torch, model.dtype)
    if hasattr(hf_config, "rescale_every"):
        hf_config.rescale_every = 0  # RWKV would halve shared weights, and hidden states, after every 6 blocks
    if not classifies and text_to_text(hf_config):
        kind = KIND
        source = locate(model.path) if given is None and model.path != RANDOM else None
        if source is not None and source.gguf is not None:
            allowed = "a folder or hub id for an encoder-decoder, of which GGUF files say too little"
            raise UserError("model.path", model.path, allowed, "take the original model")
        _begin_answers(source, hf_config, pad)
    _check_vocabulary(model, kind, hf_config, vocabulary)
    causal = [key for key in _CAUSAL if kind == "causal-lm" and getattr(hf_config, key, None) is False]
    for key in causal:  # BERT and its variants are encoders by default
        setattr(hf_config, key, True)
    rows: tuple[int, ...] | None = ()
    if classifies:
        names = tuple(class_names) if problem != "regression" else ("LABEL_0",)  # transformers' name of one output
        if problem != "regression" and model.path != RANDOM:
            rows = _rows_of_classes(named_classes(hf_config), names, given)
        hf_config.id2label = dict(enumerate(names))  # their number follows
        hf_config.label2id = {name: number for number, name in enumerate(names)}
        hf_config.problem_type = PROBLEM_TYPES[problem]
    moved = _fill_with(hf_config, _pad(hf_config) if pad is None else pad) if kind == "text-classification" else []
    module = _checked_build(model, hf_config, kind)
    if moved and model.path != RANDOM and positions_padding(module) is not None:
        for config, own in moved:  # a tokenizer without a padding token would move all pretrained positions
            config.pad_token_id = own
        module = _checked_build(model, hf_config, kind)
    if kind == KIND:
        check_start(*_named(model, hf_config), module)
    if kind == "image-classification":
        _check_pixels(model, module)
    head = _head(module) if classifies else {}
    if classifies and not head:
        raise UserError("model.path", model.path, f"a model whose head for {kind} is linear", "take another model")
    rule = None if classifies else logit_rule(module)
    targets = find_targets(model.targets, module, kind, head)
    shape = ModelShape(
        tuple(layer_of(name, layer) for name, layer in targets.items()),
        tuple(layer_of(name, layer) for name, layer in head.items()),
    )
    return Architecture(
        hf_config,
        kind,
        shape,
        dict(tied(module)),
        frozenset(name for name, layer in targets.items() if stored_transposed(layer)),
        rule,
        None
        if kind == "image-classification"
        else position_limit(module, hf_config, "decoder" if kind == KIND else ""),
        tuple(causal),
        vars(module).get("one_at_a_time", False),
        sources=position_limit(module, hf_config, "encoder") if kind == KIND else None,
        quantised={} if given is not None else quantised_forms(model, module, shape),
        class_rows=rows,
    )


def _rows_of_classes(own: Sequence[str], names: Sequence[str], given: Any) -> tuple[int, ...] | None:
    """See `Architecture.class_rows`; own: the configuration's classes.  Raises UserError for a model of the caller's
    own whose classes are the same in another order, since its tensors stay as they are."""
    rows = class_rows(own, names)
    theirs, ours = (", ".join(these[:8]) + (", ..." if len(these) > 8 else "") for these in (own, names))
    if given is None and rows is None:
        log.warning("model.path: its head is for other classes (%s); a new one is drawn for %s", theirs, ours)
    elif given is not None and rows:
        allowed = f"a model whose classes are in the order of task.label's, {ours}; it has {theirs}"
        raise UserError("model", type(given).__name__, allowed, "save it, and set model.path to its folder")
    return rows


def bare_config(model: Model, kind: str, vocabulary: int | None = None) -> Any:
    """The transformers configuration of `model` as it comes, for a processor of so many tokens.

    Raises UserError on model.path, model.random or one of its keys.
    """
    return _random_config(model, kind, vocabulary) if model.path == RANDOM else _read_config(model)


def kind_of_model(model: Model, kind: str, given: Any = None) -> str:
    """The kind that `architecture` makes of the model: `seq2seq-lm` in place of `causal-lm` for an encoder-decoder.

    given: its configuration, where it is there.  A GGUF file's takes long to read, and is no encoder-decoder's.
    Raises UserError as `bare_config`."""
    if kind != "causal-lm" or (given is None and model.path != RANDOM and locate(model.path).gguf is not None):
        return kind
    return KIND if text_to_text(bare_config(model, kind) if given is None else given) else kind


def auto_class(hf_config: Any, kind: str) -> str:
    """The name of transformers' class that builds and loads a model of this configuration and kind.

    A language model that sees, or hears, as well is built whole: its towers lie idle, and the export has them."""
    import transformers

    usual = AUTO_CLASSES[kind]
    if kind != "causal-lm" or getattr(hf_config, "is_encoder_decoder", False):
        return usual
    alone = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(hf_config), None)
    for name, mapping in (
        ("AutoModelForImageTextToText", transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
        ("AutoModelForMultimodalLM", transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING),
        # Some that hear stand there alone.
        ("AutoModelForSeq2SeqLM", transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING),
    ):
        whole = mapping.get(type(hf_config), None)
        if whole is not None:
            return usual if whole is alone else name
    return usual


def sees_or_hears(hf_config: Any) -> bool:
    """True for a model that reads images or sound beside text."""
    from transformers import MODEL_FOR_MULTIMODAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

    if type(hf_config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return not text_to_text(hf_config)
    return type(hf_config) in MODEL_FOR_MULTIMODAL_LM_MAPPING


def build(hf_config: Any, kind: str, device: str = "meta") -> nn.Module:
    """The module with transformers' own initial weights (none on `meta`), in eval mode.

    Attention is torch's scaled_dot_product_attention where the architecture has it, else transformers' eager
    one: that is what transformers picks when nothing is asked for, and asking would fail where it has not.
    """
    import transformers

    hf_config = copy.deepcopy(hf_config)  # building writes into it
    if kind not in LANGUAGE:
        _for_rows(hf_config, kind)
    with torch.device(device), quiet():
        module: nn.Module = getattr(transformers, auto_class(hf_config, kind)).from_config(hf_config)
    for name in kept_exact(module):
        parameter = module.get_parameter(name)
        parameter.data = parameter.data.float()
    return module.eval()


def kept_exact(module: nn.Module) -> frozenset[str]:
    """The parameters that transformers loads in float32 whatever the model's type is: routers, their biases."""
    patterns = getattr(module, "_keep_in_fp32_modules_strict", None)
    if not patterns:
        return frozenset()
    meant = re.compile("|".join(patterns).replace("*", ".*"))  # as transformers looks for them
    names = (name for name, _ in module.named_parameters(remove_duplicate=False))
    return frozenset(name for name in names if meant.search(name))


def _for_rows(hf_config: Any, kind: str) -> None:
    """Completes the configuration of a model that answers whole rows."""
    import transformers

    hf_config.use_cache = False  # no token follows
    if getattr(hf_config, "is_encoder_decoder", False) and getattr(hf_config, "decoder_start_token_id", None) is None:
        hf_config.decoder_start_token_id = hf_config.pad_token_id  # as T5's checkpoints have it
    known = getattr(transformers, AUTO_CLASSES[kind])._model_mapping.get(type(hf_config), None)
    if isinstance(known, tuple) and not hf_config.architectures:
        hf_config.architectures = [known[0].__name__]  # of several classes transformers takes the one that is named


def skeleton(architecture: Architecture) -> nn.Module:
    """The architecture's module on the meta device, a new one each time."""
    if architecture.module is not None:
        return copy.deepcopy(architecture.module)
    return build(architecture.hf_config, architecture.kind)


def loading_class(architecture: Architecture) -> str:
    """The class of transformers whose from_pretrained loads a written folder: the automatic one that builds the model,
    or the model's own where that does not know the configuration of a language model cut from a larger one (Emu3,
    Mllama)."""
    import transformers

    usual, module = auto_class(architecture.hf_config, architecture.kind), cast(Any, skeleton(architecture))
    return usual if type(module.config) in getattr(transformers, usual)._model_mapping else type(module).__name__


def reason(error: Exception) -> str:
    """A library's error in one line; theirs may list every model there is."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:300]}"


def _read_config(model: Model) -> Any:
    from transformers import AutoConfig

    source = locate(model.path)
    try:
        with reading(source):
            hf_config = AutoConfig.from_pretrained(source.name, gguf_file=source.gguf, trust_remote_code=False)
    except Exception as error:  # a stranger's file may cause any error in the libraries
        raise UserError(
            "model.path",
            model.path,
            "a model that transformers can load, from here or from the hub",
            reason(error),
        ) from error
    if (stored := getattr(hf_config, "quantization_config", None)) is not None:
        checked_config(model, stored)
        del hf_config.quantization_config
    return hf_config


def _random_config(model: Model, kind: str, vocabulary: int | None) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    numbers = dict(model.random)
    name = numbers.pop("type", None)
    if name not in CONFIG_MAPPING:
        near = get_close_matches(str(name), list(CONFIG_MAPPING.keys()), n=1)
        advice = f"did you mean {near[0]}?" if near else "e.g. model.random.type=llama"
        raise UserError("model.random.type", name, "a model type that transformers knows", advice)
    try:
        with quiet():
            default = AutoConfig.for_model(name)
    except Exception as error:  # of some types not even the defaults fit together
        allowed = "a model type whose configuration has defaults that fit together"
        raise UserError("model.random.type", name, allowed, reason(error)) from error
    known = (set(default.to_dict()) | set(default.attribute_map)) - _NOT_NUMBERS
    for key, value in numbers.items():
        # transformers takes any name and forgets it.
        if key not in known or key.startswith("_"):
            near = get_close_matches(key, known, n=1)
            advice = f"did you mean {near[0]}?" if near else "remove it"
            raise UserError(f"model.random.{key}", value, f"a key of {type(default).__name__}", advice)
    if kind != "image-classification":
        processor = ByteTokenizer()
        defaults = {
            "vocab_size": vocabulary or processor.vocabulary,
            "pad_token_id": processor.pad,
            "bos_token_id": processor.bos,
            "eos_token_id": processor.eos,
        }
        numbers = {key: value for key, value in defaults.items() if key in known} | numbers
    try:
        with quiet():
            return AutoConfig.for_model(name, **numbers)
    except Exception as error:  # each configuration class checks its numbers with errors of its own
        raise UserError("model.random", dict(model.random), "numbers that fit together", reason(error)) from error


def _begin_answers(source: Source | None, hf_config: Any, pad: int | None) -> None:
    """Sets the tokens with which answers begin and are filled up where the configuration has none: what stands in
    generation_config.json, and for models without a source, as in T5, the padding token."""
    if getattr(hf_config, "pad_token_id", None) is None:
        hf_config.pad_token_id = pad
    known = getattr(hf_config, "decoder_start_token_id", None)
    size = getattr(hf_config.get_text_config(decoder=True), "vocab_size", None)
    # A random model's default may be a token of the vocabulary that the type has by default.
    if known is None or (source is None and size is not None and known >= size):
        start = hf_config.pad_token_id if source is None else _stored_start(source)
        if start is not None:
            hf_config.decoder_start_token_id = start


def _stored_start(source: Source) -> int | None:
    from transformers import GenerationConfig

    with reading(source), suppress(OSError):  # not every model has one
        start: int | None = GenerationConfig.from_pretrained(source.name).decoder_start_token_id
        return start
    return None


def _named(model: Model, hf_config: Any) -> tuple[str, str]:
    """The key that says which model it is, and its value."""
    return ("model.random.type", hf_config.model_type) if model.path == RANDOM else ("model.path", model.path)


def _check_vocabulary(model: Model, kind: str, hf_config: Any, vocabulary: int | None) -> None:
    try:
        size = getattr(hf_config.get_text_config(decoder=True if kind == KIND else None), "vocab_size", None)
    except ValueError as error:  # several language models in one
        field, value = _named(model, hf_config)
        raise UserError(field, value, "a model with one language model in it", reason(error)) from error
    if vocabulary is None or size is None or kind == "image-classification" or size >= vocabulary:
        return
    if model.path == RANDOM:
        raise UserError("model.random.vocab_size", size, f"at least {vocabulary}, the processor's tokens", "remove it")
    raise UserError("model.path", model.path, f"a model with the tokenizer's {vocabulary} tokens; it has {size}")


def _fill_with(hf_config: Any, pad: int | None) -> list[tuple[Any, int]]:
    """Sets the padding token, of the language model in a larger one too, whose configuration classifiers read.  Gives
    the configurations that had another, and theirs."""
    configs = {id(config): config for config in (hf_config, hf_config.get_text_config())}.values()
    found = [(config, getattr(config, "pad_token_id", None)) for config in configs]
    for config in configs:
        config.pad_token_id = pad
    return [(config, own) for config, own in found if own not in (None, pad)]


def _pad(hf_config: Any) -> int | None:
    text = hf_config.get_text_config()
    if text.pad_token_id is not None:
        return int(text.pad_token_id)
    ends = text.eos_token_id
    return next(iter(ends), None) if isinstance(ends, list) else ends


def _checked_build(model: Model, hf_config: Any, kind: str) -> nn.Module:
    try:
        return build(hf_config, kind)
    except Exception as error:  # each module class checks its numbers with errors of its own
        field, value = ("model.random", dict(model.random)) if model.path == RANDOM else ("model.path", model.path)
        if "Unrecognized configuration class" in str(error):
            allowed = f"an architecture that transformers has for {kind}; {hf_config.model_type} is not one"
            raise UserError(field, value, allowed, "take another model or task") from error
        raise UserError(field, value, f"a model that can be built for {kind}", reason(error)) from error


def _check_pixels(model: Model, module: Any) -> None:
    """UserError for a model that classifies images in another form than squares of pixels."""
    names = signature(module.forward).parameters
    other = "tokens of colours (input_ids)" if "pixel_values" not in names else "patches with their places"
    if "pixel_values" in names and "spatial_shapes" not in names:
        return
    field = "model.random.type" if model.path == RANDOM else "model.path"
    value = module.config.model_type if model.path == RANDOM else model.path
    raise UserError(field, value, f"a model that reads squares of pixels; this one reads {other}", "take another model")


def _head(module: Any) -> dict[str, nn.Module]:
    """The linear layers of a classification: those of the usual names, or else all that lie outside the base model, or
    else the last one that gives as many numbers as there are labels (Perceiver's decoder lies inside)."""
    linears = dict(linear_layers(module))
    usual = {name: child for name, child in linears.items() if name.split(".")[0] in _HEADS}
    outside = {name: child for name, child in linears.items() if name.split(".")[0] != module.base_model_prefix}
    fitting = {name: child for name, child in linears.items() if layer_size(child)[0] == module.config.num_labels}
    return usual or outside or dict(list(fitting.items())[-1:])


def stored_transposed(part: nn.Module | Matrix) -> bool:
    """True where a target's weight is stored as (n, m)."""
    return part.transposed if isinstance(part, Matrix) else not isinstance(part, nn.Linear)


def layer_of(name: str, module: nn.Module | Matrix) -> Layer:
    """The record of a linear layer, or of an expert's matrix."""
    if isinstance(module, Matrix):
        return Layer(name, module.m, module.n, module.bias, expert=True)
    return Layer(name, *layer_size(module), getattr(module, "bias", None) is not None)


def tied(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Parameters that are another one: their name, and the name that stays."""
    first: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            yield name, first[id(parameter)]
