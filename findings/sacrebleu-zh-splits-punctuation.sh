#!/usr/bin/env bash
# sacrebleu 2.6.0: tokenize="zh" takes dashes, quotes and arrows for Chinese,
# and does not take the Chinese characters outside the BMP for Chinese.
#
# Behaviour: of the tokenizer's table of "Chinese" ranges two entries are meant
# as planes beyond U+FFFF, but are written with a four-digit escape followed by
# one more digit, so they are two-character strings. Compared with one
# character, the range meant as U+20000..U+2A6D6 becomes U+2001..U+2A6D
# (general punctuation, currency signs, arrows, mathematical operators,
# box drawing, geometric shapes), and real Extension B characters fall outside.
#
# Why one would not guess it: the ranges carry the right names in comments and
# the usual Chinese text is split rightly; the damage is only to mixed text. A
# curly apostrophe or an em dash inside a Latin word is set apart as its own
# token, which adds matching n-grams, and a sentence of rare Han characters is
# one single token that gets no credit for what it has right.
#
# Seen with Python 3.11:
#   em dash: 'well-known' with U+2014 -> 'well <U+2014> known'
#   BLEU of one English pair: 13a 84.09, zh 91.93
#   BLEU of one wrong character in six: BMP Han 75.98, Extension B Han 0.00
set -euo pipefail
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet sacrebleu==2.6.0
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import sys

held = []


def check(what, yes):
    held.append(bool(yes))
    print("as described:" if yes else "CHANGED:", what)


from sacrebleu.metrics import BLEU
from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

split = TokenizerZh()
for char in "\u2014", "\u2019", "\u2192", "\u2264", "\u20ac":
    print(ascii(f"well{char}known"), "->", ascii(split(f"well{char}known")))
    check(f"U+{ord(char):04X} inside a Latin word is split off as if Chinese",
          split(f"well{char}known") == f"well {char} known")
for char in "\xb1", "\xe9", "\u1e9e", "\u2b06":
    check(f"U+{ord(char):04X}, outside U+2001..U+2A6D, is not",
          split(f"well{char}known") == f"well{char}known")

common, rare = "\u6c49\u5b57\u6c49\u5b57\u6c49", "".join(chr(0x20000 + i) for i in range(5))
check("Han characters of the BMP are split", split(common) == " ".join(common))
check("Han characters of Extension B are not", split(rare) == rare)


def bleu(tokenize, ours, theirs):
    return round(BLEU(tokenize=tokenize).corpus_score([ours], [[theirs]]).score, 2)


text = "The plan\u2014a well-known one\u2014didn\u2019t work at all "
scores = {t: bleu(t, text + "today", text + "yesterday") for t in ("13a", "zh")}
print("BLEU of one English pair:", scores)
check("English with em dashes scores 84.09 by 13a and 91.93 by zh",
      scores == {"13a": 84.09, "zh": 91.93})
han = bleu("zh", common + "\u5b57", common + "\u8bed"), bleu("zh", rare + chr(0x20005), rare + chr(0x20006))
print("BLEU, one wrong character in six: BMP", han[0], "Extension B", han[1])
check("one wrong character in six: 75.98 in the BMP, 0.0 in Extension B", han == (75.98, 0.0))

sys.exit(0 if held and all(held) else 1)
EOF
