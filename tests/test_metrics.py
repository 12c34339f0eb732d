"""ROUGE-L against rouge_score itself and against a longest common subsequence worked out here."""

import re
from functools import cache
from pathlib import Path

import pytest
from rouge_score.rouge_scorer import RougeScorer

from rayfed_sub.metrics import rouge_l, rouge_l_metric

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


def test_rouge_l_agrees_with_rouge_score_and_the_subsequence() -> None:
    scorer = RougeScorer(["rougeL"])
    pairs = list(zip(PREDICTIONS, REFERENCES, strict=True))
    theirs = [scorer.score(reference, prediction)["rougeL"].fmeasure for prediction, reference in pairs]
    ours = [f_measure(prediction, reference) for prediction, reference in pairs]
    assert ours == pytest.approx(theirs)
    assert rouge_l(PREDICTIONS, REFERENCES) == pytest.approx(sum(theirs) / 4)


def test_rouge_l_of_equal_texts_is_one() -> None:
    assert rouge_l(["a b c", "d"], ["a b c", "d"]) == 1.0


def test_the_metric_is_evaluate_s_and_takes_batches(tmp_path: Path) -> None:
    import evaluate

    metric = rouge_l_metric(str(tmp_path))
    assert isinstance(metric, evaluate.Metric)
    for prediction, reference in zip(PREDICTIONS, REFERENCES, strict=True):
        metric.add_batch(predictions=[prediction], references=[reference])
    assert metric.compute()["rouge_l"] == pytest.approx(rouge_l(PREDICTIONS, REFERENCES))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_nothing_is_left_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import evaluate

    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    rouge_l(["a"], ["a"])
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize(("predictions", "references"), [([], []), (["a"], ["a", "b"])])
def test_rouge_l_of_lists_that_do_not_match(predictions: list[str], references: list[str]) -> None:
    with pytest.raises(ValueError, match="predictions for"):
        rouge_l(predictions, references)
