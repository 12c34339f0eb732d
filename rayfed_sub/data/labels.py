"""Labels of a table's rows: which problem they pose (one class, a number, several labels), in one canonical form, and
the groups by which they deal out rows.

A label is text all the way to the tokenizer: the name of a class, a number as Python writes a float, or the JSON list
of a row's labels in the order of their numbers; "" where a row has none.
"""

from __future__ import annotations

import ast
import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayfed_sub.config.schema import Problem, Task
from rayfed_sub.core.errors import UserError
from rayfed_sub.data.columns import Labels
from rayfed_sub.data.readers import MARK, NoTextError, as_text
from rayfed_sub.data.tables import Table, canonical_classes, class_names, of_named_classes

log = logging.getLogger(__name__)

BINS = 10
"""Quantile bins of a number by which rows are dealt out."""
NOBODY = "none of the labels"
"""The group of rows with an empty list of labels."""

_FIELD = "task.label"
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_MISSING = {"-1", "-1.0"}
_TRUTHS = {"0": 0, "1": 1, "false": 0, "true": 1}

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class LabelColumn:
    """problem; labels: each row's, in canonical form; names: of the classes in the order of their numbers, none of a
    regression."""

    problem: Problem
    labels: Labels
    names: tuple[str, ...]

    def groups(self, trained: NDArray[np.bool_]) -> Labels:
        """The group of each row by which rows are dealt out, "" where it has no label: its class; the quantile bin of
        its number, of BINS; or of its labels the rarest one.  trained (rows,): the rows that are counted."""
        if self.problem == "classification":
            return self.labels
        used = Labels(self.labels.names, self.labels.numbers[trained]).counts
        return self.labels.renamed(list(_groups(self, used)))


def read_labels(table: Table, task: Task, splits: Labels, known: Sequence[str] = ()) -> LabelColumn:
    """The labels of the rows, as task.label and task.problem ask for them.  splits: of each row.

    known: names of classes that the column has numbers of.  What the cells say is said in a warning where task.problem
    is null and they are no classes.  -1 is no label where it cannot be one (`_labelled`).  Raises UserError
    (task.label, task.problem) for cells that do not fit the problem, or not each other.
    """
    if len(task.labels) > 1:
        return _of_columns(table, task)
    (column,) = task.labels
    texts = Labels.of(table.labels(_FIELD, column))
    forms = {name: _form(name) for name in texts.used if name}
    problem = task.problem or _detected(table, column, forms)
    texts = _labelled(texts, splits, problem)
    forms = {name: forms[name] for name in texts.used if name}
    if problem == "classification":
        _check(table, task, forms, lambda name: not name.startswith(MARK), "text, whole numbers, true or false")
        labels = canonical_classes(texts)
        labels = _named(labels, known)
        return LabelColumn(problem, labels, class_names(labels.used))
    if problem == "regression":
        _check(table, task, forms, lambda name: forms[name] != "list" and _finite(name), "finite numbers")
        numbers = [repr(_number(name)) if name else "" for name in texts.names]
        found = LabelColumn(problem, texts.renamed(numbers), ())
    else:
        allowed = 'lists of labels, such as ["joy", "anger"], [0, 3] or [1, 0, 0, 1]'
        _check(table, task, forms, lambda name: forms[name] == "list" and "" not in _listed(name), allowed)
        found = _several({name: _listed(name) for name in forms}, texts)
    if task.problem is None:
        what = "numbers with a fraction" if problem == "regression" else f"lists of {len(found.names)} labels"
        log.warning("task.label: %s holds %s: task.problem=%s", column, what, problem)
    return found


def untrained(found: LabelColumn, trained: NDArray[np.bool_]) -> list[str]:
    """The classes, or labels, that none of the rows `trained`, (rows,), has."""
    if not found.names:
        return []
    used = [name for name in found.labels.take(np.flatnonzero(trained)).used if name]
    there = {label for name in used for label in (json.loads(name) if found.problem == "multi-label" else [name])}
    return [name for name in found.names if name not in there]


