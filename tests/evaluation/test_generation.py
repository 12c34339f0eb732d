"""The scores against the libraries that define them, and against arithmetic shown here."""
# ruff: noqa: RUF001  (texts of many scripts, whose letters look like those of Latin)

from __future__ import annotations

import logging
import math
import random
import re
import string
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import accuracy_score, classification_report, confusion_matrix, f1_score

from rayfed_sub.evaluation.classification import class_scores, confusion
from rayfed_sub.evaluation.evaluate_metrics import METRICS, metric
from rayfed_sub.evaluation.generation import TEXT_SCORES, bleu_4, bleu_4_unicode, rouge_l, rouge_l_unicode, words
from rayfed_sub.evaluation.language import perplexity, token_accuracy

PREDICTIONS = ["The cat sat on the mat.", "Return the sum of a and b", "", "nothing alike"]
REFERENCES = ["the cat lay on a mat", "Return a and b, the sum of them.", "an answer", "something else"]


def f_measure(prediction: str, reference: str) -> float:
    """2 L / (p + q), L the words in common in order, p and q the words of each."""
    p, q = (re.findall(r"[a-z0-9]+", text.lower()) for text in (prediction, reference))

    @cache
    def common(i: int, j: int) -> int:
        if i == len(p) or j == len(q):
            return 0
        return 1 + common(i + 1, j + 1) if p[i] == q[j] else max(common(i + 1, j), common(i, j + 1))

    return 2 * common(0, 0) / (len(p) + len(q)) if p and q else 0.0


def test_rouge_l_by_hand() -> None:
    # "the cat on mat": 4 words in common, 6 and 6 words; then "Return the sum of", 4 of 7 and 8.
    assert rouge_l(PREDICTIONS[:1], REFERENCES[:1]) == pytest.approx(2 * 4 / 12)
    assert rouge_l(PREDICTIONS[1:2], REFERENCES[1:2]) == pytest.approx(2 * 4 / 15)
    assert rouge_l(PREDICTIONS, REFERENCES) == pytest.approx((8 / 12 + 8 / 15 + 0 + 0) / 4)


def test_rouge_l_leaves_the_root_logger_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler there would print every line of a caller's later runs in another form."""
    monkeypatch.setattr(logging.root, "handlers", [])
    assert rouge_l(["the cat"], ["the cat"]) == 1.0
    assert logging.root.handlers == []


def test_rouge_l_agrees_with_rouge_score_and_the_subsequence() -> None:
    scorer = RougeScorer(["rougeL"])
    pairs = list(zip(PREDICTIONS, REFERENCES, strict=True))
    theirs = [scorer.score(reference, prediction)["rougeL"].fmeasure for prediction, reference in pairs]
    ours = [f_measure(prediction, reference) for prediction, reference in pairs]
    assert ours == pytest.approx(theirs)
    assert rouge_l(PREDICTIONS, REFERENCES) == pytest.approx(sum(theirs) / 4)


def test_bleu_4_by_hand() -> None:
    """Two pairs, counted together.

    Predicted "the cat sat on the mat" (6 words), reference "the cat sat on a red mat" (7); predicted "a b c d e",
    reference the same.
    1-grams: the, cat, sat, on, mat of 6 (the second "the" is not in the reference twice), and 5 of 5: 10 of 11.
    2-grams: the cat, cat sat, sat on of 5, and 4 of 4: 7 of 9.
    3-grams: 2 of 4, and 3 of 3: 5 of 7.
    4-grams: "the cat sat on" of 3, and 2 of 2: 3 of 5.
    11 predicted words for 12: times exp(1 - 12/11)."""
    predicted, references = ["the cat sat on the mat", "a b c d e"], ["the cat sat on a red mat", "a b c d e"]
    by_hand = math.exp(1 - 12 / 11) * (10 / 11 * 7 / 9 * 5 / 7 * 3 / 5) ** (1 / 4)
    assert bleu_4(predicted, references) == pytest.approx(by_hand)
    # A longer prediction costs only its extra words: 7 words for 6, with the precisions exchanged.
    by_hand = (10 / 12 * 7 / 10 * 5 / 8 * 3 / 6) ** (1 / 4)
    assert bleu_4(references, predicted) == pytest.approx(by_hand)


def test_bleu_4_of_few_matches_is_smoothed() -> None:
    # "a b c x": 1-grams 3 of 4, 2-grams 2 of 3, 3-grams 1 of 2, 4-grams none: half of one.
    assert bleu_4(["a b c x"], ["a b c d"]) == pytest.approx((3 / 4 * 2 / 3 * 1 / 2 * (1 / 2) / 1) ** (1 / 4))
    # "a x y z": 1 of 4; then 1/2 of 3, 1/4 of 2 and 1/8 of 1.
    assert bleu_4(["a x y z"], ["a b c d"]) == pytest.approx((1 / 4 * 1 / 6 * 1 / 8 * 1 / 8) ** (1 / 4))


