"""The named tasks from small files with the real columns, of the hub and of local files, and their rows as tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from rayfed_sub import load_config
from rayfed_sub.cli.listings import tasks
from rayfed_sub.config.schema import Federation, Task
from rayfed_sub.core.errors import UserError
from rayfed_sub.data.batching import collate
from rayfed_sub.data.dataset import Dataset, load_dataset, load_pairs
from rayfed_sub.data.pairs import Pairs, distinct
from rayfed_sub.data.partitions import key_column, largest_keys
from rayfed_sub.data.rows import Rows
from rayfed_sub.data.splits import questions_asked, split_rows
from rayfed_sub.data.table_pairs import table_pairs
from rayfed_sub.data.tasks import TASKS, filled
from rayfed_sub.data.tokenization import tokenised
from rayfed_sub.models.tokenizers import ByteTokenizer
from rayfed_sub.planning.job import prepare
from tests.helpers.pictures import KINDS, drawn, filed

DOLLY = [
    {"instruction": "Why?", "context": "", "response": "So.", "category": "open_qa", "fedftg_client": 1},
    {"instruction": "Sum up.", "context": "A b.\n", "response": "B", "category": "summarization", "fedftg_client": 3},
    {"instruction": "Where?", "context": None, "response": "Here.", "category": "open_qa", "fedftg_client": None},
    {"instruction": "Who?", "context": " ", "response": "", "category": "open_qa", "fedftg_client": 2},
]


def written(path: Path, records: list[dict[str, Any]]) -> str:
    pd.DataFrame(records).to_parquet(path)
    return str(path)


def federation(**partition: Any) -> Federation:
    return Federation.model_validate({"clients": 2, "partition": partition})


def in_order(task: Task, **partition: Any) -> Pairs:
    """The pairs of a named task in the order of its file."""
    return table_pairs(filled(task), key_column(task, federation(**partition)))


def medquad(path: Path, source: str, count: int = 20) -> Task:
    """NIH has two thirds of the rows, CDC one; answers have runs of spaces and line breaks."""
    records = [
        {"question": f"What is  {i} ?", "answer": f"It is\n  a\t{i} .", source: "CDC" if i % 3 == 0 else "NIH"}
        for i in range(count)
    ]
    return Task(name="medquad", path=written(path, records))


@pytest.mark.parametrize("source", ["source", "document_source"])
def test_medquad_with_the_local_and_the_hubs_columns(source: str, tmp_path: Path) -> None:
    pairs = in_order(medquad(tmp_path / "rows.parquet", source))
    assert (pairs.kind, pairs.questions[1], pairs.answers[1]) == ("causal-lm", "What is 1 ?", "It is a 1 .")
    assert pairs.keys[:4] == ("CDC", "NIH", "NIH", "CDC")


def test_dolly_context_follows_a_blank_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = Task(name="dolly-15k", path=written(tmp_path / "rows.parquet", DOLLY))
    with caplog.at_level(logging.WARNING):
        pairs = in_order(task)
    assert pairs.questions == ("Why?", "Sum up.\n\nA b.", "Where?")
    assert pairs.answers == ("So.", "B", "Here.")
    assert pairs.keys == ("open_qa", "summarization", "open_qa")
    assert [record.getMessage() for record in caplog.records] == [
        "task.path: 1 of 4 rows have no prompt, answer or key; dropped"
    ]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_client_numbers_are_integers_and_rows_without_one_are_dropped(
    suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """pandas stores integers with gaps as floats: 1.0 and NaN."""
    path, frame = tmp_path / f"rows.{suffix}", pd.DataFrame(DOLLY)
    assert frame.fedftg_client.dtype == np.float64
    frame.to_parquet(path) if suffix == "parquet" else frame.to_json(path, orient="records", lines=True)
    with caplog.at_level(logging.WARNING):
        pairs = in_order(Task(name="dolly-15k", path=str(path)), column="fedftg_client")
    assert pairs.keys == ("1", "3")
    assert "2 of 4 rows have no prompt, answer or key; dropped" in caplog.text


def test_numbers_with_a_fraction_are_refused(tmp_path: Path) -> None:
    records = [{**row, "fedftg_client": value} for row, value in zip(DOLLY, [1.0, 0.5, float("nan"), 2.0], strict=True)]
    path = written(tmp_path / "rows.parquet", records)
    with pytest.raises(UserError) as caught:
        load_pairs(Task(name="dolly-15k", path=path), federation(column="fedftg_client"))
    assert str(caught.value) == (
        "federation.partition.column: got 'fedftg_client'; allowed: a column of text, whole numbers, true or false; "
        "row 2 of rows.parquet holds the number 0.5, which is not whole; name another column, or write its values as "
        "text"
    )


@pytest.mark.parametrize("dtype", ["int64", "float64"])
def test_tumour_classes_have_names(dtype: str, tmp_path: Path) -> None:
    frame = pd.DataFrame({"image": [filed(drawn(kind, 0)) for kind in KINDS], "label": [2, 0, 3, 1]})
    frame.astype({"label": dtype}).to_parquet(tmp_path / "rows.parquet")
    pairs = in_order(Task(name="brain-tumor", path=str(tmp_path / "rows.parquet")))
    assert pairs.class_names == ("glioma", "meningioma", "notumor", "pituitary")
    assert pairs.answers == pairs.keys == ("notumor", "glioma", "pituitary", "meningioma")


def test_named_task_has_a_default_column_and_accepts_another() -> None:
    for name, default in {"medquad": "source", "dolly-15k": "category", "brain-tumor": "label"}.items():
        task = Task.model_validate({"name": name})
        for kind in ("column", "dirichlet", "shards", "iid"):
            assert key_column(task, federation(kind=kind)) == default
        assert key_column(task, federation(column="other")) == "other"
        assert filled(task).path == TASKS[name].hub
        assert filled(task.model_copy(update={"path": "mine.parquet"})).path == "mine.parquet"


@pytest.mark.parametrize("name", ["python-docs", *TASKS])
@pytest.mark.parametrize("field", ["prompt", "answer", "label", "image"])
def test_named_task_refuses_columns_of_its_own(name: str, field: str) -> None:
    with pytest.raises(UserError) as caught:
        load_pairs(Task.model_validate({"name": name, field: "x"}), federation())
    assert str(caught.value) == (
        f"task.name: got {name!r}; allowed: table where task.{field} is set; set task.name=table or remove task.{field}"
    )


def test_list_shows_hub_id_column_and_licence() -> None:
    columns, rows = tasks()
    assert columns == ("name", "hub id", "what", "column", "licence")
    assert [row[0] for row in rows] == ["python-docs", *TASKS, "table"]
    (dolly,) = (row for row in rows if row[0] == "dolly-15k")
    assert (dolly[1], dolly[3], dolly[4]) == ("databricks/databricks-dolly-15k", "category", "CC BY-SA 3.0")


def test_named_task_from_file_to_dataset(tmp_path: Path) -> None:
    tree = {
        "model": {"path": "random", "random": {"type": "llama", "hidden_size": 64, "num_hidden_layers": 1}},
        "task": medquad(tmp_path / "rows.parquet", "document_source").model_dump(exclude_none=True),
        "federation": {"clients": 2},
    }
    job = prepare(load_config(tree))
    assert (job.architecture.kind, job.dataset.client_names) == ("causal-lm", ("NIH", "CDC"))
    assert prepare(job.config).dataset.client_names == ("NIH", "CDC")  # as a resumed run reads it


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("medquad", "question, answer, source"),
        ("dolly-15k", "instruction, context, response, category"),
        ("brain-tumor", "image, label"),
    ],
)
def test_file_without_the_task_s_columns_is_refused(name: str, needed: str, tmp_path: Path) -> None:
    path = written(tmp_path / "rows.parquet", [{"q": "Why?", "answer": "So.", "document_source": "NIH"}])
    with pytest.raises(UserError) as caught:
        load_pairs(Task.model_validate({"name": name, "path": path}), federation())
    assert str(caught.value) == (
        f"task.path: got {path!r}; allowed: a table with the columns {needed}, as {name} has them; "
        "it has q, answer, document_source; give another file, or set task.name=table"
    )


def test_unknown_user_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_pairs(medquad(tmp_path / "rows.parquet", "source"), federation(column="focus"))
    assert str(caught.value).startswith("federation.partition.column: got 'focus'; allowed: a column of the table: ")


def test_too_many_clients_error_names_the_column() -> None:
    with pytest.raises(UserError) as caught:
        largest_keys(["CDC", "NIH", "NIH"], 8, column="source")
    message = "federation.clients: got 8; allowed: 1 to 2, the number of values of the column source; set "
    assert str(caught.value) == f"{message}federation.clients=2"


# --- repeats


@pytest.mark.parametrize(
    ("copies", "share", "begins"),
    [
        (
            2,
            0.25,
            "1 training row left out: the same question, ",
        ),  # 1 of 4 rows is held out, from "x", the first of equals
        (2000, 0.001, "1,998 training rows left out: the same question, "),  # 2 of 2000
    ],
)
def test_repeats_of_a_held_out_question_are_counted(
    copies: int, share: float, begins: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The rows of key "x" all have one question, those of "y" a different one each."""
    questions, keys = ["?"] * copies + [f"{i}?" for i in range(copies)], ["x"] * copies + ["y"] * copies
    with caplog.at_level(logging.WARNING):
        split_rows([questions_asked(questions)], keys, Task(test_share=share))
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(begins)


