"""Chat templates as a run trains with them and as its export keeps them: no default system text, no moving date.

The edited template takes the place of the tokenizer's own before the first row is tokenized.  Training, the run's own
generation and the exported tokenizer therefore render the same text for a user's message.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

Chat = Sequence[dict[str, str]]

_EMPTY_SYSTEM = (
    "{% if not messages or messages[0]['role'] not in ['system', 'developer'] %}"
    "{% set messages = [{'role': 'system', 'content': ''}] + messages %}{% endif %}\n"
)
"""Before a template: an empty system message where the conversation has none.  The line's end is trimmed, as
transformers sets `trim_blocks`, and keeps what `lstrip_blocks` does to the template's first line."""

_PARTS = (
    "{% set parted = namespace(messages=[]) %}{% for message in messages %}{% if message['content'] is string %}"
    "{% set parted.messages = parted.messages + [dict(message, content=[{'type': 'text', 'text': message['content']}])]"
    " %}{% else %}{% set parted.messages = parted.messages + [message] %}{% endif %}{% endfor %}"
    "{% set messages = parted.messages %}\n"
)
"""Before a template: each text as a list with one part, as templates want it whose messages may have images."""

_DATE = datetime(2024, 7, 26)
"""Today, for templates that print it: rows must not depend on the day on which a run starts.  Llama 3's templates
print this date where no clock is given."""

_CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")

_SYSTEM = {"role": "system", "content": "be brief"}
_USER, _ASSISTANT = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "so be it"}
_CHATS: tuple[Chat, ...] = ((_USER,), (_USER, _ASSISTANT), (_USER, _ASSISTANT, _USER))


def default_template(tokenizer: Any) -> str | None:
    """The template that `apply_chat_template` takes by default; None where the tokenizer has none."""
    template = getattr(tokenizer, "chat_template", None)
    found = template.get("default") if isinstance(template, dict) else template
    return None if found is None else str(found)


def set_default_template(tokenizer: Any, template: str) -> None:
    """Replace the default template; others of the tokenizer (`tool_use`, `rag`) stay."""
    others = tokenizer.chat_template
    tokenizer.chat_template = {**others, "default": template} if isinstance(others, dict) else template


def trained_template(tokenizer: Any, template: str) -> str:
    """`template` with a fixed date, and with an empty system message as the default where that is shorter; one that
    leaves out texts, because it looks for parts of messages, reads both.

    An edit that would change how any conversation is rendered, other than by the date and by the default system text,
    is left out, so the result always renders what the run trains on.
    """
    if _silent(tokenizer, template) and not _silent(tokenizer, _PARTS + template):
        template = _PARTS + template
    dated = _dated(template)
    fixed = dated if _same(tokenizer, dated, template) else template
    silent = _EMPTY_SYSTEM + fixed
    empty = [{"role": "system", "content": ""}]
    shown = rendered(tokenizer, fixed, _CHATS[0])
    hushed = rendered(tokenizer, fixed, [*empty, *_CHATS[0]])
    if hushed is None or (shown is not None and len(hushed) >= len(shown)):
        return fixed
    kept = all(
        rendered(tokenizer, silent, [*given, *chat], prompt) == rendered(tokenizer, fixed, [*meant, *chat], prompt)
        for given, meant in (([], empty), (empty, empty), ([_SYSTEM], [_SYSTEM]))
        for chat in _CHATS
        for prompt in (True, False)
    )
    return silent if kept else fixed


def rendered(tokenizer: Any, template: str, chat: Chat, prompt: bool = True) -> str | None:
    """The conversation as text; None where the template refuses it."""
    try:
        text: str = tokenizer.apply_chat_template(
            list(chat), chat_template=template, add_generation_prompt=prompt, tokenize=False
        )
    except Exception:  # a template is a stranger's program, and fails in every way that Jinja has
        return None
    return text


def _silent(tokenizer: Any, template: str) -> bool:
    """True where the template refuses a user's text, or leaves it out."""
    return _USER["content"] not in (rendered(tokenizer, template, [_USER]) or "")


def _dated(template: str) -> str:
    """The template after a definition of `strftime_now`, Jinja's clock in transformers, that always says `_DATE`."""
    if "strftime_now" not in template:
        return template
    formats = {found[1]: _DATE.strftime(found[1]) for found in _CLOCK.findall(template)}
    clock = f"{{{{- {formats!r}.get(format, {_DATE.date().isoformat()!r}) -}}}}"
    return f"{{% macro strftime_now(format) %}}{clock}{{% endmacro %}}\n{template}"


def _same(tokenizer: Any, dated: str, template: str) -> bool:
    """True where both templates render, or refuse, the same conversations."""
    return all(
        (rendered(tokenizer, dated, chat, prompt) is None) == (rendered(tokenizer, template, chat, prompt) is None)
        for given in ([], [_SYSTEM])
        for chat in ([*given, *chat] for chat in _CHATS)
        for prompt in (True, False)
    )
