"""Files that are there as a whole, or as they were."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rayfed_sub.core.errors import RunError
from rayfed_sub.storage import atomic_files


def test_tensors_that_do_not_fit_leave_the_old_file_and_one_line_names_it(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk."""
    file, small = tmp_path / "x.safetensors", {"a": torch.arange(6).reshape(2, 3).T}
    atomic_files.write_tensors(file, small, {"round": "3"})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(RunError, match=rf"^writing files: {re.escape(str(file))}: ."):
            atomic_files.write_tensors(file, {"a": torch.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert torch.equal(load_file(file)["a"], small["a"])
