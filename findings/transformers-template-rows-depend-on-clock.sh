#!/usr/bin/env bash
# transformers 5.23.0: apply_chat_template makes rows that depend on the day
# and on the machine's time zone.
#
# Behaviour: every template may call strftime_now, which is the wall clock in
# local time. Templates that print a "today" line by default (several published
# chat models have one) so put the date of tokenisation into every training and
# evaluation row. The same messages, tokenised twice at the same instant by two
# workers in different time zones, give different token ids.
#
# Why one would not guess it: tokenising is taken to be a pure function of text
# and tokenizer. Seeds do not cover it, a cache keyed by the data and tokenizer
# files serves yesterday's rows, and hashes of rows that should agree between
# machines disagree, though only around midnight or between zones.
#
# Seen with Python 3.11: in two zones 25 hours apart, at one instant, the rows
# name two different days, and the token ids differ.
set -euo pipefail
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.23.0
"$work/venv/bin/pip" install --quiet jinja2==3.1.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import sys

held = []


def check(what, yes):
    held.append(bool(yes))
    print("as described:" if yes else "CHANGED:", what)


import os
import time

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

words = ["<unk>", "hello", *(f"{day:02d}" for day in range(1, 32))]
inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
inner.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
tokenizer.chat_template = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d') %}{% endif %}"
    "{{ date_string }} {{ messages[0]['content'] }}")
messages = [{"role": "user", "content": "hello"}]


def row(zone, **values):
    os.environ["TZ"] = zone
    time.tzset()
    return list(tokenizer.apply_chat_template(messages, return_dict=False, **values))


# POSIX zones, 25 hours apart, so the day of the month always differs.
west, east = row("WEST+11"), row("EAST-14")
print("token ids:", west, "and", east)
check("one conversation, one instant, two zones: different token ids", west != east)
check("and they differ in the day alone", west[1:] == east[1:] == [1] and west[0] > 1 < east[0])
check("with the template's own key set they agree",
      row("WEST+11", date_string="05") == row("EAST-14", date_string="05") == [6, 1])

sys.exit(0 if held and all(held) else 1)
EOF
