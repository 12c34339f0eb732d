"""Chats: from cells of a table to rows of tokens, cuts between turns, and what is refused."""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from rayfed_sub.config.schema import Federation, Task
from rayfed_sub.core.errors import UserError
from rayfed_sub.data.assignment import Assignment
from rayfed_sub.data.batching import IGNORED, collate
from rayfed_sub.data.chats import Chat, ChatError, Turn, beginnings, read_chats
from rayfed_sub.data.dataset import build_dataset, load_dataset, load_pairs, too_long
from rayfed_sub.data.fingerprint import fingerprint, hashes, of_rows
from rayfed_sub.data.pairs import Pairs
from rayfed_sub.data.readers import Place
from rayfed_sub.data.rows import Rows
from rayfed_sub.data.splits import Splits
from rayfed_sub.data.tokenization import Cuts, tokenised
from rayfed_sub.models.tokenizers import ByteTokenizer

CODEC = ByteTokenizer()
ONE = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
IID = Federation.model_validate({"clients": 2, "partition": {"kind": "iid"}})


def chats(*turns: str) -> Pairs:
    """One chat a text: letters before a space are said by turns, the user first."""
    made = [
        Chat(
            Place("c", row),
            tuple((("user", "assistant")[number % 2], text) for number, text in enumerate(said.split(), 0)),
        )
        for row, said in enumerate(turns, 1)
    ]
    return Pairs(
        "causal-lm", tuple(chat.history for chat in made), ("",) * len(made), ("",) * len(made), chats=tuple(made)
    )


def read(cells: Sequence[Any]) -> list[Chat | None]:
    return list(read_chats("c", cells, (Place("c", row) for row in range(1, len(cells) + 1))))


def learned(rows: Rows, row: int) -> list[str]:
    """The learned runs of a row as text."""
    mask, tokens = rows.answered(row), rows.row(row)
    cuts = np.flatnonzero(np.diff(mask.astype(int))) + 1
    parts = zip(np.split(tokens, cuts), np.split(mask, cuts), strict=True)
    return [CODEC.decode(part.tolist()) + "." * int(part[-1] == CODEC.eos) for part, one in parts if one[0]]


def test_forms_of_a_chat_are_read_alike() -> None:
    shared = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "\n So. "}]
    mixed = [{**message, "role": None, "content": None, "weight": 0.5} for message in shared]
    columns = {"role": ["user", "assistant"], "content": ["Why?", "So."]}
    cells = [ONE, tuple(ONE), json.dumps(ONE), shared, mixed, columns, json.dumps(shared, indent=1)]
    assert {chat.turns for chat in read(cells) if chat} == {(("user", "Why?"), ("assistant", "So."))}
    assert read([None, "", "  ", [], float("nan"), ONE[:1]]) == [None] * 6
    told = [{"role": "developer", "content": ""}, *ONE]
    turns = (("system", ""), ("user", "Why?"), ("assistant", "So."))
    assert read([told])[0] == Chat(Place("c", 1), turns)


def test_turns_after_the_last_answer_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = read([[*ONE, ONE[0]], ONE, [*ONE, ONE[0], ONE[0]], [ONE[0]]])
    assert [len(chat.turns) if chat else None for chat in found] == [2, 2, 2, None]
    (record,) = caplog.records
    expected = "task.messages: 2 of 4 chats go on after their last answer; those turns are left out"
    assert record.getMessage() == expected


@pytest.mark.parametrize(
    ("cell", "wrong"),
    [
        ("so it is", "the text is no JSON list of messages"),
        ('{"role": "user"}', "a mapping, not a list of messages"),
        (7, "a number, not a list of messages"),
        (["Why?", "So."], "message 1 is a text, not a mapping"),
        ([{"text": "Why?"}], "message 1 has no role: neither role and content nor from and value, but text"),
        ([{}], "message 1 has no role"),
        ([*ONE, {"role": "tool", "content": "4"}], "message 3 has the role 'tool'"),
        ([{"role": ["user"], "content": "Why?"}], "message 1 has the role ['user']"),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 1 (user) has a list in place of a text"),
        ([{"role": "user", "content": {"text": "Why?"}}], "message 1 (user) has a mapping in place of a text"),
        ('[{"role": "user", "content": "\\ud800"}]', "message 1 (user) holds half of a surrogate pair"),
        ([{"role": "user", "content": 4}], "message 1 (user) has a number in place of a text"),
        ([ONE[0], {"role": "assistant", "content": None}], "message 2 (assistant) has nothing in place of a text"),
        ([ONE[0], {"role": "assistant", "content": " \n"}], "message 2 (assistant) is empty"),
        ([{"from": "human", "value": ""}], "message 1 (human) is empty"),
        ([{"role": "system", "content": "a"}, {"role": "system", "content": "b"}, *ONE], "message 2 is another system"),
        ([*ONE, {"role": "system", "content": "b"}], "message 3 is another system text, or stands after"),
    ],
)
def test_bad_chat_is_one_line_with_column_row_and_fault(cell: Any, wrong: str) -> None:
    with pytest.raises(UserError) as caught:
        list(read_chats("talk", [ONE, cell], [Place("a.jsonl", 7), Place("b.jsonl", 1)]))
    line = str(caught.value)
    assert line.startswith("task.messages: got 'talk'; allowed: lists of {role, content}")
    assert f"; row 1 of b.jsonl: {wrong}" in line
    assert "\n" not in line


