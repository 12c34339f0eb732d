"""How the command ends."""

from __future__ import annotations

import atexit
import os
import signal
from typing import Any, NoReturn

import pytest

from rayfed_sub.cli import main


class Front:
    """Keeps the code that it is told."""

    def __init__(self) -> None:
        self.codes: list[int] = []

    def ended(self, code: int) -> None:
        self.codes.append(code)


@pytest.mark.parametrize(("error", "code"), [(ValueError("a fault"), 1), (KeyboardInterrupt(), 130)])
def test_fault_that_nobody_catches_is_shown_and_told(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its front would take a driver that ends without a word for one that was killed."""
    front = Front()

    def fails(elsewhere: Any) -> NoReturn:
        raise error

    def ends(code: int) -> NoReturn:
        raise SystemExit(code)

    monkeypatch.setattr(main, "front_of_this_process", lambda: front)
    monkeypatch.setattr(main, "_code", fails)
    monkeypatch.setattr(os, "_exit", ends)
    monkeypatch.setattr(atexit, "_run_exitfuncs", lambda: None)
    with pytest.raises(SystemExit) as caught:
        main.command()
    assert caught.value.code == code
    assert front.codes == [code]
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("cause", [BrokenPipeError(), None])
def test_only_a_closed_pipe_ends_the_command_in_silence(
    cause: BrokenPipeError | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with `| head`: Rich and Typer then ask the process to end, from within their handling of the error."""

    def ends(**_: Any) -> NoReturn:
        try:
            if cause is not None:
                raise cause
        except BrokenPipeError:
            raise SystemExit(1)  # noqa: B904
        raise SystemExit(1)

    monkeypatch.setattr(main, "app", ends)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    if cause is not None:
        assert main._code() == 1
    else:
        with pytest.raises(SystemExit):
            main._code()
