"""Scores of held-out rows by hand: over all rows, and over the rows of each client."""

import math

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from rayfed_sub.core.schemas import ClientRow, Score
from rayfed_sub.evaluation.scores import label_scores, number_and_set_scores, overall, text_scores, token_scores
from rayfed_sub.runtime.round_metrics import RoundMetrics
from rayfed_sub.training.inference import Generation, Prediction


def values(scores: list[Score], client: int | None) -> dict[str, float]:
    return {score.metric: score.value for score in scores if score.client == client}


def test_tokens_by_hand() -> None:
    rows = [
        (1, Prediction(6.0, (5, 6, 7), (5, 6, 8))),  # 2 of 3
        (0, Prediction(1.0, (5,), (6,))),  # 0 of 1
        (1, Prediction(0.0, (9,), (9,))),  # 1 of 1
    ]
    scores = list(token_scores(rows))
    assert values(scores, None) == pytest.approx(
        {"held_out_loss": 7 / 5, "perplexity": math.exp(7 / 5), "token_accuracy": 3 / 5}
    )
    assert values(scores, 0) == pytest.approx({"held_out_loss": 1, "perplexity": math.e, "token_accuracy": 0})
    assert values(scores, 1) == pytest.approx(
        {"held_out_loss": 6 / 4, "perplexity": math.exp(6 / 4), "token_accuracy": 3 / 4}
    )
    assert {score.client: score.count for score in scores} == {None: 5, 0: 1, 1: 4}  # labels


def test_numbers_by_hand() -> None:
    """Labels 1, 2, 3, 6 against 1, 4, 4, 7: means 3 and 4, so Pearson is 15 / sqrt(14 * 18); ranks 1, 2, 3, 4 against
    1, 2.5, 2.5, 4: Spearman is 4.5 / sqrt(5 * 4.5)."""
    said = [(1.0, 1.0), (4.0, 2.0), (4.0, 3.0), (7.0, 6.0)]
    rows = [(0, Prediction((p - t) ** 2, (p,), (t,))) for p, t in said]
    rows += [(1, Prediction(9.0, (4.0,), (1.0,))), (1, Prediction(1.0, (4.0,), (5.0,)))]
    scores = list(number_and_set_scores(rows, ()))
    assert values(scores, 0) == pytest.approx(
        {
            **{"held_out_loss": 6 / 4, "mean_absolute_error": 4 / 4},
            **{"pearson": 15 / math.sqrt(14 * 18), "spearman": 4.5 / math.sqrt(5 * 4.5)},
        }
    )
    assert values(scores, 1) == {"held_out_loss": 5, "mean_absolute_error": 2}  # one prediction for all: no correlation


def test_several_labels_by_hand() -> None:
    """a: 1 of 2 found and nothing wrong, F1 2/3; b: one right, one wrong, F1 2/3; c stands nowhere; together 2 right, 1
    wrong, 1 missed: 4 / 6."""
    rows = [
        (0, Prediction(0.5, (1, 1, 0), (1, 0, 0))),
        (0, Prediction(0.25, (0, 1, 0), (1, 1, 0))),
        (1, Prediction(0.75, (0, 0, 0), (0, 0, 0))),
    ]
    scores = list(number_and_set_scores(rows, ["a", "b", "c"]))
    two_thirds = pytest.approx(2 / 3)
    assert values(scores, None) == {
        **{"held_out_loss": 0.5, "subset_accuracy": pytest.approx(1 / 3), "micro_f1": two_thirds},
        **{"macro_f1": two_thirds, "f1/a": two_thirds, "f1/b": two_thirds},
    }
    assert values(scores, 1) == {"held_out_loss": 0.75, "subset_accuracy": 1}


@pytest.mark.parametrize(
    ("labels", "predicted", "matthews"),
    [
        ([0, 0, 1, 1], [0, 1, 1, 1], 1 / math.sqrt(3)),  # (2 * 1 - 1 * 0) / sqrt(3 * 2 * 1 * 2)
        ([0, 1], [1, 0], -1.0),
        ([0, 1], [1, 1], None),
        ([1, 1], [0, 1], None),
    ],
)
def test_matthews_correlation_is_missing_where_it_is_not_defined(
    labels: list[int], predicted: list[int], matthews: float | None
) -> None:
    rows = [(0, Prediction(0.0, (p,), (t,))) for p, t in zip(predicted, labels, strict=True)]
    found = values(list(label_scores(rows, ["no", "yes"])), None).get("matthews")
    assert found == (matthews if matthews is None else pytest.approx(matthews))


def test_rows_without_a_label_have_no_scores() -> None:
    scores = list(token_scores([(0, Prediction(2.0, (1, 2), (1, 3))), (4, Prediction(0.0, (), ()))]))
    assert {score.client for score in scores} == {None, 0}
    assert overall(scores)["held_out_loss"] == 1.0


def test_classes_by_hand() -> None:
    """True a a b, predicted a b b: a has tp 1, fn 1; b has tp 1, fp 1; c never occurs, and does not count."""
    rows = [(0, Prediction(0.5, (0,), (0,))), (0, Prediction(1.5, (1,), (0,))), (2, Prediction(1.0, (1,), (1,)))]
    scores = list(label_scores(rows, ("a", "b", "c")))
    two_thirds = 2 / (2 + 1)
    assert overall(scores) == pytest.approx(
        {
            "held_out_loss": 1,
            "accuracy": 2 / 3,
            "macro_f1": two_thirds,
            "matthews": 1 / 2,  # (tp tn - fp fn) / sqrt(2 * 1 * 2 * 1)
            "f1/a": two_thirds,
            "f1/b": two_thirds,
        }
    )
    assert values(scores, 2) == {"held_out_loss": 1, "accuracy": 1, "macro_f1": 1, "f1/b": 1}  # it has no row of a
    confusion = {score.metric: score.value for score in scores if score.metric.startswith("confusion/")}
    assert confusion == {"confusion/a/a": 1, "confusion/a/b": 1, "confusion/b/b": 1}