def test_every_answer_is_learned_and_nothing_else() -> None:
    rows, _, cuts = tokenised(chats("q a r bc", "s d"), CODEC, 64)
    assert isinstance(rows, Rows)
    assert (learned(rows, 0), learned(rows, 1)) == (["a.", "bc."], ["d."])
    assert CODEC.decode(rows.row(0)[: rows.prompts[0]].tolist()) == "Q: q\nA: aQ: r\nA: "
    assert (rows.labels.tolist(), cuts) == ([2 + 3, 2], Cuts())
    batch = collate(rows, np.array([1, 0]), mask_prompt=True, pad=0)
    labels = np.where(rows.answered(0), rows.row(0), IGNORED).tolist()
    assert batch["labels"][1].tolist() == labels
    assert batch["labels"][0].tolist()[: rows.lengths[1]] == np.where(rows.answered(1), rows.row(1), IGNORED).tolist()
    whole = collate(rows, np.array([0]), mask_prompt=False, pad=0)
    assert whole["labels"][0].tolist() == rows.row(0).tolist()
    taken = rows.take(np.array([1, 0]))
    assert (learned(taken, 1), learned(taken, 0)) == (["a.", "bc."], ["d."])


def test_mask_is_part_of_a_chat_s_digest() -> None:
    rows, _, _ = tokenised(chats("q a r b", "s d"), CODEC, 64)
    assert isinstance(rows, Rows)
    last = np.arange(len(rows.tokens)) >= rows.begins.repeat(rows.lengths) + rows.prompts.repeat(rows.lengths)
    other = replace(rows, learned=last)
    parts = Splits(*(np.arange(2) for _ in range(4)))
    one, two = (
        fingerprint(of_rows(made, hashes(made), ()), hashes(made), parts, (), Assignment.of([]), np.arange(0))
        for made in (rows, other)
    )
    assert one.rows != two.rows


def test_long_chat_ends_with_an_earlier_answer() -> None:
    """ "Q: q\\nA: a" with bos and eos takes 11 tokens, a further question and answer 10."""
    rows, _, cuts = tokenised(chats("q a r b s c t d", "q a r b s c", "q a"), CODEC, 31)
    assert isinstance(rows, Rows)
    assert [learned(rows, row) for row in range(3)] == [["a.", "b.", "c."], ["a.", "b.", "c."], ["a."]]
    assert cuts == Cuts(cut=1, turns=1)
    rows, _, _ = tokenised(chats("q a r b s c t d"), CODEC, 30)
    assert isinstance(rows, Rows)
    assert learned(rows, 0) == ["a.", "b."]


def test_long_first_exchange_is_cut_as_prompt_and_answer_are() -> None:
    rows, kept, cuts = tokenised(chats("0123456789 uvwxyz r b", "0123456789abc u", "q " + "a" * 40), CODEC, 20)
    assert isinstance(rows, Rows)
    plain = Pairs("causal-lm", ("0123456789", "0123456789abc", "q"), ("uvwxyz", "u", "a" * 40), ("",) * 3)
    wanted, _, _ = tokenised(plain, CODEC, 20)
    assert isinstance(wanted, Rows)
    assert rows.tokens.tolist() == wanted.tokens.tolist()
    assert rows.prompts.tolist() == wanted.prompts.tolist()
    assert rows.labels.tolist() == wanted.labels.tolist()
    assert cuts == Cuts(cut=3, prompts=2, answers=1, turns=1)
    assert kept.tolist() == [0, 1, 2]
    none, _, cuts = tokenised(chats("q " + "a" * 40), CODEC, 15)
    assert (len(none), cuts) == (0, Cuts(dropped=1, least=18))  # bos and "Q: q\nA: " are 9, and half a row


def tools(tmp_path: Path, suffix: str) -> Task:
    """The chats of a shop: 60 of them, two turns each, in a file of this type."""
    rows = [
        {
            "shop": "ab"[i % 2],
            "talk": [
                {"role": "system", "content": "You keep the tools."},
                {"role": "user", "content": f"Where is tool {i}?"},
                {"role": "assistant", "content": f"On shelf {i % 7}."},
                {"role": "user", "content": "And its box?"},
                {"role": "assistant", "content": f"Box {i % 5}, under it."},
            ],
        }
        for i in range(60)
    ]
    path = tmp_path / f"rows{suffix}"
    frame = pd.DataFrame(rows)
    if suffix == ".csv":
        frame.assign(talk=frame["talk"].map(json.dumps)).to_csv(path, index=False)
    elif suffix == ".parquet":
        frame.to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Task(name="table", path=str(path), messages="talk", max_length=150)


