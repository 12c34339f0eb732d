"""From a task to rows: tokens, cuts, the built-in task, and `load_dataset` as a whole."""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from rayfed_sub.config.loading import load_config
from rayfed_sub.config.schema import Federation, Partition, Task
from rayfed_sub.core.errors import UserError
from rayfed_sub.data.dataset import Dataset, build_dataset, load_dataset, load_pairs
from rayfed_sub.data.images import Images
from rayfed_sub.data.pairs import Kind, Pairs, capped, distinct
from rayfed_sub.data.processors import Processor
from rayfed_sub.data.python_docs import python_docs
from rayfed_sub.data.rows import Rows
from rayfed_sub.data.stdlib_docs import SKIPPED, callables, first_paragraph
from rayfed_sub.data.table_pairs import table_pairs
from rayfed_sub.data.tokenization import Cuts, tokenised

PAD, EOS, ASK, CLS = 256, 257, 258, 259


@dataclass(frozen=True)
class ByteTokenizer:
    """One token per byte; a prompt ends with ASK, an answer and a text with EOS, a text begins with CLS."""

    pad: int = PAD
    eos: int = EOS
    tail: int = 0

    def prompt(self, text: str) -> list[int]:
        return [*text.encode(), ASK]

    def answer(self, text: str) -> list[int]:
        return [*text.encode(), EOS]

    def text(self, text: str) -> list[int]:
        return [CLS, *text.encode(), EOS]

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.prompt(text) for text in texts]

    def answers(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.answer(text) for text in texts]

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.text(text) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode()


CODEC: Processor = ByteTokenizer()


@dataclass(frozen=True)
class SilentCodec(ByteTokenizer):
    """Gives no tokens for the answer "-"."""

    def answer(self, text: str) -> list[int]:
        return [] if text == "-" else super().answer(text)


@dataclass(frozen=True)
class WordyCodec(ByteTokenizer):
    """Puts nine tokens around every question."""

    def prompt(self, text: str) -> list[int]:
        return [CLS, CLS, CLS, CLS, *text.encode(), ASK, CLS, CLS, CLS, CLS]


@dataclass(frozen=True)
class RunCodec(ByteTokenizer):
    """The tokens of a question are its runs of letters, by their length, and its digits."""

    def prompt(self, text: str) -> list[int]:
        return [*map(len, re.findall(r"[a-z]+|[0-9]", text)), ASK]


def pairs_of(*pairs: tuple[str, str], keys: Sequence[str] | None = None) -> Pairs:
    questions, answers = zip(*pairs, strict=True)
    return Pairs("causal-lm", questions, answers, tuple(keys or [""] * len(pairs)))


def numbered(sizes: dict[str, int]) -> Pairs:
    """Distinct pairs; sizes[key] of them with each key."""
    keys = [key for key, size in sizes.items() for _ in range(size)]
    return pairs_of(*((f"q{i}", f"a{i}") for i in range(len(keys))), keys=keys)


def federation(kind: str, clients: int) -> Federation:
    return Federation(clients=clients, partition=Partition.model_validate({"kind": kind}))


def as_text(rows: Rows) -> list[tuple[str, str]]:
    cut = [(rows.row(i).tolist(), rows.prompts[i]) for i in range(len(rows))]
    return [(CODEC.decode(row[:prompt]), CODEC.decode(row[prompt:])) for row, prompt in cut]


# --- rows


def test_rows_are_flat_arrays_of_fixed_types() -> None:
    rows = Rows.of([[1, 2, 3], [], [4]], prompts=[1, 0, 0], classes=[2, 0, 1])
    assert rows.tokens.tolist() == [1, 2, 3, 4]
    assert (rows.begins.tolist(), rows.lengths.tolist()) == ([0, 3, 3], [3, 0, 1])
    types = [rows.tokens.dtype, rows.begins.dtype, rows.prompts.dtype, rows.classes.dtype]
    assert types == [np.int32, np.int64, np.int32, np.int64]
    taken = rows.take(np.array([2, 0]))
    assert [taken.row(i).tolist() for i in range(2)] == [[4], [1, 2, 3]]
    assert (taken.prompts.tolist(), taken.classes.tolist()) == ([0, 1], [1, 2])


def test_no_rows() -> None:
    assert len(Rows.of([], [])) == 0
    assert len(Rows.of([[1]], [0]).take(np.array([], np.int64))) == 0