def test_bleu_4_agrees_with_sacrebleu() -> None:
    theirs = sacrebleu.corpus_bleu(PREDICTIONS, [REFERENCES]).score
    assert 0 < theirs < 100
    assert bleu_4(PREDICTIONS, REFERENCES) == theirs / 100
    # The score is of the corpus: the mean over the pairs is another number.
    each = [bleu_4([prediction], [reference]) for prediction, reference in zip(PREDICTIONS, REFERENCES, strict=True)]
    assert abs(sum(each) / len(each) - theirs / 100) > 0.01
    assert bleu_4(["A b c d"], ["a b c d"]) < 1  # capitals count


@pytest.mark.parametrize(
    ("predicted", "references", "rouge", "bleu"),
    [
        (["a b c d", "e"], ["a b c d", "e"], 1.0, 1.0),  # equal
        (["a b c"], ["a b c"], 1.0, 0.0),  # equal, but the whole corpus has no 4-gram
        ([""], ["a b c d"], 0.0, 0.0),  # an empty answer
        (["a b c d"], [""], None, None),  # nothing to match
        ([""], [""], None, None),
        (["", "a b c d"], ["", "a b c d"], 0.5, 1.0),  # counts in the mean, adds no words to the corpus
        (["e f g h"], ["a b c d"], 0.0, 0.0),  # no smoothing without any matching word
        (["été à la"], ["été à la"], 1.0, 0.0),  # ROUGE reads "t" and "la", half of the letters
        (["äöü"], ["äöü"], None, 0.0),  # and nothing here
        (["été à la mode"], ["été à la mode"], 1.0, 1.0),  # 7 letters of 10 are ASCII
    ],
)
def test_edge_cases_of_texts(
    predicted: list[str], references: list[str], rouge: float | None, bleu: float | None
) -> None:
    assert (rouge_l(predicted, references), bleu_4(predicted, references)) == (rouge, bleu)