def _labelled(texts: Labels, splits: Labels, problem: Problem) -> Labels:
    """The labels, "" in place of -1, or of a list of nothing else, where that says that there is none, as in GLUE's
    test rows: where no training row has it and all other labels are numbers from 0 on; of a regression, whose
    numbers are any, where official splits have nothing else and no other number is below 0."""
    if not any("-1" in name for name in texts.used):
        return texts
    lists = {name: _listed(name) for name in texts.used if name}
    parts = {name: [name.removeprefix(MARK)] if own is None else own for name, own in lists.items()}
    missing = {name for name, own in parts.items() if own and set(own) <= _MISSING}
    rest = [one for name in parts.keys() - missing for one in parts[name]]
    if not missing or any(not _finite(one) or _number(one) < 0 for one in rest):
        return texts
    by_split = {split: set(texts.take(np.flatnonzero(splits.are(split))).used) - {""} for split in splits.used}
    mixed = by_split.get("train", set())
    if problem == "regression":
        mixed = mixed.union(*(own for own in by_split.values() if not own <= missing))
    if missing & mixed:
        return texts
    return texts.renamed(["" if name in missing else name for name in texts.names])


def targets(problem: str, answers: Sequence[str], names: Sequence[str]) -> NDArray[Any]:
    """What the loss is computed from: int64 (rows,) numbers of classes, float32 (rows, 1) numbers, or float32
    (rows, labels) of 0 and 1.

    >>> targets("multi-label", ['["b"]', "[]"], ["a", "b"]).tolist(), targets("regression", ["0.5"], []).tolist()
    ([[0.0, 1.0], [0.0, 0.0]], [[0.5]])
    """
    number = {name: index for index, name in enumerate(names)}
    if problem == "regression":
        return np.fromiter(map(float, answers), np.float32, len(answers))[:, None]
    if problem == "multi-label":
        found = np.zeros((len(answers), len(names)), np.float32)
        for row, answer in enumerate(answers):
            found[row, [number[name] for name in json.loads(answer)]] = 1
        return found
    return np.fromiter((number[answer] for answer in answers), np.int64, len(answers))


def bins(values: Sequence[float], counted: Sequence[float]) -> list[str]:
    """The quantile bin of each value as text; counted: the values of which the quantiles are taken.

    >>> bins([0.0, 1.0, 2.0], [0.0, 0.0, 1.0, 2.0])[::2]
    ['0 to 0.2', '1.7 to 2']
    """
    edges = np.unique(np.quantile(counted, np.linspace(0, 1, BINS + 1)))
    # Years and time stamps differ behind the fourth digit; 17 tell all floats apart.
    written = ([f"{edge:.{digits}g}" for edge in edges] for digits in range(4, 18))
    names = next(names for names in written if len(set(names)) == len(edges))
    if len(edges) == 1:
        return names * len(values)
    at = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    return [f"{names[i]} to {names[i + 1]}" for i in at]


def _groups(found: LabelColumn, used: dict[str, int]) -> Iterator[str]:
    """The group of each different label.  used: numbers of rows by label."""
    labels = found.labels.names
    if found.problem == "regression":
        counted = [float(name) for name, rows in used.items() if name for _ in range(rows)]
        numbers = [float(name) for name in labels if name]
        groups = iter(bins(numbers, counted or numbers or [0.0]))
        yield from (next(groups) if name else "" for name in labels)
        return
    rows_of = dict.fromkeys(found.names, 0)
    for name, rows in used.items():
        for label in json.loads(name) if name else ():
            rows_of[label] += rows
    for name in labels:
        own = json.loads(name) if name else ()
        yield min(own, key=lambda label: rows_of[label], default=NOBODY) if name else ""


def _of_columns(table: Table, task: Task) -> LabelColumn:
    """Labels from several columns of 0 and 1; a row lacks its label where one of them is empty."""
    names, problem = task.labels, task.problem or "multi-label"
    if problem != "multi-label":
        allowed = "multi-label where task.label has several columns"
        raise UserError("task.problem", task.problem, allowed, "remove it, or name one column in task.label")
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(_FIELD, list(names), f"each column once; {twice[0]} stands there twice", "leave it out")
    columns = [canonical_classes(table.labels(_FIELD, name)) for name in names]
    for name, column in zip(names, columns, strict=True):
        if strange := [cell for cell in column.used if cell and cell.lower() not in _TRUTHS]:
            place = next(place for place, cell in zip(table.places(), column, strict=True) if cell == strange[0])
            allowed = f"columns of 0 and 1, or true and false, one for each label; {place} holds {_shown(strange[0])}"
            raise UserError(_FIELD, name, allowed, "correct it, or leave the column out")
    rows = zip(*([None if not cell else _TRUTHS[cell.lower()] for cell in column] for column in columns), strict=True)
    said = ("" if None in row else _told(names, row) for row in rows)
    found = LabelColumn("multi-label", Labels.of(said), names)
    if task.problem is None:
        log.warning("task.label: several columns of 0 and 1: task.problem=multi-label")
    return found


def _told(names: Sequence[str], row: Sequence[Any]) -> str:
    return json.dumps([name for name, there in zip(names, row, strict=True) if there])