# --- tokens


def test_short_row_is_prompt_then_answer() -> None:
    rows, _, cuts = tokenised(pairs_of(("ab", "cd")), CODEC, max_length=8)
    assert cuts == Cuts()
    assert rows.row(0).tolist() == [97, 98, ASK, 99, 100, EOS]
    assert rows.prompts.tolist() == [3]


def test_long_answer_keeps_its_start_and_loses_its_end_token() -> None:
    """Without its end token: the model must not learn to stop there."""
    rows, _, cuts = tokenised(pairs_of(("ab", "cdefghij"), ("ab", "cdefg")), CODEC, max_length=8)
    assert rows.row(0).tolist() == [97, 98, ASK, *b"cdefg"]  # 3 + 5 = 8
    assert rows.row(1).tolist() == [97, 98, ASK, *b"cdefg"]  # without room for its end token
    assert rows.prompts.tolist() == [3, 3]
    assert cuts == Cuts(cut=2, answers=2)


@pytest.mark.parametrize(
    ("question", "answer", "kept", "learned"),
    [
        # Of 12 tokens the answer's EOS takes one and the prompt's ASK one; the beginning gets half of an even cut.
        ("0123456", "xyz", "0123456", [*b"xyz", EOS]),  # 8 + 4 = 12 fits
        ("01234567", "xyz", "0123567", [*b"xyz", EOS]),  # 7 of 8 characters
        ("0123456789abcdefghij" * 9, "xyz", "0123hij", [*b"xyz", EOS]),
        ("0123456789", "uvwxy", "01289", [*b"uvwxy", EOS]),  # an answer of half a row stays complete
        ("0123456789", "uvwxyz", "01289", [*b"uvwxyz"]),  # a longer one keeps half a row
        ("012", "opqrstuvwxyz", "012", [*b"opqrstuv"]),  # and more, if the prompt leaves it
        ("\u00e9" * 9, "xyz", "\u00e9\u00e9\u00e9", [*b"xyz", EOS]),  # 2 bytes a character; no character is split
    ],
)
def test_long_row_is_cut_in_the_middle_of_its_question(
    question: str, answer: str, kept: str, learned: list[int]
) -> None:
    rows, _, cuts = tokenised(pairs_of((question, answer)), CODEC, max_length=12)
    assert rows.row(0).tolist() == [*kept.encode(), ASK, *learned]
    assert rows.prompts.tolist() == [len(kept.encode()) + 1]
    text, end = int(kept != question), int(learned[-1] != EOS)
    assert cuts == Cuts(cut=max(text, end), prompts=text, answers=end)


def test_only_column_texts_are_cut_longest_first(tmp_path: Path) -> None:
    """In 40 tokens "ok" and EOS take 3, "Sum up: ", ", for " and " >>" 16, ASK one; 20 are left for both."""
    file = tmp_path / "rows.jsonl"
    texts = [("abcdefghijklmnopqrstuvwxyz", "Tom"), ("abcdefghijklmnopqrstuvwxyz", "0123456789ABCDEF"), ("", "Tom")]
    file.write_text("\n".join(json.dumps({"text": text, "who": who, "a": "ok"}) for text, who in texts))
    task = Task(name="table", path=str(file), prompt="  Sum up: {text}, for {who} >>", answer="a", max_length=40)
    rows, _, cuts = tokenised(table_pairs(task, None), CODEC, task.max_length)
    assert [question for question, _ in as_text(rows)] == [
        "Sum up: abcdefghstuvwxyz, for Tom >>",  # 16 + 3
        "Sum up: abcdewxyz, for 01234CDEF >>",  # 9 + 9, as both are longer
        "Sum up: , for Tom >>",
    ]
    assert [answer for _, answer in as_text(rows)] == ["ok"] * 3
    assert cuts == Cuts(cut=2, prompts=2)