def test_repeats_are_counted_in_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    pairs = Pairs("causal-lm", ("q", "q", "q", "p"), ("a", "b", "a", "a"), ("",) * 4)
    judged = Pairs("classification", ("q", "q", "q", "p"), ("a", "b", "a", "a"), ("",) * 4, ("a", "b"))
    with caplog.at_level(logging.WARNING):
        assert distinct(pairs).answers == ("a", "b", "a")
        assert (distinct(judged).questions, distinct(judged).answers) == (("q", "p"), ("a", "a"))
        distinct(distinct(judged))
    messages = list(dict.fromkeys(record.getMessage() for record in caplog.records))
    assert messages == [
        "1 of 4 rows have the prompt and answer of a row before them; dropped",
        "2 of 4 rows have the text of a row before them; dropped (1 of them with another label)",
    ]


# --- rows of tokens


def rows_of(pairs: list[tuple[str, str]], max_length: int) -> Rows:
    questions, answers = zip(*pairs, strict=True)
    rows, _, _ = tokenised(Pairs("causal-lm", questions, answers, ("",) * len(pairs)), ByteTokenizer(), max_length)
    assert isinstance(rows, Rows)
    return rows


def test_prompt_and_padding_carry_no_label() -> None:
    """A prompt is bos, "Q: ?", line break, "A: "; an answer its bytes + 3 and eos, 2."""
    rows = rows_of([("?", "ab"), ("?", "a")], 64)
    prompt = [1, *(byte + 3 for byte in b"Q: ?\nA: ")]
    batch = collate(rows, np.array([0, 1]), mask_prompt=True, pad=0)
    a, b = ord("a") + 3, ord("b") + 3
    assert batch["input_ids"].tolist() == [[*prompt, a, b, 2], [*prompt, a, 2, 0]]
    assert batch["labels"].tolist() == [[-100] * 9 + [a, b, 2], [-100] * 9 + [a, 2, -100]]
    whole = collate(rows, np.array([1]), mask_prompt=False, pad=0)
    assert whole["labels"].tolist() == [[*prompt, a, 2]]


