"""Which state of the code a run has."""

from __future__ import annotations

import subprocess
from pathlib import Path

from rayfed_sub.telemetry.environment import commit_of


def test_commit_of_a_checkout_and_of_no_folder_within_one(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        who = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.org")
        return subprocess.run(["git", *who, *words], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    (tmp_path / "within").mkdir()
    (tmp_path / "table.csv").write_text("one")
    (tmp_path / "within" / "code.py").write_text("one")
    assert commit_of(tmp_path) is None
    git("init", "-q")
    git("add", "table.csv", "within/code.py")
    git("commit", "-q", "-m", "first")
    commit_of.cache_clear()
    commit = git("rev-parse", "--short=8", "HEAD").strip()
    assert commit_of(tmp_path) == commit
    assert commit_of(tmp_path / "within") is None  # as an environment in somebody's own checkout
    (tmp_path / "table.csv").write_text("two")
    commit_of.cache_clear()
    assert commit_of(tmp_path) == commit  # a study's tables, which it rewrites while it runs
    (tmp_path / "within" / "code.py").write_text("two")
    commit_of.cache_clear()
    assert commit_of(tmp_path) == f"{commit}.changed"
