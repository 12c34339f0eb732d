"""Whole runs on chats and on plain text, and the answers that they leave to be looked at."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from rayfed_sub import load_config, run
from rayfed_sub.cli.run_view import Display
from rayfed_sub.config.schema import Config
from rayfed_sub.data.dataset import load_dataset
from rayfed_sub.models.tokenizers import ByteTokenizer
from rayfed_sub.planning.sampling import judged_rows
from rayfed_sub.telemetry.events import Answered, RoundDone
from tests.end_to_end.test_runs import SMALL, TINY


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of chats and of their last answers as plain text."""
    path = tmp_path_factory.mktemp("rows") / "chats.jsonl"
    chats = [
        [
            *[("user", f"Where is tool {i}?"), ("assistant", f"On shelf {i % 7}.")],
            *[("user", "Its box?"), ("assistant", f"Box {i % 5}, under it.")],
        ]
        for i in range(40)
    ]
    lines = [
        {
            "shop": "ab"[i % 2],
            "talk": [{"role": who, "content": said} for who, said in chat],
            "text": f"Tool {i}: {chat[-1][1] * 8}",
        }
        for i, chat in enumerate(chats)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def of_chats(rows: Path, *overrides: str) -> Config:
    task = f"task={{name: table, path: {rows}, messages: talk, max_length: 128, test_share: 0.2}}"
    shops = "federation.partition={kind: column, column: shop}"
    several = ["federation.clients=2", "federation.rounds=2", "evaluation.generate_rows=6", "evaluation.batch_size=4"]
    here = ["resources.workers=0", "diagnostics.every=0", "evaluation.max_new_tokens=12"]
    return load_config(TINY, [*SMALL, *here, *several, shops, task, *overrides])


def answers(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "answers.parquet")


@pytest.fixture(scope="module")
def records() -> list[Any]:
    return []


@pytest.fixture(scope="module")
def answered(rows: Path, records: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "one"
    run(of_chats(rows), folder, records.append)
    return folder


def test_answers_stand_beside_question_and_reference(answered: Path, rows: Path) -> None:
    config = of_chats(rows)
    data = load_dataset(config.task, config.federation, ByteTokenizer(), config.seed)
    chosen = judged_rows(config, len(data.held_out), 6)
    table = answers(answered)
    assert table["rounds"].tolist() == [0] * 6 + [2] * 6
    assert table["row"].tolist() == chosen * 2
    assert table["client"].tolist() == [int(data.held_out_clients[row]) for row in chosen] * 2
    before, after = table[:6].reset_index(), table[6:].reset_index()
    assert before["question"].tolist() == after["question"].tolist()
    for question, reference in zip(before["question"], before["reference"], strict=True):
        tool = int(question.removeprefix("Q: Where is tool ").partition("?")[0])
        assert question == f"Q: Where is tool {tool}?\nA: On shelf {tool % 7}.Q: Its box?\nA: "
        assert reference == f"Box {tool % 5}, under it."
    assert (before["answer"] != after["answer"]).any()
    summary = json.loads((answered / "summary.json").read_text())
    assert summary["metrics"]["held_out_loss"] < summary["metrics"]["held_out_loss_before"]


def test_resumed_run_ends_with_the_same_answers(answered: Path, rows: Path, tmp_path: Path) -> None:
    class Stop(KeyboardInterrupt):
        pass

    def stop(record: object) -> None:
        if isinstance(record, RoundDone):
            raise Stop

    with pytest.raises(Stop):
        run(of_chats(rows), tmp_path / "run", stop)
    assert answers(tmp_path / "run")["rounds"].tolist() == [0] * 6
    run(of_chats(rows), tmp_path / "run", resume=True)
    pd.testing.assert_frame_equal(answers(tmp_path / "run"), answers(answered))


def test_clients_with_models_of_their_own_answer_for_themselves(rows: Path, answered: Path, tmp_path: Path) -> None:
    run(of_chats(rows, "method={name: fedsa-lora, rank: 4}"), tmp_path / "run")
    table = answers(tmp_path / "run")
    keys = ["rounds", "row", "client", "question", "reference"]
    pd.testing.assert_frame_equal(table[keys], answers(answered)[keys])


def test_terminal_shows_a_few_answers_those_that_changed_first(answered: Path, records: list[Any]) -> None:
    (found,) = [record for record in records if isinstance(record, Answered)]
    console = Console(file=io.StringIO(), width=200)
    Display(console).show(found)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count("question  ") == shown.count("reference  ") == 3
    changed = {row.row for row in found.answers if row.rounds == 0} - {
        row.row
        for row in found.answers
        if row.rounds == 2 and row.answer == next(one.answer for one in found.answers if one.row == row.row)
    }
    first = min(changed)
    reference = next(row.reference for row in found.answers if row.row == first)
    assert f"reference  {reference}" in shown.split("\n\n")[0]
    assert "Its box? A:" in shown


def test_run_without_generation_has_no_answers(rows: Path, tmp_path: Path) -> None:
    config = of_chats(rows, "evaluation.generate_rows=0", "federation.rounds=1")
    records: list[object] = []
    run(config, tmp_path / "run", records.append)
    assert not (tmp_path / "run" / "answers.parquet").exists()
    assert not any(isinstance(record, Answered) for record in records)


def test_plain_text_is_learned(rows: Path, tmp_path: Path) -> None:
    task = f"task={{name: table, path: {rows}, text: text, max_length: 64, test_share: 0.2}}"
    summary = run(of_chats(rows, task, "evaluation.generate_rows=0"), tmp_path / "run")
    assert summary.metrics["held_out_loss"] < summary.metrics["held_out_loss_before"] - 0.1
    assert 0 < summary.metrics["token_accuracy"] < 1
    assert summary.rows["chunks"] > summary.rows["train"] + summary.rows["held_out"]
