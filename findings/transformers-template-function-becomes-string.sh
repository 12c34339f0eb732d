#!/usr/bin/env bash
# transformers 5.23.0: a function handed to apply_chat_template becomes a string.
#
# Behaviour: all keyword arguments for the template are rebuilt out of plain
# JSON types first, and anything else is replaced by the text "<type name>". A
# template's own strftime_now is thus replaceable by name, but never by a
# function: the name then holds the string "<function>", and the call fails
# with TypeError "'str' object is not callable". Where the template only prints
# the value, nothing fails: the text "<date>" stands in the prompt (and so in a
# training row) where jinja alone would print 2025-01-01.
#
# Why one would not guess it: strftime_now=lambda ... is the obvious way to
# freeze the date of a template that calls it, keyword arguments are known to go
# to the template, and jinja lets a render variable hide a global.
# The traceback ends in the template, with no hint that the argument was
# rewritten. What works is a macro of that name put before the template.
#
# Seen with Python 3.11:
#   function: TypeError 'str' object is not callable
#   value:    '<date>' for datetime.date(2025, 1, 1)
#   macro:    '01 Jan 2025'
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


import datetime

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")), unk_token="<unk>")
messages = [{"role": "user", "content": "hello"}]


def render(template, **values):
    return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **values)


call = "{{ strftime_now('%d %b %Y') }}"
try:
    seen = render(call, strftime_now=lambda form: "01 Jan 2025")
except TypeError as error:
    seen = f"TypeError {error}"
print("function:", seen)
check("a function as strftime_now is not callable in the template",
      seen == "TypeError 'str' object is not callable")
check("the name holds the type's name",
      render("{{ strftime_now }}", strftime_now=lambda form: "") == "<function>")
value = render("{{ today }}", today=datetime.date(2025, 1, 1))
print("value:", value)
check("a date is printed as <date>", value == "<date>")
check("a string is printed as it is", render("{{ today }}", today="2025-01-01") == "2025-01-01")
macro = render("{% macro strftime_now(form) %}01 Jan 2025{% endmacro %}" + call)
print("macro:", macro)
check("a macro of that name before the template works", macro == "01 Jan 2025")

sys.exit(0 if held and all(held) else 1)
EOF
