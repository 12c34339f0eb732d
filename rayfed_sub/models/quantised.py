"""Frozen weights of fewer bits: packed bytes that are dequantised when they are used, and by which form.

A quantised parameter is several tensors, its parts, whose names say what they are: `<parameter>/<form>/<type>/<part>`,
where type is that of the model's other weights, to which a dense weight is rounded.  They travel with the model's other
tensors and lie in shared memory once per node; the dense weight of a layer exists while the layer is multiplied,
forward and back, for all clients of a pack.

`int8` has a scale for each row, as bitsandbytes' LLM.int8().  `nf4` and `fp4` are bitsandbytes' 4-bit types in blocks
of 64 numbers, whose scales may be quantised in turn (`-double`); bitsandbytes itself dequantises them.  `q4_0`, `q4_1`
and `q8_0` are GGUF's types in blocks of 32 numbers of a row, with their codes by themselves and in the order in which
halves of a row come out side by side.

Legend: m outputs, n inputs, b blocks of a row, B blocks of all rows, R rows that are asked for.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rayfed_sub.core.types import Tensors

BLOCK, OUTER, GGUF_BLOCK = 64, 256, 32
"""Numbers of a block of bitsandbytes' 4-bit types, blocks of a block of quantised scales, numbers of a GGUF block."""
_INVERSE_127 = 7.874015718698502e-3  # as bitsandbytes has it

Sizes = dict[str, tuple[tuple[int, int], torch.dtype]]


@dataclass(frozen=True)
class Form:
    """sizes: shape and type of the parts of a weight (m, n); dequantised: the float32 weight of its parts; per_code:
    numbers in a byte; block: n is a multiple of it; by_row: whether rows of the parts are rows of the weight."""

    sizes: Callable[[int, int], Sizes]
    dequantised: Callable[[Tensors], Tensor]
    per_code: int = 1
    block: int = 1
    by_row: bool = True


def _int8(parts: Tensors) -> Tensor:
    return parts["codes"].float().mul_(parts["scales"]).mul_(_INVERSE_127)


def _int8_sizes(m: int, n: int) -> Sizes:
    return {"codes": ((m, n), torch.int8), "scales": ((m, 1), torch.float32)}


def _four_bits(kind: str) -> Callable[[Tensors], Tensor]:
    def dequantised(parts: Tensors) -> Tensor:
        codes, scales_B = parts["codes"], parts["scales"].view(-1)
        if "outer" in parts:
            known = (scales_B, parts["outer"].view(-1), parts["table"].view(-1), OUTER, torch.float32)
            scales_B = bitsandbytes().dequantize_blockwise.default(*known) + parts["offset"].view(())
        m, half = codes.shape
        # As one row: on processors with AVX-512 bitsandbytes 0.50 begins a block with every row of a multiple of 16
        # numbers, where blocks lie across rows that are no multiple of 64.
        flat: Tensor = bitsandbytes().dequantize_4bit.default(
            codes.view(-1, 1), scales_B, BLOCK, kind, (1, 2 * m * half), torch.float32
        )
        return flat.view(m, 2 * half)

    return dequantised


