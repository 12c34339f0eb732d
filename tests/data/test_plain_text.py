"""Plain text: chunks in which every token is a label once, splits by text, clients by column."""

import logging
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rayfed_sub.config.loading import load_config
from rayfed_sub.config.schema import Federation, Task
from rayfed_sub.core.errors import UserError
from rayfed_sub.data.batching import IGNORED, collate
from rayfed_sub.data.dataset import Dataset, load_dataset
from rayfed_sub.data.rows import Rows
from rayfed_sub.data.tokenization import chunked
from rayfed_sub.models.tokenizers import ByteTokenizer
from rayfed_sub.planning.job import kind_of
from tests.models.test_tokenizers import hub_codec, spell, tokenizer

CODEC = ByteTokenizer()
BY_SPEAKER = Federation.model_validate({"clients": 3, "partition": {"kind": "column", "column": "speaker"}})


def speeches(tmp_path: Path, most: int = 16) -> Task:
    """Three speakers with 20, 10 and 10 speeches of 5 to 44 letters."""
    speakers = ["first"] * 20 + ["second"] * 10 + ["third"] * 10
    texts = [f"{i:02}" + "".join(chr(97 + (i * 7 + k) % 26) for k in range(3 + i)) for i in range(40)]
    path = tmp_path / "speeches.parquet"
    pd.DataFrame({"speaker": speakers, "text": texts}).to_parquet(path)
    return Task(name="table", path=str(path), text="text", max_length=most)


@pytest.mark.parametrize("most", [2, 3, 8, 9, 100])
def test_every_token_is_a_label_in_exactly_one_chunk(most: int) -> None:
    for length in range(2, 30):
        chunks = chunked(list(range(length)), most)
        assert [token for chunk in chunks for token in chunk[1:]] == list(range(1, length))
        assert all(2 <= len(chunk) <= most for chunk in chunks)
        assert all(after[0] == before[-1] for before, after in pairwise(chunks))


def texts_of(data: Dataset, rows: list[int]) -> str:
    """What the rows say, each without its first token."""
    assert isinstance(data.train, Rows)
    return CODEC.decode([token for row in rows for token in data.train.row(row)[1:].tolist()])


def test_clients_have_the_chunks_of_their_own_texts(tmp_path: Path) -> None:
    task = speeches(tmp_path)
    data = load_dataset(task, BY_SPEAKER, CODEC, 0)
    frame = pd.read_parquet(str(task.path))
    counts = data.row_counts
    assert (counts.read, counts.train, counts.held_out) == (40, 36, 4)
    assert counts.chunks == len(data.train) + len(data.held_out)
    # bos and eos around the letters, of which 15 a chunk are new.
    assert counts.chunks == sum(-(-(len(text) + 1) // 15) for text in frame["text"])
    whole = dict(zip(frame["text"], frame["speaker"], strict=True))
    seen: list[str] = []
    for client, name in enumerate(data.client_names):
        said = re.findall("[0-9]+[a-z]+", texts_of(data, data.rows_of(client).tolist()))
        assert {whole[text] for text in said} == {name}
        seen += said
    assert len(seen) == 36
    assert isinstance(data.held_out, Rows)
    judged = CODEC.decode([token for row in range(len(data.held_out)) for token in data.held_out.row(row)[1:].tolist()])
    assert sorted(re.findall("[0-9]+[a-z]+", judged)) == sorted(set(whole) - set(seen))
    assert len(data.held_out_clients) == len(data.held_out)
    assert [data.key_names[key] for key in data.train_keys[data.rows_of(1)]] == ["second"] * len(data.rows_of(1))


def test_all_of_a_chunk_but_its_first_token_is_learned(tmp_path: Path) -> None:
    data = load_dataset(speeches(tmp_path), BY_SPEAKER, CODEC, 0)
    assert isinstance(data.train, Rows)
    batch = collate(data.train, np.array([0]), mask_prompt=True, pad=0)
    row = data.train.row(0).tolist()
    assert batch["labels"][0].tolist() == [IGNORED, *row[1:]]
    assert data.train.labels.sum() == data.train.lengths.sum() - len(data.train)


def test_texts_stay_whole_whatever_deals_them_out(tmp_path: Path) -> None:
    for partition in ({"kind": "iid"}, {"kind": "dirichlet", "column": "speaker", "alpha": 5.0}):
        federation = Federation.model_validate({"clients": 3, "partition": partition})
        data = load_dataset(speeches(tmp_path), federation, CODEC, 0)
        assert isinstance(data.train, Rows)
        ends = [data.train.row(row)[-1] == CODEC.eos for row in range(len(data.train))]
        owners = np.empty(len(ends), int)
        for client in range(3):
            owners[data.rows_of(client)] = client
        assert all(ends[row] or owners[row] == owners[row + 1] for row in range(len(ends)))


def test_repeats_stay_but_no_text_is_both_trained_and_held_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = speeches(tmp_path)
    frame = pd.read_parquet(str(task.path))
    again = pd.concat([frame, frame, pd.DataFrame({"speaker": ["first", None], "text": [" ", "x"]})])
    again.to_parquet(str(task.path))
    with caplog.at_level(logging.WARNING):
        data = load_dataset(task, BY_SPEAKER, CODEC, 0)
    assert data.row_counts.read == 80
    assert data.row_counts.repeated > 0
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0] == "task.path: 2 of 82 rows have no text or key; dropped"
    assert "training rows left out: the same question" in messages[1]


@pytest.mark.parametrize(
    ("form", "wanted"),
    [(None, "<eos> why so <eos>"), ("<bos> $A", "<bos> why so <eos>"), ("$A <end>", "<eos> why so <end>")],
)
def test_texts_stand_between_the_tokenizer_s_own_tokens(form: str | None, wanted: str) -> None:
    from tokenizers.processors import TemplateProcessing

    made = tokenizer()
    if form is not None:
        special = [(word, made.convert_tokens_to_ids(word)) for word in ("<bos>", "<end>")]
        made.backend_tokenizer.post_processor = TemplateProcessing(single=form, special_tokens=special)
    (tokens, nothing) = hub_codec(made).documents(["why so", ""])
    assert (spell(tokens), nothing) == (wanted, [])
    assert CODEC.documents(["A", ""]) == [[1, 65 + 3, 2], []]


def test_what_does_not_go_with_plain_text(tmp_path: Path) -> None:
    task = speeches(tmp_path)
    with pytest.raises(UserError, match=r"task\.label: got 'speaker'; allowed: nothing where task\.text is set"):
        load_dataset(task.model_copy(update={"label": "speaker"}), BY_SPEAKER, CODEC, 0)
    with pytest.raises(UserError, match=r"task\.text: got 'words'; allowed: a column of the table"):
        load_dataset(task.model_copy(update={"text": "words"}), BY_SPEAKER, CODEC, 0)
    config = load_config({"task": task.model_dump(), "evaluation": {"generate_rows": 4}})
    with pytest.raises(UserError, match=r"evaluation\.generate_rows: got 4; allowed: 0 for plain text"):
        kind_of(config)
