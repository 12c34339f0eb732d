"""Metrics that a configuration names: loaded, tried before a run starts, and computed beside the built-in ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayfed_sub.core.errors import UserError
from rayfed_sub.evaluation.named_metrics import MetricError, load_metrics, named_scores
from rayfed_sub.evaluation.scores import label_scores, number_and_set_scores, text_scores
from rayfed_sub.training.inference import Generation, Prediction

METRIC = """
import datasets
import evaluate


class Mine(evaluate.Metric):
    def _info(self):
        kind = datasets.Value("{kind}")
        features = datasets.Features({{"predictions": kind, "references": kind}})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references{more}):
        {body}
"""
FIRST_WORD = """hits = sum(p.split()[:1] == r.split()[:1] for p, r in zip(predictions, references))
        return {"share": hits / len(predictions), "pairs": [len(predictions)]}"""


def written(folder: Path, name: str, body: str, kind: str = "string", more: str = "") -> str:
    path = folder / f"{name}.py"
    path.write_text(METRIC.format(kind=kind, body=body, more=more))
    return str(path)


def test_text_metric_scores_greedy_answers_of_all_and_of_each_client(tmp_path: Path) -> None:
    metrics = load_metrics([written(tmp_path, "first_word", FIRST_WORD)], ["a b", "c"])
    rows = [
        (0, Generation("", "the cat", reference="the dog", teacher_forced="x", labels="y")),
        (2, Generation("", "a cat", reference="the cat", teacher_forced="the", labels="the")),
    ]
    found = [score for score in text_scores(rows, metrics) if "/" in score.metric]
    assert [(s.client, s.metric, s.value, s.count) for s in found] == [
        (None, "first_word/share", 0.5, 2),
        (0, "first_word/share", 1.0, 1),
        (2, "first_word/share", 0.0, 1),
    ]


def test_class_metric_reads_class_numbers(tmp_path: Path) -> None:
    body = 'return {"off": sum(abs(p - r) for p, r in zip(predictions, references))}'
    metrics = load_metrics([written(tmp_path, "distance", body, "int64")], [0, 1, 2])
    rows = [(0, Prediction(0.5, (2,), (0,))), (0, Prediction(1.5, (1,), (0,)))]
    found = {s.metric: s.value for s in label_scores(rows, ["a", "b", "c"], metrics) if s.client is None}
    assert found["distance/off"] == 3
    assert found["accuracy"] == 0


@pytest.mark.parametrize(
    ("body", "more", "why"),
    [
        ('return {"words": ["a"]}', "", "it gives no number"),
        ("return {}", "", "it gives no number"),
        ('return {"score": 1.0}', ", language", "missing 1 required positional argument: 'language'"),
        ("raise KeyError(3)", "", "KeyError: 3"),
    ],
)
def test_unusable_metric_is_refused_before_the_run_starts(body: str, more: str, why: str, tmp_path: Path) -> None:
    path = written(tmp_path, "mine", body, more=more)
    with pytest.raises(UserError) as caught:
        load_metrics([path], ["a b", "c"])
    assert (caught.value.field, caught.value.value) == ("evaluation.metrics", path)
    assert why in caught.value.advice


def test_missing_file_and_duplicate_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"evaluation\.metrics: got '.*nowhere\.py'; allowed: ids of `evaluate\.load`, or"
    ):
        load_metrics([str(tmp_path / "nowhere.py")], ["a"])
    (tmp_path / "other").mkdir()
    both = [written(folder, "mine", FIRST_WORD) for folder in (tmp_path, tmp_path / "other")]
    with pytest.raises(UserError, match="whose names differ in their last part"):
        load_metrics(both, ["a b"])


def test_metric_that_fails_later_is_named(tmp_path: Path) -> None:
    """It divides by the number of words of the references."""
    body = 'return {"per_word": 1 / sum(len(r.split()) for r in references)}'
    metrics = load_metrics([written(tmp_path, "per_word", body)], ["a b", "c"])
    assert named_scores(metrics, ["a"], ["b c"]) == {"per_word/per_word": 0.5}
    assert named_scores(metrics, [], []) == {}
    with pytest.raises(MetricError, match=r"^metric per_word: ZeroDivisionError: division by zero$"):
        named_scores(metrics, ["a"], [" "])


def test_score_that_is_not_defined_for_a_client_is_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Numbers whose differences are none with one row, and a mean of nothing that is NaN."""
    body = """if len(predictions) < 2:
            raise ValueError(f"it takes two rows, not {predictions}")
        return {"range": max(predictions) - min(predictions), "none": float("nan")}"""
    metrics = load_metrics([written(tmp_path, "span", body, "float32")], [0.5, 1.0])
    rows = [(client, Prediction(0.0, (said,), (0.0,))) for client, said in ((0, 1.0), (1, 3.0), (1, 2.5), (2, 4.0))]
    found = [score for score in number_and_set_scores(rows, (), metrics) if "/" in score.metric]
    assert [(s.client, s.metric, s.value) for s in found] == [(None, "span/range", 3.0), (1, "span/range", 0.5)]
    said = "evaluation.metrics: span gives no score for some clients' rows: ValueError: it takes two rows, not [1.0]"
    assert caplog.messages == [said]