def test_round_s_training_loss_excludes_skipped_clients() -> None:
    """2 and 4, each once; the client that diverged at a loss of 1e6 is counted, but its update has no weight."""
    metrics, rest = RoundMetrics(0, 3, 0.0), {"loss_last": 1.0, "labels": 5.0, "steps": 2.0}
    for client, loss, failure in ((0, 2.0, None), (1, 1e6, "non-finite loss at local step 1"), (2, 4.0, None)):
        metrics.add(ClientRow(0, client, 1.0, 10, 10, loss=loss, **rest, failure=failure))  # type: ignore[arg-type]
    assert (metrics.loss, metrics.failed, metrics.labels) == (3.0, 1, 15)


def test_texts_are_scored_by_generation_and_under_teacher_forcing() -> None:
    rows = [
        (
            0,
            Generation(
                "", answer="the cat sat", reference="the cat ate a fish", teacher_forced="the cat", labels="the cat"
            ),
        ),
        (1, Generation("", answer="a dog", reference="a dog", teacher_forced="no", labels="a dog")),
    ]
    scores = list(text_scores(rows))
    rouge = RougeScorer(["rougeL"])
    first = rouge.score("the cat ate a fish", "the cat sat")["rougeL"].fmeasure
    assert first == pytest.approx(2 * 2 / (3 + 5))  # two words in common, of three and five
    assert values(scores, None)["rouge_l"] == pytest.approx((first + 1) / 2)
    assert values(scores, None)["teacher_forced_rouge_l"] == pytest.approx((1 + 0) / 2)
    assert values(scores, 1)["rouge_l"] == 1
    names = {"rouge_l", "rouge_l_unicode", "bleu_4", "bleu_4_unicode"}
    assert set(values(scores, 0)) == names | {f"teacher_forced_{name}" for name in names}
    assert values(scores, None)["rouge_l_unicode"] == values(scores, None)["rouge_l"]


def test_published_scores_are_missing_for_unreadable_scripts() -> None:
    """Hindi, equal: rouge-score would read only the digits.  Chinese, 4 of 5 characters in order, of which the first 4
    are the first 4: 2 * 4 / (5 + 5); 1- to 4-grams 4 of 5, 3 of 4, 2 of 3, 1 of 2."""
    hindi, chinese = "औज़ार शेल्फ 3 पर है।", "我喜欢绿茶"
    scores = list(
        text_scores([(0, Generation(*[hindi] * 5)), (1, Generation("", "我喜欢绿色", chinese, chinese, chinese))])
    )
    assert values(scores, 0) == {
        **{"rouge_l_unicode": 1, "bleu_4": 1, "bleu_4_unicode": 1},
        **{"teacher_forced_rouge_l_unicode": 1, "teacher_forced_bleu_4": 1, "teacher_forced_bleu_4_unicode": 1},
    }
    assert values(scores, 1)["rouge_l_unicode"] == pytest.approx(8 / 10)
    assert values(scores, 1)["bleu_4_unicode"] == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4))
    assert {"rouge_l", "bleu_4"} & {score.metric for score in scores if score.client == 1} == set()
    assert values(scores, None)["rouge_l_unicode"] == pytest.approx((1 + 8 / 10) / 2)


def test_empty_references_are_not_counted() -> None:
    """A reference that was cut to nothing has no words; its row is in neither mean nor count."""
    nothing, right = Generation("", "a guess", " \n", "a", "a"), Generation(*["the cat sat"] * 5)
    scores = list(text_scores([(0, nothing), (1, right)]))
    assert [(score.value, score.count) for score in scores if score.metric == "rouge_l" and score.client is None] == [
        (1.0, 1)
    ]
    assert "rouge_l" not in values(scores, 0)
    assert values(scores, 0)["teacher_forced_rouge_l"] == 1
    assert values(scores, None)["teacher_forced_rouge_l"] == 1


def test_bleu_distinguishes_hypothesis_and_reference() -> None:
    """BLEU, unlike ROUGE-L's F, changes if the two change places: only a short hypothesis is penalised."""
    long, short = "a b c d e f g h", "a b c d e f"
    scores = overall(list(text_scores([(0, Generation("", short, reference=long, teacher_forced=long, labels=short))])))
    assert scores["bleu_4"] == pytest.approx(sacrebleu.corpus_bleu([short], [[long]]).score / 100)
    assert scores["bleu_4"] == pytest.approx(math.exp(1 - 8 / 6))  # every n-gram is right; the brevity penalty alone
    assert scores["teacher_forced_bleu_4"] == pytest.approx(sacrebleu.corpus_bleu([long], [[short]]).score / 100)
    right = (6 / 8) * (5 / 7) * (4 / 6) * (3 / 5)  # of 1- to 4-grams, where the reference is the shorter one
    assert scores["teacher_forced_bleu_4"] == pytest.approx(right ** (1 / 4))
