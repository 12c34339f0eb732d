#!/usr/bin/env bash
# rouge-score 0.1.2: text that is not in ASCII letters and digits is dropped
# before scoring, without a word.
#
# Behaviour: the default tokenizer lower-cases and then replaces everything but
# a-z and 0-9 by a space. Of a Hindi (or Russian, Greek, Chinese, Arabic)
# sentence only ASCII digits and borrowed Latin words remain. Two unrelated
# sentences that share the number 5 score ROUGE-L 1.0; a sentence compared with
# itself scores 0.0 if it holds no such character. In French the accented
# letter is a word break, so 'cafe' with its accent is the word 'caf'.
#
# Why one would not guess it: a score is returned, not an error or a warning;
# an average over a real multilingual set looks plausible, as it then rates how
# well digits and names in Latin letters are copied. Identity scoring 0 is the
# last thing to expect of a similarity.
#
# Seen with Python 3.11: unrelated Hindi sentences with a 5: 1.0; a Hindi
# sentence against itself: 0.0; Russian, Greek, Chinese against itself: 0.0;
# French 'caf<e acute> cr<e grave>me' against 'caf cr me': 1.0.
set -euo pipefail
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet rouge-score==0.1.2
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import sys

held = []


def check(what, yes):
    held.append(bool(yes))
    print("as described:" if yes else "CHANGED:", what)


from rouge_score import rouge_scorer

scorer = rouge_scorer.RougeScorer(["rouge1", "rougeL"])


def rouge(a, b):
    return {name: value.fmeasure for name, value in scorer.score(a, b).items()}


ram = "राम ने 5 आम खाए"  # Ram ate 5 mangoes
trains = "दिल्ली से 5 रेलगाड़ियाँ चलीं"  # 5 trains left from Delhi
print("unrelated, both with a 5:", rouge(ram, trains))
check("two unrelated Hindi sentences with one ASCII digit in common score 1.0",
      rouge(ram, trains) == {"rouge1": 1.0, "rougeL": 1.0})
for language, text in {"Hindi": "राम ने आम खाए", "Russian": "кошка спит на диване",
                       "Greek": "η γάτα κοιμάται", "Chinese": "猫在沙发上睡觉"}.items():
    print(language, "against itself:", rouge(text, text))
    check(f"a {language} sentence against itself scores 0.0",
          rouge(text, text) == {"rouge1": 0.0, "rougeL": 0.0})
print("French:", rouge("café crème", "caf cr me"))
check("an accented letter is a word break", rouge("café crème", "caf cr me")["rougeL"] == 1.0)
check("English against itself scores 1.0", rouge("a cat sleeps", "a cat sleeps")["rougeL"] == 1.0)

sys.exit(0 if held and all(held) else 1)
EOF
