"""Encoder-decoder models that read a text and write another (T5, BART): which they are, and the decoder's inputs.

Legend: R rows, T tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rayfed_sub.core.errors import UserError

KIND = "seq2seq-lm"
"""The kind of such a model."""
LANGUAGE = ("causal-lm", KIND)
"""Kinds of models that write text; their tasks are the same."""


def text_to_text(hf_config: Any) -> bool:
    """True for the configuration of an encoder-decoder whose encoder reads text.  One whose `is_encoder_decoder` is
    false is the decoder alone."""
    from transformers import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

    return (
        bool(getattr(hf_config, "is_encoder_decoder", False))
        and type(hf_config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    )


def decoder_inputs(model: Any, labels_RT: Tensor) -> Tensor:
    """What the decoder reads to give these labels, (R, T): its first token, then the labels, as the model itself shifts
    them.  Labels of -100, at the rows' ends, become padding."""
    if (own := getattr(model, "prepare_decoder_input_ids_from_labels", None)) is not None:
        shifted: Tensor = own(labels=labels_RT)
        return shifted
    # Models without the method (Blenderbot, M2M100) shift so in their forward pass.
    config = model.config
    first_R1 = torch.full_like(labels_RT[:, :1], config.decoder_start_token_id)
    moved_RT = torch.cat([first_R1, labels_RT[:, :-1]], dim=1)
    return moved_RT.masked_fill(moved_RT == -100, config.pad_token_id)


def check_start(field: str, value: str, model: Any) -> None:
    """UserError for the field where the model's configuration does not say with which token its answers begin.  model:
    on any device."""
    try:
        found_14 = decoder_inputs(model, torch.arange(3, 7)[None])
    except Exception:  # each model asks for the token in its own way, and fails so
        found_14 = torch.full((1, 4), -1)
    if int(found_14.min()) < 0:
        allowed = "an encoder-decoder whose configuration has decoder_start_token_id, with which answers begin"
        raise UserError(field, value, allowed, "set it in the model's config.json")


def start_token(model: Any, answer: Sequence[int]) -> int:
    """The token with which a generated answer begins: what the decoder begins with as it learns.  mBART's is the last
    one of an answer, its language, whatever the configuration says.  model: on any device; answer: any one, as the
    tokenizer makes it."""
    return int(decoder_inputs(model, torch.tensor([list(answer)]))[0, 0])
