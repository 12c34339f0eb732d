"""Named tasks: their sources, columns and licences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rayfed_sub.config.schema import GIVEN, Task
from rayfed_sub.core.errors import UserError

_OWN = ("prompt", "answer", "label", "image")
"""Fields of `Task` that a named task fills in itself."""
_TABLES = ("messages", "text")
"""Fields of `Task` for tables alone."""


@dataclass(frozen=True)
class NamedTask:
    """A named task in the terms of a `table` task.  hub: the data set's id on the Hugging Face hub; key: the column
    that deals out the rows where the configuration names none; renames: columns that the hub's copy calls otherwise
    (its name -> ours); class_names: of a column of numbers that comes without names; tidy: runs of white space in texts
    become one space."""

    hub: str
    what: str
    licence: str
    key: str
    prompt: str | None = None
    answer: str | None = None
    label: str | None = None
    image: str | None = None
    renames: Mapping[str, str] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    tidy: bool = False


TASKS = {
    "medquad": NamedTask(
        hub="lavita/MedQuAD",
        what="medical questions, answered by pages of the US National Institutes of Health, keyed by source",
        licence="CC BY 4.0",
        key="source",
        prompt="{question}",
        answer="answer",
        renames={"document_source": "source", "question_focus": "focus"},
        tidy=True,
    ),
    "dolly-15k": NamedTask(
        hub="databricks/databricks-dolly-15k",
        what="instructions with and without a context, answered by people, keyed by category",
        licence="CC BY-SA 3.0",
        key="category",
        prompt="{instruction}\n\n{context}",  # the ends of a prompt are stripped, so that no context leaves no trace
        answer="response",
    ),
    "brain-tumor": NamedTask(
        hub="Hemg/Brain-Tumor-MRI-Dataset",
        what="MRI slices of the head: three kinds of tumour or none, keyed by class",
        licence="CC0, as its mirrors say",
        key="label",
        image="image",
        label="label",
        class_names=("glioma", "meningioma", "notumor", "pituitary"),
    ),
}


def filled(task: Task) -> Task:
    """`task` with the source and columns that its name stands for; a `table`, and rows that a Python call hands over,
    come back as they are.

    Raises UserError (task.name) where the person names columns of a task that has its own.

    >>> task = filled(Task(name="medquad"))
    >>> task.path, task.prompt, task.answer
    ('lavita/MedQuAD', '{question}', 'answer')
    """
    if task.name in ("table", GIVEN):
        return task
    known = TASKS.get(task.name)
    for name in (
        (*_OWN, *_TABLES) if known else ("path", "train", "validation", "test", "split_column", *_OWN, *_TABLES)
    ):
        if getattr(task, name) is not None:
            advice = f"set task.name=table or remove task.{name}"
            raise UserError("task.name", task.name, f"table where task.{name} is set", advice)
    if known is None:
        return task
    fixed = {name: getattr(known, name) for name in _OWN}
    return task.model_copy(update={"path": task.path or known.hub, **fixed})