def test_rows_without_room_for_the_question_are_dropped_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    """A question of one letter takes 10 tokens; of 16 an answer keeps at least 8."""
    pairs = pairs_of(("a" * 50, "0123456"), ("b", "01234"), ("c" * 50, "0123"), ("d", "0123456789abcdef"))
    with caplog.at_level(logging.WARNING):
        rows, index, cuts = tokenised(pairs, WordyCodec(), max_length=16)
    assert index.tolist() == [1, 2]
    assert as_text(rows) == [("b", "01234"), ("cc", "0123")]
    # The first needs 10 + 8, the last 10 + 10: the prompt gets half of 20.
    assert cuts == Cuts(cut=1, prompts=1, answers=0, dropped=2, least=18)
    assert [record.getMessage() for record in caplog.records] == [
        "rows longer than task.max_length=16, of 4: 1 cut (1 in the text), 2 dropped"
    ]


def test_error_names_a_sufficient_length_if_all_rows_are_dropped() -> None:
    pairs = pairs_of(("a" * 50, "0123456"), ("b" * 50, "0123456789abcdef"))
    with pytest.raises(UserError) as caught:
        build_dataset(pairs, Task(max_length=16), federation("iid", 1), WordyCodec(), seed=0)
    assert (caught.value.field, caught.value.value) == ("task.max_length", 16)
    assert caught.value.allowed.startswith("18 or more: of all 2 rows the template")
    assert caught.value.advice == "set task.max_length=36 or more"


@pytest.mark.parametrize("max_length", [24, 25, 64, 200])
def test_cut_row_fills_max_length_with_tokens_of_different_lengths(max_length: int) -> None:
    """A token is a run of letters or a digit; a cut row is short of the limit by at most the longest run's tokens."""
    words = "".join(f"{'abcdefghij'[: i % 9 + 1]}{i}" for i in range(2000))
    rows, _, cuts = tokenised(pairs_of((words, "xyz"), (words[:700], "x")), RunCodec(), max_length)
    assert cuts.prompts == 2
    assert all(max_length - 1 <= length <= max_length for length in rows.lengths.tolist())


def test_rows_without_answer_tokens_are_dropped_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        rows, kept, _ = tokenised(pairs_of(("a", "-"), ("b", "B"), ("c", "-")), SilentCodec(), max_length=8)
    assert (len(rows), kept.tolist()) == (1, [1])
    assert [record.getMessage() for record in caplog.records] == ["2 of 3 rows have no tokens to learn from; dropped"]


def test_long_text_keeps_its_closing_token_and_its_class() -> None:
    pairs = Pairs("classification", ("abcdefghij", "ab"), ("no", "yes"), ("", ""), ("yes", "no"))
    rows, _, cuts = tokenised(pairs, CODEC, max_length=8)
    assert rows.row(0).tolist() == [CLS, *b"abchij", EOS]
    assert rows.row(1).tolist() == [CLS, *b"ab", EOS]
    assert rows.classes.tolist() == [1, 0]
    assert cuts == Cuts(cut=1, prompts=1)


# --- pairs


def test_distinct_compares_question_and_answer_together() -> None:
    pairs = pairs_of(("q", "a"), ("q", "b"), ("p", "a"), ("q", "a"))
    assert distinct(pairs).take(np.arange(3)) == pairs.take(np.array([0, 1, 2]))
    assert len(distinct(pairs)) == 3


def test_row_limit_draws_by_seed_and_keeps_the_order() -> None:
    pairs = numbered({"k": 100})
    chosen = [int(question[1:]) for question in capped(pairs, 10, seed=0).questions]
    assert len(set(chosen)) == 10
    assert chosen == sorted(chosen)
    assert chosen != list(range(10))
    assert capped(pairs, 10, seed=0) == capped(pairs, 10, seed=0) != capped(pairs, 10, seed=1)
    assert capped(pairs, 100, seed=0) is pairs


# --- python-docs


@pytest.fixture(scope="module")
def docs() -> Pairs:
    return python_docs()


def test_python_docs_hold_thousands_of_rows_of_many_modules(docs: Pairs) -> None:
    assert len(docs) > 2500
    assert len(set(docs.keys)) > 120
    assert not {name for name in docs.keys if name.startswith("_") or name in SKIPPED}
    assert list(docs.keys) == sorted(docs.keys)


def test_python_docs_cover_python_and_c(docs: Pairs) -> None:
    answer = dict(zip(docs.questions, docs.answers, strict=True))
    assert answer["What does `textwrap.dedent` do?"].startswith("Remove any common leading whitespace from every")
    assert answer["What does `math.ceil` do?"].startswith("Return the ceiling of x as an Integral")
    assert "What does `os.mkdir` do?" in answer