SCRIPTS = {
    "Hindi": "औज़ार शेल्फ 3 पर रखा है।",
    "Bengali": "বিড়াল বিছানায় ঘুমাচ্ছে এখন",
    "Tamil": "வணக்கம் உலகம் இது ஒரு பூனை",
    "Chinese": "我喜欢喝绿茶，不喜欢咖啡。",
    "Chinese, plane 2": "𠀀𠀁𠀂𠀃𠀄",
    "Japanese": "猫は机の上で寝ています。コーヒー",
    "Korean": "고양이가 침대에서 잠을 아주 잘 잔다",
    "Thai": "แมวนอนบนเตียงน้ำ",
    "Burmese": "ကြောင်သည်အိပ်နေသည်",
    "Tibetan": "བོད་སྐད་ཡིན་ནོ།",
    "Arabic": "القط نائم على السرير الكبير",
    "Hebrew": "החתול הלבן ישן על המיטה",
    "Persian": "می‌خواهم امروز بروم به خانه",
    "Russian": "Кошка спит на большой кровати.",
    "Greek": "Η γάτα κοιμάται στο κρεβάτι",
    "Amharic": "ሰላም ለዓለም ሁሉ ነው።",
    "emoji": "🎉👨‍👩‍👧🇩🇪👍🏽",
    "signs": "→ ≤ ∑ §",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_equal_texts_score_1_in_every_script_and_different_texts_less(script: str) -> None:
    text, others = SCRIPTS[script], [text for name, text in SCRIPTS.items() if name != script]
    assert rouge_l([text], [text]) is None  # rouge-score reads less than half the words of each
    assert (rouge_l_unicode([text], [text]), bleu_4_unicode([text], [text])) == (1.0, 1.0)
    half = text[: len(text) // 2]
    assert 0 < (rouge_l_unicode([half], [text]) or 0) < 1
    assert (bleu_4_unicode([half], [text]) or 0) < 1
    assert max(rouge_l_unicode([other], [text]) or 0 for other in others) < 0.5


def test_words_of_any_script() -> None:
    # Vowel signs (Mc, Mn) belong to their word: six words of Hindi, not the runs of \w, which end at each.
    assert words("औज़ार शेल्फ 3 पर रखा है।") == ["औज़ार", "शेल्फ", "3", "पर", "रखा", "है"]
    # SARA AM is NIKHAHIT and SARA AA to NFKC: a mark of its consonant, and a vowel that stands by itself.
    assert words("น้ำ") == ["น\u0e49\u0e4d", "า"]
    assert words("iPhone手机, 2台") == ["iphone", "手", "机", "2", "台"]
    assert words("Caf\u00e9") == words("CAFE\u0301") == ["caf\u00e9"]  # one code point or two, the same text
    assert words("می\u200cخواهم\u200f") == words("میخواهم")  # invisible characters
    assert words("👍🏽👍") == ["👍🏽", "👍"]  # another skin tone, another pictograph
    assert words("don't x_1 3.14 -- ok") == ["don", "t", "x", "1", "3", "14", "ok"]  # as rouge-score
    assert words(" \n\u200b") == []


def test_scores_of_any_script_equal_the_published_ones_on_ascii() -> None:
    rng = random.Random(0)
    texts = ["".join(rng.choices(string.printable, k=40)) + "a" for _ in range(40)]
    texts += ["the cat sat on the mat", "it's 3.5 km, e.g. x_y", "a b c d"] * 2
    predicted, references = texts[::2], texts[1::2]
    for prediction, reference in [*zip(predicted, references, strict=True), *zip(references, references, strict=True)]:
        assert (
            rouge_l_unicode([prediction], [reference])
            == RougeScorer(["rougeL"]).score(reference, prediction)["rougeL"].fmeasure
        )
        assert bleu_4_unicode([prediction], [reference]) == pytest.approx(
            sacrebleu.corpus_bleu([prediction], [[reference]]).score / 100
        )
    assert rouge_l(PREDICTIONS, REFERENCES) == rouge_l_unicode(PREDICTIONS, REFERENCES)
    assert bleu_4(PREDICTIONS, REFERENCES) == bleu_4_unicode(PREDICTIONS, REFERENCES)


def test_published_scores_need_half_of_the_text() -> None:
    """rouge-score reads ASCII letters; 13a reads what is between spaces."""
    assert rouge_l(["кот cat"], ["cat кот"]) == 1.0  # half; it reads "cat" alone
    assert rouge_l(["кот cat"], ["коты cat"]) is None  # 3 letters of 7
    assert rouge_l(["ＡＢＣ"], ["ＡＢＣ"]) is None  # full-width letters are not among them
    assert rouge_l_unicode(["ＡＢＣ"], ["abc"]) == 1.0
    assert bleu_4(["Кошка спит на кровати"], ["Кошка спит на кровати"]) == 1.0
    assert bleu_4(["我喜欢猫"], ["我喜欢猫"]) is None  # one word instead of four characters
    assert bleu_4(["see 我喜欢猫"], ["see 我喜欢猫"]) is None  # two of five
    assert bleu_4(["please do see 我喜欢猫"], ["please do see 我喜欢猫"]) == 1.0  # four of seven


@pytest.mark.parametrize("score", [rouge_l, rouge_l_unicode, bleu_4, bleu_4_unicode])
@pytest.mark.parametrize(("predictions", "references"), [([], []), (["a"], ["a", "b"]), ([], ["a"]), (["a"], [])])
def test_texts_of_different_lengths_are_refused(score: Any, predictions: list[str], references: list[str]) -> None:
    with pytest.raises(ValueError, match=f"{len(predictions)} predictions for {len(references)} references"):
        score(predictions, references)


def test_perplexity() -> None:
    assert perplexity(math.log(50)) == pytest.approx(50)  # as uncertain as among 50 equally likely tokens
    assert perplexity(709.0) < math.inf
    assert perplexity(710.0) == perplexity(math.inf) == math.inf  # e^709.8 is the largest float
    assert math.isnan(perplexity(math.nan))


def test_token_accuracy() -> None:
    assert token_accuracy(3, 4) == 0.75
    assert token_accuracy(0, 4) == 0.0
    assert token_accuracy(0, 0) is None


# Class 0: 2 of 3 found.  1: both found, and the third row of 0 was predicted as 1.  2: its one row was predicted as 3.
LABELS, PREDICTED, NAMES = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 3], ["glioma", "none", "pituitary", "other", "never"]


def test_class_scores_by_hand() -> None:
    """F1 = 2 tp / (2 tp + fp + fn)."""
    scores = class_scores(LABELS, PREDICTED, NAMES)
    first, second = 4 / (4 + 0 + 1), 4 / (4 + 1 + 0)
    assert scores == pytest.approx(
        {
            "accuracy": 4 / 6,
            "macro_f1": (first + second + 0 + 0) / 4,  # over 0, 1, 2 and 3; "never" has no rows and no predictions
            "matthews": (4 * 6 - (3 * 2 + 2 * 3)) / 22,  # 36 - (9 + 4 + 1) = 36 - (4 + 9 + 1) = 22
            "f1/glioma": first,
            "f1/none": second,
            "f1/pituitary": 0.0,
            "f1/other": 0.0,
        }
    )
    each = [f"f1/{name}" for name in NAMES[:4]]  # "never" has 0 / 0
    assert list(scores) == ["accuracy", "macro_f1", "matthews", *each]
    assert all(type(score) is float for score in scores.values())  # summary.json can store them


def test_class_scores_agree_with_scikit_learn() -> None:
    scores = class_scores(LABELS, PREDICTED, NAMES)
    assert scores["accuracy"] == accuracy_score(LABELS, PREDICTED)
    assert scores["macro_f1"] == f1_score(LABELS, PREDICTED, average="macro", zero_division=0)
    report = classification_report(
        LABELS, PREDICTED, labels=range(5), target_names=NAMES, output_dict=True, zero_division=0
    )
    assert {name: scores[f"f1/{name}"] for name in NAMES[:4]} == {name: report[name]["f1-score"] for name in NAMES[:4]}


def test_client_score_covers_its_own_classes() -> None:
    """Two of four classes, all right: 1, not 1/2.  A third class, wrongly predicted once, counts."""
    names = list("abcd")
    assert class_scores([1, 3, 3], [1, 3, 3], names)["macro_f1"] == 1.0
    assert class_scores([1, 3, 3], [1, 3, 0], names)["macro_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_confusion() -> None:
    counts = confusion(LABELS, PREDICTED, 5)
    assert counts == [[2, 1, 0, 0, 0], [0, 2, 0, 0, 0], [0, 0, 0, 1, 0], [0] * 5, [0] * 5]
    assert counts == confusion_matrix(LABELS, PREDICTED, labels=range(5)).tolist()
    assert type(counts[0][0]) is int


@pytest.mark.parametrize(
    ("labels", "predicted", "message"),
    [
        ([], [], "0 predictions for 0 labels"),
        ([0], [0, 1], "2 predictions for 1 labels"),
        ([0, 2], [0, 1], r"classes \[2\] of 2"),
        ([0, 1], [0, -1], r"classes \[-1\] of 2"),
    ],
)
def test_class_lists_of_different_lengths_are_refused(labels: list[int], predicted: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        class_scores(labels, predicted, ["no", "yes"])
    with pytest.raises(ValueError, match=message):
        confusion(labels, predicted, 2)


# name -> batches of columns, further arguments of compute, the expected result.
USES: dict[str, tuple[dict[str, list[Any]], dict[str, Any], dict[str, Any]]] = {
    **{
        name: ({"predictions": PREDICTIONS, "references": REFERENCES}, {}, {name: measured(PREDICTIONS, REFERENCES)})
        for name, measured in TEXT_SCORES.items()
    },
    "token_accuracy": (  # -100 is no label: 2 of 3
        {"predictions": [5, 6, 7, 8], "references": [-100, 6, 7, 9]},
        {},
        {"token_accuracy": 2 / 3},
    ),
    "perplexity": (  # the mean of 1, 2 and 3
        {"predictions": [1.0, 2.0, 3.0]},
        {},
        {"perplexity": math.exp(2)},
    ),
    "macro_f1": (
        {"predictions": PREDICTED, "references": LABELS},
        {"names": NAMES},
        {**class_scores(LABELS, PREDICTED, NAMES), "confusion": confusion(LABELS, PREDICTED, 5)},
    ),
}


@pytest.mark.parametrize("name", METRICS)
def test_evaluate_metrics_accept_batches_and_leave_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import evaluate

    elsewhere, own = tmp_path / "elsewhere", tmp_path / "own"
    elsewhere.mkdir()
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(elsewhere))
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    columns, more, expected = USES[name]
    built = metric(name, str(own))
    assert isinstance(built, evaluate.Metric)
    assert built.name == name
    for _ in range(2):  # computed results are cleared
        for i in range(0, len(columns["predictions"]), 2):
            built.add_batch(**{column: values[i : i + 2] for column, values in columns.items()})
        assert built.compute(**more) == expected
    assert built.compute(**columns, **more) == expected
    assert [path for path in own.rglob("*") if path.is_file()] == []
    assert list(elsewhere.rglob("*")) == []


def test_functions_touch_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    rouge_l(["a"], ["a"])
    bleu_4(["a"], ["a"])
    class_scores([0], [0], ["a"])
    assert list(tmp_path.rglob("*")) == []


def test_unknown_metric(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="metric 'rouge'; there are rouge_l, rouge_l_unicode, bleu_4, "):
        metric("rouge", str(tmp_path))
