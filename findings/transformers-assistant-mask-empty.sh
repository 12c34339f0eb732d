#!/usr/bin/env bash
# transformers 5.23.0: return_assistant_tokens_mask marks no token at all where a
# generation block begins with a space and the tokenizer trims its offsets.
#
# Behaviour: the mask is found by asking for the token of a block's first and last
# character. A byte-level tokenizer with trim_offsets=True, as RoBERTa's kind has,
# leaves the space before a word out of its offsets, so no token has the block's
# first character, and the block is passed over. The mask is all zeros.
#
# Why one would not guess it: the ids are right, the same block without the space
# is marked in full, and the one message is for templates without a generation
# block, which this one has. A loss over this mask is that of no token.
#
# Seen with Python 3.11, tokenizers 0.22: zeros with trim_offsets=True, ones for
# the whole answer with False.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.23.0 jinja2==3.1.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'END'
import sys

from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

held = []


def check(what, yes):
    held.append(bool(yes))
    print("as described:" if yes else "CHANGED:", what)


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:"
    "{% generation %}{{ SPACE + m['content'] }}{% endgeneration %}{% endfor %}"
)


def mask(trims, space):
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.post_processor = processors.ByteLevel(trim_offsets=trims)
    inner.train_from_iterator(["Why? So it is."], trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    found = PreTrainedTokenizerFast(tokenizer_object=inner).apply_chat_template(
        [{"role": "assistant", "content": "So it is."}],
        chat_template=TEMPLATE.replace("SPACE", repr(space)),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return found["assistant_masks"]


for trims, space in ((True, " "), (False, " "), (True, "")):
    print(f"trim_offsets={trims}, {'a space first' if space else 'no space'}:", mask(trims, space))
check("with trimmed offsets and a space first nothing is marked", sum(mask(True, " ")) == 0)
check("without trimming the answer is marked", sum(mask(False, " ")) > 0)
check("without the space it is marked as well", sum(mask(True, "")) > 0)
sys.exit(not all(held))
END
