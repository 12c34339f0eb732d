"""Documents as rendered by a browser."""

from __future__ import annotations

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
VOID = {"meta", "link", "input", "br"}


class Outline(HTMLParser):
    """The elements of a document, each with its attributes and text; wrong nesting is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def browse(path: Path, *options: str) -> tuple[str, list[str]]:
    """The document after 20 s of Chromium's virtual time, and its console output."""
    done = _chromium(path, "--virtual-time-budget=20000", "--enable-logging=stderr", *options)
    # Messages about drawing without a graphics card are no error of the page.
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line and "GL Driver Message" not in line]
    return done.stdout, console


def in_real_time(path: Path) -> str:
    """The document once it is loaded."""
    return _chromium(path).stdout


def _chromium(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    profile = f"--user-data-dir={path.parent / 'profile'}"
    return subprocess.run(
        [
            *(CHROMIUM, "--headless=new", "--no-sandbox", "--enable-unsafe-swiftshader", profile),
            *(*options, "--dump-dom", path.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