def _several(lists: dict[str, list[str]], texts: Labels) -> LabelColumn:
    """Labels from lists: names or numbers of labels, or 0 and 1 for each label."""
    lengths, held = {len(own) for own in lists.values()}, {one for own in lists.values() for one in own}
    if len(lengths) == 1 and min(lengths) > 1 and {one.lower() for one in held} <= _TRUTHS.keys():
        names = tuple(map(str, range(min(lengths))))
        on = {text: [_TRUTHS[one.lower()] for one in own] for text, own in lists.items()}
        sets = {text: [name for name, there in zip(names, own, strict=True) if there] for text, own in on.items()}
    else:
        names = class_names(sorted(held))
        order = {name: at for at, name in enumerate(names)}
        sets = {text: sorted(set(own), key=order.__getitem__) for text, own in lists.items()}
    told = [json.dumps(sets[text]) if text else "" for text in texts.names]
    return LabelColumn("multi-label", texts.renamed(told), names)


def _form(text: str) -> str:
    """list, fraction, number or text: what a cell looks like."""
    if _listed(text) is not None:
        return "list"
    if text.startswith(MARK):
        return "fraction"
    if not _finite(text):
        return "text"
    return "number" if _number(text) == int(_number(text)) else "fraction"


def _finite(text: str) -> bool:
    return bool(_NUMBER.fullmatch(text.removeprefix(MARK))) and math.isfinite(_number(text))


def _number(text: str) -> float:
    return float(text.removeprefix(MARK))


def _listed(text: str) -> Any:
    """The texts of a list; None where the cell is none.  Files of text have lists as JSON or as Python writes them."""
    bare = text.removeprefix(MARK)
    if not (bare.startswith("[") and bare.endswith("]")):
        return None
    try:
        found = json.loads(bare)
    except (ValueError, RecursionError):
        try:
            found = ast.literal_eval(bare)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # as it documents them
            return None
    try:
        texts = [as_text(one) for one in found]
        "".join(texts).encode()  # halves of surrogate pairs are no text
    except (NoTextError, UnicodeEncodeError):
        return None
    return texts


def _detected(table: Table, column: str, forms: dict[str, str]) -> Problem:
    """The problem that the cells leave no doubt about.  Names of classes may look like anything."""
    if of_named_classes(table, column):
        return "classification"
    found = set(forms.values())
    if found == {"list"}:
        return "multi-label"
    if "fraction" in found and found <= {"fraction", "number"}:
        return "regression"
    # What only looks like a number or a list may be the name of a class; numbers and lists of a typed file are none.
    marked = [name for name in forms if name.startswith(MARK)]
    if marked:
        alike = ("fraction", "number") if forms[marked[0]] == "fraction" else ("list",)
        other = next(name for name in forms if forms[name] not in alike)
        first, second = (_place(table, column, name) for name in (marked[0], other))
        allowed = (
            "one kind of labels, names or whole numbers (classes), numbers (regression) or lists (multi-label); "
            f"{first} holds {_shown(marked[0])}, {second} {_shown(other)}"
        )
        raise UserError(_FIELD, column, allowed, "correct the column")
    return "classification"


def _check(table: Table, task: Task, forms: dict[str, str], fits: Callable[[str], bool], allowed: str) -> None:
    """UserError for the first label that does not fit the problem."""
    (column,) = task.labels
    if strange := next((name for name in forms if not fits(name)), None):
        held = f"a column of {allowed} with task.problem={task.problem or 'null'}"
        where = f"{_place(table, column, strange)} holds {_shown(strange)}"
        other = {"list": "multi-label", "fraction": "regression"}.get(forms[strange], "classification")
        advice = f"correct it, or set task.problem={other}" if other != task.problem else "correct it"
        raise UserError(_FIELD, column, f"{held}; {where}", advice)


def _place(table: Table, column: str, label: str) -> str:
    cells = zip(table.places(), table.labels(_FIELD, column), strict=True)
    return str(next(place for place, cell in cells if cell == label))


def _shown(label: str) -> str:
    bare = label.removeprefix(MARK)
    shown = bare if len(bare) <= 40 else f"{bare[:40]}..."
    return f"the list {shown}" if bare.startswith("[") else f"the number {shown}" if _finite(label) else repr(shown)


def _named(labels: Labels, names: Sequence[str]) -> Labels:
    """Labels that are numbers of `names` as these names, where all are."""
    numbers = all(label.isdecimal() and int(label) < len(names) for label in labels.used if label)
    return labels.renamed([names[int(name)] if name else "" for name in labels.names]) if numbers and names else labels
