"""A row of the caller's own as a pickle, which `objects.py` reads again."""

from __future__ import annotations

import io
from typing import Any

import cloudpickle
import torch
from torch import Tensor

from rayfed_sub.core.arrays import Packed, packed, unpacked


def pickled(row: Any) -> bytes:
    """A row's pickle; functions and classes of a script or notebook go into it by value.  Raises whatever pickling
    raises."""
    file = io.BytesIO()
    _Pickler(file).dump(row)
    return file.getvalue()


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle has no types
    """Pickles tensors as arrays: torch takes the whole memory that a view is a part of, and milliseconds."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is Tensor and obj.layout == torch.strided and not obj.is_quantized:
            return _tensor, (packed({"": obj}),)
        return super().reducer_override(obj)


def _tensor(arrays: Packed) -> Tensor:
    return unpacked(arrays)[""]