def test_files_of_any_type_give_the_same_rows(tmp_path: Path) -> None:
    by_shop = Federation.model_validate({"clients": 2, "partition": {"kind": "column", "column": "shop"}})
    made = [load_dataset(tools(tmp_path, suffix), by_shop, CODEC, 0) for suffix in (".jsonl", ".csv", ".parquet")]
    assert len({one.fingerprint for one in made}) == 1
    assert made[0].client_names == ("a", "b")
    assert (len(made[0].train), len(made[0].held_out)) == (54, 6)
    assert isinstance(made[0].train, Rows)
    assert all(len(learned(made[0].train, row)) == 2 for row in range(54))


def test_chats_ask_the_same_where_the_history_of_the_last_answer_is_the_same() -> None:
    first = [*ONE, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "No."}]
    other = [*first[:3], {"role": "assistant", "content": "Yes."}]
    questions = [chat.history for chat in read([first, other, ONE]) if chat]
    assert questions[0] == questions[1] != questions[2]


def test_chats_that_begin_alike_are_in_one_split() -> None:
    """Of 12 chats and their 12 longer forms half are held out; what is trained on begins with none of these, nor they
    with it.  A greeting that nobody asked for keeps nothing apart."""
    firsts = [f"q{i} a{i}" for i in range(12)]
    task = Task(name="table", path="-", messages="m", test_share=0.5)
    data = build_dataset(chats(*firsts, *(f"{first} r{i} b{i}" for i, first in enumerate(firsts))), task, IID, CODEC, 0)
    assert isinstance(data.train, Rows)
    assert isinstance(data.held_out, Rows)
    trained, judged = (
        {CODEC.decode(rows.row(row).tolist()).split("A: ")[0] for row in range(len(rows))}
        for rows in (data.train, data.held_out)
    )
    assert (len(data.held_out), len(data.train) + data.row_counts.repeated) == (12, 12)
    assert trained
    assert not trained & judged
    greeted = [(("assistant", "hi"),), (("assistant", "hi"), ("user", "q"), ("assistant", "a"))]
    one, other = beginnings(Chat(Place("c", 1), turns) for turns in greeted)
    assert one != other


def test_repeated_and_empty_chats_are_dropped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = tools(tmp_path, ".jsonl")
    lines = Path(str(task.path)).read_text().splitlines()
    Path(str(task.path)).write_text("\n".join([*lines, lines[3], '{"shop": "a"}', '{"shop": "b", "talk": []}']))
    with caplog.at_level(logging.WARNING):
        assert len(load_pairs(task, IID)) == 60
    assert [record.getMessage() for record in caplog.records] == [
        "task.path: 2 of 63 rows have no answer or key; dropped",
        "1 of 61 rows have the history and answer of a row before them; dropped",
    ]
    Path(str(task.path)).write_text('{"talk": null}')
    with pytest.raises(UserError, match=r"task\.path: .*chats that hold an answer; check task\.messages"):
        load_pairs(task, IID)


class Strict(ByteTokenizer):
    """Renders no chat whose first text begins with "no", and none of more than one question that ends early."""

    def chats(self, chats: Sequence[Sequence[Turn]]) -> list[tuple[list[int], list[bool]]]:
        for index, turns in enumerate(chats):
            if turns[0][1].startswith("no") or (turns[0][1] == "half" and len(turns) == 4):
                raise ChatError(index, "the template says: not this one")
        return super().chats(chats)


@pytest.mark.parametrize(("turns", "most"), [("no b", 64), ("half b c d e f", 30)])
def test_chat_that_a_template_refuses_is_named_by_its_row(turns: str, most: int) -> None:
    """Its row in its file, whichever rows were left out before."""
    pairs = chats("a b", "c d", turns, "e f").take(np.array([1, 2, 3]))
    with pytest.raises(UserError) as caught:
        tokenised(pairs, Strict(), most)
    assert str(caught.value).startswith(
        "task.messages: got 'row 3 of c'; allowed: chats that the model's chat template"
    )
    assert str(caught.value).endswith("; the template says: not this one")


def test_cut_chats_are_counted_in_words(tmp_path: Path) -> None:
    data = load_dataset(tools(tmp_path, ".jsonl").model_copy(update={"max_length": 80}), IID, CODEC, 0)
    assert (data.row_counts.cut, data.row_counts.cut_turns) == (60, 60)
    assert too_long({"cut": 60, "cut_turns": 60}) == "60 cut (60 after an earlier answer)"


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"prompt": "{talk}"}, r"task\.prompt: .*nothing where task\.messages is set"),
        ({"label": "shop"}, r"task\.label: .*nothing where task\.messages is set"),
        ({"messages": "chat"}, r"task\.messages: got 'chat'; allowed: a column of the table: shop, talk"),
        ({"messages": "shop"}, r"task\.messages: got 'shop'; .*; row 1 of rows.jsonl: the text is no JSON"),
    ],
)
def test_settings_that_do_not_go_with_chats(more: dict[str, str], line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=line):
        load_pairs(tools(tmp_path, ".jsonl").model_copy(update=more), IID)
    with pytest.raises(UserError, match=r"task\.name: got 'medquad'; allowed: table where task\.messages is set"):
        load_pairs(Task(name="medquad", messages="talk"), IID)