def test_long_row_keeps_its_template_and_the_answer_or_half_a_row_of_it() -> None:
    processor = ByteTokenizer()
    rows = rows_of([("?", "abcdefghijklmn"), ("a long question", "x")], 20)
    assert rows.row(0).tolist() == [*processor.prompt("?"), *processor.answer("abcdefghijk")[:11]]  # 9 + 11
    assert int(rows.prompts[0]) == 9
    assert rows.row(1).tolist() == [*processor.prompt("a lonstion"), *processor.answer("x")]  # 8 + 10 + 2
    assert int(rows.prompts[1]) == 18


@dataclass(frozen=True)
class WordCodec(ByteTokenizer):
    """A token is a word of any length, by its place in the dictionary; counts the characters that it was given."""

    seen: list[int] = field(default_factory=list)

    def answers(self, texts: Sequence[str]) -> list[list[int]]:
        self.seen.append(sum(map(len, texts)))
        return [[*(len(word) for word in text.split()), self.eos] for text in texts]


def test_only_the_needed_start_of_a_long_answer_is_read() -> None:
    """At most 16 tokens are kept, for which 96 characters are read.  The first answer has more words than that in them;
    the second has only two and is read completely, to the last of its three."""
    processor = WordCodec()
    answers = ("abc " * 1000, "a" * 40 + " " + "b" * 40 + " " + "c" * 300)
    pairs = Pairs("causal-lm", ("", ""), answers, ("", ""))
    rows, _, _ = tokenised(pairs, processor, 16)
    assert isinstance(rows, Rows)
    asked = len(processor.prompt(""))
    assert rows.row(0)[asked:].tolist() == [3] * 8
    assert rows.row(1)[asked:].tolist() == [40, 40, 300, processor.eos]
    # 96 characters up to the last space: 24 words of 4, less the space; 40 + 1 + 40; then the second one whole.
    assert processor.seen == [95 + 81, 382]


def test_long_answers_have_the_tokens_of_the_full_text() -> None:
    processor, text = ByteTokenizer(), "one two three " * 200
    rows = rows_of([("?", text)], 64)
    assert rows.row(0).tolist() == [*processor.prompt("?"), *processor.answer(text)][:64]


def dataset(task: Task, **partition: Any) -> Dataset:
    return load_dataset(task, federation(**partition), ByteTokenizer(), seed=0)


def test_named_task_is_partitioned_by_its_default_column(tmp_path: Path) -> None:
    """20 rows: 7 of CDC, 13 of NIH; a tenth is held out, 2."""
    task = medquad(tmp_path / "rows.parquet", "source")
    by_source = dataset(task)
    assert by_source.client_names == ("NIH", "CDC")
    assert [len(by_source.rows_of(client)) for client in (0, 1)] in ([12, 6], [11, 7])
    assert dataset(task, kind="iid").client_names == ("client 0", "client 1")
    spread = dataset(task, kind="dirichlet", alpha=10.0)
    assert sum(len(spread.rows_of(client)) for client in (0, 1)) == 18


def test_table_gives_the_pairs_of_a_named_task(tmp_path: Path) -> None:
    """The same file as a `table` with all fields: only the runs of spaces stay."""
    task = medquad(tmp_path / "rows.parquet", "source")
    plain = Task(name="table", path=task.path, prompt="{question}", answer="answer")
    assert table_pairs(plain, "source").answers[1] == "It is\n  a\t1 ."
    assert table_pairs(plain, "source").keys == table_pairs(filled(task), "source").keys
