#!/usr/bin/env bash
# evaluate 0.4.6: a metric file with `import a, b` on one line is refused for a
# package called "a,", though both are installed.
#
# Behaviour: before a metric is loaded from a file, its text is searched line by
# line for imports, and the word after `import` is taken for the package. With
# two on a line that word ends in a comma, no such package is found, and the
# error asks to install it. `import a` and `import b` on two lines load.
#
# Why one would not guess it: the file is valid Python that runs by itself, and
# the packages named in the error are there. The message ends in the advice to
# run `pip install`, with the comma in the name.
#
# Seen with Python 3.11: ImportError that asks for "datasets,"; 1.0 from the same
# metric with its imports on two lines.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HOME="$work/cache" HF_HUB_OFFLINE=1
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet evaluate==0.4.6
cd "$work"
mkdir one two
cat > body <<'END'


class Same(evaluate.Metric):
    def _info(self):
        kind = datasets.Value("string")
        return evaluate.MetricInfo(
            description="share of equal texts",
            citation="",
            inputs_description="",
            features=datasets.Features({"predictions": kind, "references": kind}),
        )

    def _compute(self, predictions, references):
        return {"same": sum(map(str.__eq__, predictions, references)) / len(predictions)}
END
{ echo "import datasets, evaluate"; cat body; } > one/same.py
{ echo "import datasets"; echo "import evaluate"; cat body; } > two/same.py
"$work/venv/bin/python" -W ignore - <<'END'
import sys

import evaluate

held = []


def check(what, yes):
    held.append(bool(yes))
    print("as described:" if yes else "CHANGED:", what)


try:
    evaluate.load("one/same.py", keep_in_memory=True)
    message = ""
except ImportError as error:
    message = str(error)
print("one line:", message or "loaded")
check("the error asks for a package whose name ends in a comma", "'datasets,'" in message)
value = evaluate.load("two/same.py", keep_in_memory=True).compute(predictions=["a"], references=["a"])
print("two lines:", value)
check("the same metric loads with its imports on two lines", value == {"same": 1.0})

sys.exit(0 if held and all(held) else 1)
END
