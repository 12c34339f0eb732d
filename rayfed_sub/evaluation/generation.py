"""Scores of generated texts against references, each in [0, 1]: as published, and over the words of any script.

The published scores support few scripts.  rouge-score's words are runs of [a-z0-9]: it reads only the digits of a Hindi
text, and nothing of a Chinese one.  WMT's tokenizer 13a, BLEU's default, splits at spaces and ASCII punctuation: a
sentence in a script without spaces is one word.  Published scores are None where they read less than half of the
references.  The scores named `_unicode` read every script, and equal the published ones on ASCII texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from statistics import fmean
from typing import Any
from unicodedata import normalize


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> float | None:
    """Mean ROUGE-L of `predictions` against `references`, in [0, 1], as published scores are computed.

    The F-measure of the longest common subsequence of words (lower case, letters and digits of ASCII, no stemming),
    averaged over the pairs; 0 for a pair with no such word on either side, equal texts included.  None where less than
    half of the references' letters, marks and numbers are of ASCII, or there are none: see `rouge_l_unicode`.
    By rouge-score; Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries".  Raises ValueError for no pairs,
    or lists of different lengths.

    >>> round(rouge_l(["the cat sat"], ["the cat ate"]), 4)  # LCS 2 of 3 and 3 words
    0.6667
    >>> rouge_l(["кот спит"], ["кот спит"])
    """
    _check(predictions, references)
    letters = "".join(letter for text in references for letter in _patterns()["letters"].findall(text))
    read = len(letters.encode("ascii", "ignore"))
    return _rouge_l(predictions, references, None) if letters and 2 * read >= len(letters) else None


def rouge_l_unicode(predictions: Sequence[str], references: Sequence[str]) -> float | None:
    """Mean ROUGE-L as `rouge_l`, over the words of any script (`words`).

    Texts of ASCII characters with a letter or digit have the same score as there.  None where no reference has
    anything to read.  Raises ValueError as `rouge_l`.

    >>> rouge_l_unicode(["кот спит"], ["Кот ест"]), rouge_l_unicode(["我喜欢猫"], ["我喜欢狗"])
    (0.5, 0.75)
    """
    _check(predictions, references)
    return _rouge_l(predictions, references, _Words()) if any(map(words, references)) else None


def bleu_4(predictions: Sequence[str], references: Sequence[str]) -> float | None:
    """Corpus BLEU-4 of `predictions`, each with one reference, in [0, 1], as published scores are computed.

    exp(min(0, 1 - wanted words / predicted words)) times the geometric mean of the precisions of 1- to 4-grams, counted
    over all pairs together; upper and lower case differ, words as WMT's "13a" cuts them.  With sacrebleu's defaults: an
    n-gram length without a match counts half a match, then a quarter, and so on; no word in common is 0, and so is a
    corpus too short to have a 4-gram, equal texts included.  None where 13a cuts the references into less than half as
    many words as `bleu_4_unicode` (Chinese, Japanese, Thai, emoji, ...), or they are empty.  By sacrebleu, whose scores
    go to 100; Post 2018, "A Call for Clarity in Reporting BLEU Scores".  Raises ValueError for no pairs, or lists of
    different lengths.

    >>> round(bleu_4(["the cat sat on a mat"], ["the cat sat on the mat"]), 4)  # (5/6 * 3/5 * 2/4 * 1/3) ** (1/4)
    0.5373
    >>> bleu_4(["我喜欢猫"], ["我喜欢猫"])
    """
    import sacrebleu

    _check(predictions, references)
    cut = sacrebleu.BLEU().tokenizer
    read, there = (sum(len(cut(text).split()) for text in texts) for texts in (references, map(_spaced, references)))
    return _bleu_4(predictions, references) if there and 2 * read >= there else None


def bleu_4_unicode(predictions: Sequence[str], references: Sequence[str]) -> float | None:
    """Corpus BLEU-4 as `bleu_4`, over the words of any script.

    Before 13a cuts the text, spaces are put around each character of a script without spaces, each symbol and each
    punctuation mark outside ASCII, which is what sacrebleu's tokenizer `zh` does for Chinese.  Texts of ASCII
    characters have the same score as there.  None where no reference has anything to read.  Raises ValueError as
    `bleu_4`.

    >>> bleu_4_unicode(["我喜欢猫"], ["我喜欢猫"])
    1.0
    """
    _check(predictions, references)
    if not any(map(words, references)):
        return None
    return _bleu_4(list(map(_spaced, predictions)), list(map(_spaced, references)))


TEXT_SCORES: Mapping[str, Callable[[Sequence[str], Sequence[str]], float | None]] = {
    "rouge_l": rouge_l,
    "rouge_l_unicode": rouge_l_unicode,
    "bleu_4": bleu_4,
    "bleu_4_unicode": bleu_4_unicode,
}
"""The scores of texts by name."""


def words(text: str) -> list[str]:
    """The words of a text in any script, without case: Unicode's NFKC and case folding, ignorable characters left out.

    A word is a run of letters, their marks (vowel signs, accents) and numbers.  In scripts that are written without
    spaces (Chinese and Japanese by script, Thai, Lao, Khmer, Burmese by line-break class SA of UAX #14) each character
    with its marks is one, as is each pictograph.  A text without any has its visible characters in their place.

    >>> words("Don't panic, 3 times"), words("नमस्ते दुनिया।"), words("猫が2匹 🎉"), words("?!")
    (['don', 't', 'panic', '3', 'times'], ['नमस्ते', 'दुनिया'], ['猫', 'が', '2', '匹', '🎉'], ['?', '!'])
    """
    text = _normal(text).casefold()
    patterns = _patterns()
    found: list[str] = patterns["word"].findall(text) or patterns["visible"].findall(text)
    return found


class _Words:
    """`words` as a tokenizer for rouge-score."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


@cache
def _patterns() -> dict[str, Any]:
    """letters: with marks and numbers; word: see `words`; between: what `_spaced` puts spaces around; visible: a
    character but a space, with its marks; ignorable: characters that leave no trace in print."""
    import regex

    unspaced = r"[[\p{scx=Han}\p{scx=Hiragana}\p{scx=Katakana}\p{scx=Bopomofo}\p{LB=SA}]&&[\p{L}\p{M}\p{N}]]"
    alone = rf"(?=[{unspaced}\p{{So}}\p{{Emoji_Modifier}}])\X\p{{M}}*"
    run = rf"[[\p{{L}}\p{{M}}\p{{N}}]--{unspaced}]+"
    patterns = {
        "letters": r"[\p{L}\p{M}\p{N}]+",
        "word": f"{alone}|{run}",
        "between": rf"{alone}|[[\p{{P}}\p{{S}}]--[\x00-\x7f]]",
        "visible": r"(?!\s)\X",
        "ignorable": r"\p{Default_Ignorable_Code_Point}+",
    }
    return {name: regex.compile(pattern, regex.V1) for name, pattern in patterns.items()}


def _normal(text: str) -> str:
    return normalize("NFKC", _patterns()["ignorable"].sub("", text))


def _spaced(text: str) -> str:
    spaced: str = _patterns()["between"].sub(r" \g<0> ", _normal(text))
    return spaced


def _rouge_l(predictions: Sequence[str], references: Sequence[str], tokenizer: _Words | None) -> float:
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    # Without a tokenizer it logs a line by absl, which gives the root logger a handler for the rest of the process.
    scorer = RougeScorer(["rougeL"], tokenizer=tokenizer or DefaultTokenizer(use_stemmer=False))
    pairs = zip(references, predictions, strict=True)
    return fmean(scorer.score(wanted, predicted)["rougeL"].fmeasure for wanted, predicted in pairs)


def _bleu_4(predictions: Sequence[str], references: Sequence[str]) -> float:
    import sacrebleu

    return min(1.0, sacrebleu.corpus_bleu(list(predictions), [list(references)]).score / 100)


def _check(predictions: Sequence[str], references: Sequence[str]) -> None:
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