def _four_bit_sizes(m: int, n: int) -> Sizes:
    return {"codes": ((m, n // 2), torch.uint8), "scales": ((-(-m * n // BLOCK), 1), torch.float32)}


def _double_sizes(m: int, n: int) -> Sizes:
    B = -(-m * n // BLOCK)
    scales = {"scales": ((B, 1), torch.uint8), "outer": ((-(-B // OUTER), 1), torch.float32)}
    rest = {"table": ((256, 1), torch.float32), "offset": ((1, 1), torch.float32)}
    return {"codes": ((m, n // 2), torch.uint8), **scales, **rest}


def _halves(codes: Tensor) -> Tensor:
    """(m, n) float32 of bytes that hold numbers j and j + n / 2 of a row."""
    m, half = codes.shape
    out = torch.empty(m, 2, half, device=codes.device)
    out[:, 0], out[:, 1] = codes & 15, codes >> 4
    return out.view(m, 2 * half)


def _scaled(weight_mn: Tensor, scales_mb: Tensor) -> Tensor:
    """The weight with every block of a row times its scale, in place: (m, b, 32)."""
    m, b = scales_mb.shape
    return weight_mn.view(m, b, GGUF_BLOCK).mul_(scales_mb.float()[:, :, None])


def _q4_0(parts: Tensors) -> Tensor:
    return _scaled(_halves(parts["codes"]).sub_(8), parts["scales"]).flatten(1)


def _q4_1(parts: Tensors) -> Tensor:
    # Two roundings, as gguf has them: a fused product and sum would have one.
    return _scaled(_halves(parts["codes"]), parts["scales"]).add_(parts["least"].float()[:, :, None]).flatten(1)


def _q8_0(parts: Tensors) -> Tensor:
    return _scaled(parts["codes"].float(), parts["scales"]).flatten(1)


def _gguf_sizes(per_code: int, *parts: str) -> Callable[[int, int], Sizes]:
    def sizes(m: int, n: int) -> Sizes:
        codes = (m, n // per_code), torch.uint8 if per_code == 2 else torch.int8
        return {"codes": codes, **dict.fromkeys(parts, ((m, n // GGUF_BLOCK), torch.float16))}

    return sizes


FORMS = {
    "int8": Form(_int8_sizes, _int8),
    "nf4": Form(_four_bit_sizes, _four_bits("nf4"), 2, 2, by_row=False),
    "fp4": Form(_four_bit_sizes, _four_bits("fp4"), 2, 2, by_row=False),
    "nf4-double": Form(_double_sizes, _four_bits("nf4"), 2, 2, by_row=False),
    "fp4-double": Form(_double_sizes, _four_bits("fp4"), 2, 2, by_row=False),
    "q4_0": Form(_gguf_sizes(2, "scales"), _q4_0, 2, GGUF_BLOCK),
    "q4_1": Form(_gguf_sizes(2, "scales", "least"), _q4_1, 2, GGUF_BLOCK),
    "q8_0": Form(_gguf_sizes(1, "scales"), _q8_0, 1, GGUF_BLOCK),
}

FOUR_BITS = frozenset(form for form in FORMS if form.startswith(("nf4", "fp4")))
"""The forms that bitsandbytes dequantises."""
GGUF_FORMS = frozenset(("q4_0", "q4_1", "q8_0"))


def mute_bitsandbytes() -> None:
    """Mutes what bitsandbytes remarks of kernels that are not installed when it is imported, which peft does too."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def bitsandbytes() -> Any:
    """bitsandbytes' operators; importing it takes seconds."""
    mute_bitsandbytes()
    import bitsandbytes  # noqa: F401

    return torch.ops.bitsandbytes


@dataclass(frozen=True, eq=False)
class Quantised:
    """A frozen weight (m, n) by its parts, in the place of a tensor of the type `dtype`, and with its values; turned:
    seen as (n, m).

    Only what frozen layers ask a weight for is here.  Any function of torch's that gets one gets the dense weight.
    """

    form: str
    parts: Tensors
    dtype: torch.dtype = torch.float32
    turned: bool = False

    @property
    def shape(self) -> torch.Size:
        m, codes = self.parts["codes"].shape
        n = codes * FORMS[self.form].per_code
        return torch.Size((n, m) if self.turned else (m, n))

    @property
    def ndim(self) -> int:
        return 2

    @property
    def device(self) -> torch.device:
        return self.parts["codes"].device

    @property
    def mT(self) -> Quantised:
        return replace(self, turned=not self.turned)

    def __len__(self) -> int:
        return self.shape[0]

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as a tensor of this type, `dtype` by default.  New memory, of a turned one a view."""
        weight_mn = FORMS[self.form].dequantised(self.parts).to(self.dtype).to(dtype or self.dtype)
        return weight_mn.mT if self.turned else weight_mn

    def rows(self, index: Tensor) -> Tensor:
        """The rows (..., n) at these places (...), in `dtype`, without the others."""
        if not FORMS[self.form].by_row or self.turned:
            return self.dense()[index]
        index_R = index.reshape(-1)
        own = replace(self, parts={name: part.index_select(0, index_R) for name, part in self.parts.items()})
        return own.dense().view(*index.shape, -1)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(x: Any) -> Any:
            return x.dense() if isinstance(x, Quantised) else x

        return func(*map(plain, args), **{name: plain(x) for name, x in (kwargs or {}).items()})


def quantised(weight_mn: Tensor, form: str) -> Quantised:
    """The weight (m, n), rounded to `int8` or `nf4` by bitsandbytes' functions, in the place of one of its type."""
    ops, dtype = bitsandbytes(), weight_mn.dtype
    weight_mn = weight_mn.float().contiguous()
    if form == "int8":
        codes_mn, scales_m, _ = ops.int8_vectorwise_quant.default(weight_mn, 0.0)
        codes_mn[scales_m == 0] = 0  # 0 / 0, whatever that is as an integer
        return Quantised(form, {"codes": codes_mn, "scales": scales_m[:, None]}, dtype)
    assert form == "nf4", form
    codes, scales_B = ops.quantize_4bit.default(weight_mn, BLOCK, form, torch.uint8)
    return Quantised(form, {"codes": codes.view(len(weight_mn), -1), "scales": scales_B[:, None]}, dtype)


def fits(form: str, n: int) -> bool:
    """True where rows of n numbers are whole blocks of the form."""
    return n % FORMS[form].block == 0


def parts_of(name: str, weight: Quantised) -> dict[str, Tensor]:
    """The parts of a parameter by the names with which they travel."""
    kind = str(weight.dtype).removeprefix("torch.")
    return {f"{name}/{weight.form}/{kind}/{part}": tensor for part, tensor in weight.parts.items()}


def quantised_in(tensors: Tensors) -> dict[str, Quantised]:
    """The quantised parameters among a model's tensors, by their dotted names."""
    found: dict[tuple[str, str, str], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if "/" in name:
            parameter, form, kind, part = name.split("/")
            found.setdefault((parameter, form, kind), {})[part] = tensor
    return {name: Quantised(form, parts, getattr(torch, kind)) for (name, form, kind), parts in found.items()}


def without(tensors: Tensors, parameter: str) -> dict[str, Tensor]:
    """The tensors but for the parts of a parameter."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{parameter}/")}


def empty(form: str, m: int, n: int, dtype: torch.dtype = torch.float32) -> Quantised:
    """A weight (m, n) without data."""
    sizes = FORMS[form].sizes(m, n).items()
    parts = {part: torch.empty(shape, dtype=kind, device="meta") for part, (shape, kind) in sizes}
    return Quantised(form, parts, dtype)


def nbytes(form: str, m: int, n: int) -> int:
    """Bytes of a weight (m, n)."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in FORMS[form].sizes(m, n).values())