def test_python_docs_have_each_answer_once_in_single_spaces(docs: Pairs) -> None:
    assert len(set(docs.answers)) == len(docs) == len(set(docs.questions))
    assert all(answer == " ".join(answer.split()) and len(answer.split()) > 2 for answer in docs.answers)


def test_python_docs_do_not_depend_on_the_process(docs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("textwrap.dedent.__doc__", "Something that was patched in.")
    python_docs.cache_clear()
    assert python_docs() == docs


def test_module_callables_are_its_own_under_their_own_names() -> None:
    module = ModuleType("toys")
    code = "def spin(): pass\ndef _hidden(): pass\nclass Top:\n  def turn(self): pass\n  def __len__(self): return 0\n"
    exec(code + "whirl = spin\nfrom textwrap import dedent\nsize = 3", module.__dict__)
    assert [name for name, _ in callables(module)] == ["Top", "Top.turn", "spin"]


@pytest.mark.parametrize(
    ("doc", "text"),
    [
        ("Does  this\nand that.\n\nMore.", "Does this and that."),
        ("f(x) -> int\n\nDoes this and that.", "Does this and that."),
        ("f(x[, y])\nf(x, (y, z)) -> list\nDoes this and that.", "Does this and that."),
        ("f(x) -> None.  Does this and that.", "Does this and that."),
        ("f(x) -- does this and that", "does this and that"),
        ("f(x) --> new object", ""),
        ("Point(x, y)", ""),
        (">>> f(1) + 2", ""),
        ("Too short.", ""),
        ("", ""),
        (None, ""),
        (3, ""),
    ],
)
def test_first_paragraph(doc: object, text: str) -> None:
    assert first_paragraph(doc) == text


# --- load_dataset


def same(one: Dataset, other: Dataset) -> bool:
    def content(data: Dataset) -> list[list[int]]:
        arrays = (data.train.tokens, data.held_out.tokens, data.client_rows, data.client_offsets)
        arrays = (*arrays, data.held_out_clients, data.train_keys)
        return [array.tolist() for array in arrays]

    return content(one) == content(other)


@pytest.mark.parametrize("kind", ["column", "dirichlet", "shards", "power-law", "iid", "pool"])
def test_training_rows_are_partitioned_apart_from_the_held_out(kind: str) -> None:
    pairs = numbered({"x": 40, "y": 30, "z": 10})
    clients = 1 if kind == "pool" else 3

    def build(seed: int) -> Dataset:
        return build_dataset(pairs, Task(test_share=0.2), federation(kind, clients), CODEC, seed)

    data = build(0)
    assert (len(data.train), len(data.held_out)) == (64, 16)
    assert sorted(data.client_rows.tolist()) == list(range(64))  # disjoint and complete
    assert data.client_offsets[[0, -1]].tolist() == [0, 64]
    assert all(len(data.rows_of(client)) > 0 for client in range(clients))
    assert not set(as_text(data.train)) & set(as_text(data.held_out))
    assert same(data, build(0))
    other = build(1)
    assert as_text(other.train) == as_text(data.train)  # task.seed draws the rows, the run's seed partitions them
    assert as_text(other.held_out) == as_text(data.held_out)
    assert same(data, other) == (kind in ("column", "pool"))


def test_column_partition_uses_the_largest_values() -> None:
    sizes = {"small": 3, "large": 30, "middle": 10, "other": 10}
    data = build_dataset(numbered(sizes), Task(test_share=0.1), federation("column", 3), CODEC, seed=0)
    assert data.client_names == ("large", "middle", "other")
    # 0.1 of 30, 10 and 10 rows are held out; "small" (q0, q1, q2) is not used.
    assert [len(data.rows_of(client)) for client in range(3)] == [27, 9, 9]
    seen = {question for rows in (data.train, data.held_out) for question, _ in as_text(rows)}
    assert seen == {f"q{i}" for i in range(3, 53)}
    first = {as_text(data.train)[row][0] for row in data.rows_of(0)}
    assert first <= {f"q{i}" for i in range(3, 33)}


def test_repeats_are_never_in_both_splits(tmp_path: Path) -> None:
    file = f"{tmp_path}/rows.jsonl"
    with open(file, "w", encoding="utf-8") as lines:
        for i in range(300):  # 30 different rows, ten of each
            print(json.dumps({"q": f"q{i % 30}", "a": "a"}), file=lines)
    task = Task(name="table", path=file, prompt="{q}", answer="a", test_share=0.3)
    data = load_dataset(task, federation("iid", 2), CODEC, seed=0)
    assert (len(data.train), len(data.held_out)) == (21, 9)
    assert not set(as_text(data.train)) & set(as_text(data.held_out))


def prompts(rows: Rows | Images) -> list[tuple[int, ...]]:
    assert isinstance(rows, Rows)
    return [tuple(rows.row(row)[: rows.prompts[row]].tolist()) for row in range(len(rows))]


@pytest.mark.parametrize("kind", ["causal-lm", "classification"])
def test_no_held_out_prompt_is_trained_on_after_cuts(kind: Kind, caplog: pytest.LogCaptureFixture) -> None:
    """90 long questions that a cut reduces to their last letter, nine of each, and 10 short ones that stay."""
    long = [f"begin {'x' * 30}{i:04d}{'y' * 30} {'abcdefghij'[i % 10]}" for i in range(90)]
    questions = (*long, *(f"short {i}" for i in range(10)))
    answers, names = (("yes",) * 100, ()) if kind == "causal-lm" else (("yes", "no") * 50, ("yes", "no"))
    pairs = Pairs(kind, questions, answers, ("",) * 100, names)
    with caplog.at_level(logging.WARNING):
        data = build_dataset(pairs, Task(max_length=24, test_share=0.05), federation("iid", 2), CODEC, seed=0)
    assert not set(prompts(data.train)) & set(prompts(data.held_out))
    assert len(data.held_out) == 5
    # Each held-out letter removes its eight other rows, or seven if two of the five have one letter.
    taken = {prompt for prompt in prompts(data.held_out) if len(prompt) > 12}
    assert data.row_counts.repeated == 9 * len(taken) - sum(len(prompt) > 12 for prompt in prompts(data.held_out))
    assert data.row_counts.cut_prompts == 90
    assert (
        f"{data.row_counts.repeated} training rows left out: the same question, but for case, spaces and what is cut, "
        in (caplog.text)
    )


def test_question_cut_in_two_ways_is_one_question() -> None:
    """The long answer leaves 10 tokens of 20 to the prompt, the short one 18."""
    questions = [f"{i:03d}{'x' * 40}{i:03d}" for i in range(20) for _ in range(2)]
    pairs = pairs_of(*zip(questions, ["a", "a" * 30] * 20, strict=True))
    data = build_dataset(pairs, Task(max_length=20, test_share=0.2), federation("iid", 2), CODEC, seed=0)
    asked = [{CODEC.decode(prompt[:3]) for prompt in prompts(rows)} for rows in (data.train, data.held_out)]
    assert not asked[0] & asked[1]
    assert len(asked[0] | asked[1]) == 20


def test_error_names_a_sufficient_length_if_a_cut_makes_all_questions_equal() -> None:
    pairs = pairs_of(*((f"begin {'x' * 30}{i:04d}{'y' * 30} end", "answer") for i in range(100)))
    with pytest.raises(UserError, match=r"or let task\.prompt, and task\.max_length or") as caught:
        build_dataset(pairs, Task(max_length=40, test_share=0.2), federation("iid", 2), CODEC, seed=0)
    assert caught.value.field == "task.test_share"


def test_classes_from_a_table(tmp_path: Path) -> None:
    file = f"{tmp_path}/rows.jsonl"
    with open(file, "w", encoding="utf-8") as lines:
        for i in range(40):
            print(json.dumps({"text": f"t{i}", "mood": "glad" if i % 4 else "sad"}), file=lines)
    task = Task(name="table", path=file, prompt="{text}", label="mood", test_share=0.2)
    data = load_dataset(task, federation("iid", 4), CODEC, seed=0)
    assert (data.kind, data.class_names) == ("classification", ("glad", "sad"))
    assert data.client_names == ("client 0", "client 1", "client 2", "client 3")
    # Held-out rows are stratified by class: 0.2 of 30 glad and of 10 sad rows.
    assert np.bincount(data.held_out.classes).tolist() == [6, 2]
    assert np.bincount(data.train.classes).tolist() == [24, 8]
    for i in range(len(data.train)):
        number = int(CODEC.decode(data.train.row(i).tolist())[1:])
        assert data.train.classes[i] == (0 if number % 4 else 1)


def test_keys_of_training_rows_and_clients_of_evaluation_rows() -> None:
    """40, 30 and 10 rows of x, y and z; a tenth is held out: 4, 3 and 1."""
    data = build_dataset(numbered({"x": 40, "y": 30, "z": 10}), Task(), federation("column", 3), CODEC, seed=0)
    assert data.key_names == ("x", "y", "z")
    assert data.train_keys.dtype == np.int32
    number = [int(question[1:]) for question, _ in as_text(data.train)]
    assert data.train_keys.tolist() == [0 if i < 40 else 1 if i < 70 else 2 for i in number]
    asked = [int(question[1:]) for question, _ in as_text(data.held_out)]
    assert data.held_out_clients.dtype == np.int64
    assert data.held_out_clients.tolist() == [0 if i < 40 else 1 if i < 70 else 2 for i in asked]


@pytest.mark.parametrize("kind", ["dirichlet", "shards", "power-law", "iid"])
def test_evaluation_rows_are_assigned_like_training_rows_of_their_key(kind: str) -> None:
    pairs = numbered({"x": 400, "y": 300, "z": 100})
    data = build_dataset(pairs, Task(test_share=0.2), federation(kind, 4), CODEC, seed=0)
    counts = np.stack([np.bincount(data.train_keys[data.rows_of(client)], minlength=3) for client in range(4)])
    asked = [int(question[1:]) for question, _ in as_text(data.held_out)]
    judged_keys = np.asarray([0 if i < 400 else 1 if i < 700 else 2 for i in asked])
    for key, held_out in enumerate((80, 60, 20)):
        dealt = np.bincount(data.held_out_clients[judged_keys == key], minlength=4)
        exact = held_out * counts[:, key] / counts[:, key].sum()
        assert dealt.sum() == held_out
        assert (abs(dealt - exact) < 1).all()  # largest remainders: the whole part, or one more


def test_validation_rows_can_replace_held_out_rows() -> None:
    pairs, task = numbered({"x": 60, "y": 40}), Task(test_share=0.2, validation_share=0.1)
    held_out = build_dataset(pairs, task, federation("column", 2), CODEC, seed=0)
    validation = build_dataset(pairs, task, federation("column", 2), CODEC, 0, "validation")
    assert (len(held_out.train), len(held_out.held_out), len(validation.held_out)) == (70, 20, 10)
    assert as_text(held_out.train) == as_text(validation.train)
    assert held_out.client_rows.tolist() == validation.client_rows.tolist()
    assert not set(as_text(validation.held_out)) & set(as_text(held_out.held_out))
    assert np.bincount(validation.held_out_clients).tolist() == [6, 4]


def test_row_counts_account_for_every_row() -> None:
    """120 rows: 10 of "z", then 10 beyond max_rows; a row without answer tokens among x; a repeat of the question
    q0."""
    pairs = numbered({"x": 70, "y": 40, "z": 10})
    questions = [*pairs.questions[:69], "Q0", *pairs.questions[70:]]
    answers = ["a0", "-", *pairs.answers[2:]]
    pairs = Pairs("causal-lm", tuple(questions), tuple(answers), pairs.keys)
    for seed in range(5):
        task = Task(max_rows=100, test_share=0.3, validation_share=0.1, seed=seed)
        row_counts = build_dataset(pairs, task, federation("column", 2), SilentCodec(), seed).row_counts
        parts = (row_counts.capped, row_counts.strange, row_counts.silent, row_counts.dropped, row_counts.repeated)
        assert sum(parts) + row_counts.train + row_counts.validation + row_counts.held_out == row_counts.read == 120
        assert (row_counts.strange, row_counts.capped) == (10, 10)
        assert row_counts.silent <= 1
        assert row_counts.repeated <= 1
    whole = build_dataset(pairs, Task(), federation("column", 2), SilentCodec(), 0).row_counts
    assert (whole.capped, whole.strange, whole.silent) == (0, 10, 1)


def test_max_rows_counts_training_and_held_out_rows() -> None:
    task = Task(max_rows=20, test_share=0.25)
    data = build_dataset(numbered({"k": 100}), task, federation("iid", 2), CODEC, seed=0)
    assert (len(data.train), len(data.held_out)) == (15, 5)


def test_task_seed_fixes_the_splits_for_all_run_seeds() -> None:
    """Settings chosen with one seed must not depend on the rows that evaluate another."""
    pairs, dirichlet = numbered({"x": 90, "y": 70, "z": 40}), federation("dirichlet", 3)
    task = Task(max_rows=100, test_share=0.2, validation_share=0.2)
    first, second = (build_dataset(pairs, task, dirichlet, CODEC, seed) for seed in (0, 1))
    tuned = build_dataset(pairs, task, dirichlet, CODEC, 2, "validation")
    assert as_text(first.held_out) == as_text(second.held_out)
    assert not set(as_text(first.held_out)) & {*as_text(tuned.train), *as_text(tuned.held_out)}
    assert first.client_rows.tolist() != second.client_rows.tolist()  # the partition follows the run's own seed
    other = build_dataset(pairs, task.model_copy(update={"seed": 6}), dirichlet, CODEC, 0)
    assert as_text(other.held_out) != as_text(first.held_out)


def test_column_clients_do_not_depend_on_the_rows_that_max_rows_keeps() -> None:
    pairs = numbered({"x": 31, "y": 30, "z": 29})
    for seed in range(5):
        data = build_dataset(pairs, Task(max_rows=20, seed=seed), federation("column", 2), CODEC, seed=0)
        assert data.client_names == ("x", "y")
        assert len(data.train) + len(data.held_out) == 20


def test_pool_and_federation_have_the_same_evaluation_rows() -> None:
    """With the keys that the refusal of method.name=centralized recommends."""
    pairs, tree = numbered({"x": 40, "y": 30, "z": 20}), {"federation": {"clients": 2}}
    apart = build_dataset(pairs, Task(max_rows=50), load_config(tree).federation, CODEC, seed=0)
    with pytest.raises(UserError) as refused:
        load_config(tree, ["method.name=centralized"])
    pooled = load_config(tree, refused.value.advice.removeprefix("set ").split()).federation
    together = build_dataset(pairs, Task(max_rows=50), pooled, CODEC, seed=0)
    assert pooled.partition.largest == 2
    assert as_text(together.held_out) == as_text(apart.held_out)
    assert len(together.rows_of(0)) == len(apart.train) == len(together.train)


def test_one_row_clients() -> None:
    sizes = {"a": 1, "b": 1, "c": 4}
    data = build_dataset(numbered(sizes), Task(test_share=0.25), federation("column", 3), CODEC, seed=0)
    # 0.25 * 6 rounds to 2; "a" and "b" must keep their only row.
    assert [len(data.rows_of(client)) for client in range(3)] == [2, 1, 1]
    assert len(data.held_out) == 2


def test_python_docs_as_a_federation() -> None:
    task, shares = Task(), federation("column", 8)
    pairs = load_pairs(task, shares)
    data = build_dataset(pairs, task, shares, CODEC, seed=0)
    assert "builtins" in data.client_names
    sizes = [list(pairs.keys).count(name) for name in data.client_names]
    assert sizes == sorted(sizes, reverse=True)
    assert len(data.train) + len(data.held_out) == sum(sizes)
    assert data.train.lengths.max() == task.max_length


@pytest.mark.parametrize("max_length", [40, 48, 64])
def test_python_docs_cut_short_keep_their_template_and_disjoint_splits(max_length: int) -> None:
    """For the longest prompts the template and ASK take 17 of 20 tokens, which leaves 3 for the name."""
    task, shares = Task(max_length=max_length), federation("iid", 8)
    data = build_dataset(load_pairs(task, shares), task, shares, CODEC, seed=0)
    assert all(text.startswith("What does `") and text.endswith("` do?") for text, _ in as_text(data.train))
    assert not set(prompts(data.train)) & set(prompts(data.held_out))
    assert data.row_counts.repeated > 0


def test_built_in_task_refuses_the_fields_of_a_table() -> None:
    with pytest.raises(UserError, match=r"set task\.name=table") as caught:
        load_dataset(Task(path="rows.csv"), federation("iid", 2), CODEC, seed=0)
    assert caught.value.field == "task.name"


def test_rows_without_any_tokens_are_refused() -> None:
    with pytest.raises(UserError) as caught:
        build_dataset(pairs_of(("q", "-")), Task(), federation("iid", 1), SilentCodec(), seed=0)
    assert caught.value.field == "task.path"
