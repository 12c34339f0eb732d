"""Which linear layers feed which, and what lies between: read off autograd's graph of one forward pass.

The pass is made on a model without weights (the meta device), so it costs the time of its calls and no arithmetic.
Every linear layer's input and output is marked in the graph; walking back from a layer's input shows the layers that
it reads, and whether activations, or operations across tokens, lie on the way.

Legend: R rows, T tokens.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rayfed_sub.models.hub import quiet
from rayfed_sub.models.logits import Affirming

_ROWS = 3
"""Rows of the pass: a layer whose input does not begin with a multiple of so many does not see row after row."""
_TOKENS = (7, 64)
"""Tokens of a row: the first number that the model takes, no multiple of _ROWS."""
_SMALL = 500_000_000
"""Parameters of a model that may be made with weights for its pass, at most."""
_SIDE = 224
"""Side of an image in pixels where the configuration has none."""

_ACTIVATIONS = re.compile(
    r"(Silu|Gelu|Relu|LeakyRelu|Sigmoid|LogSigmoid|Tanh|Hard\w*|Elu|Celu|Selu|Softplus|Softsign|Mish|Prelu\w*|Erf|Exp"
    r"|Expm1|Log1P|Where|Threshold|Pow|Square)Backward\d*"
)
"""Autograd's names of what activation functions are made of, each number by itself.  A limit on numbers is none."""
_OWN_ACTIVATIONS = re.compile(r"\w*(elu|silu|swish|mish)\w*", re.IGNORECASE)
"""The same of a model's own autograd functions: Bloom has one for GELU."""
_ACROSS = re.compile(
    r"(Bmm|Baddbmm|Mm|Addmm|Mv|Dot|\w*Attention\w*|SafeSoftmax|Softmax|LogSoftmax|\w*Convolution\w*|Cumsum|Cumprod"
    r"|Select|Index\w*|Gather|Scatter\w*|Stack|CopySlices|Flip|Roll|Unfold|\w*Fft\w*|\w*Pool\w*)(Backward\w*)?\d*"
)
"""Autograd's names of operations in which numbers of several tokens, or other weights, meet."""
_MEANS = re.compile(r"(Mean|Sum|Var\w*)Backward\d*")


@dataclass(frozen=True)
class Link:
    """A linear layer `source` whose output another one reads, or "" for what the block is given.  activations: numbers
    of the activations on a way between them; across: True where tokens meet there."""

    source: str
    activations: frozenset[int]
    across: bool


@dataclass(frozen=True)
class Dataflow:
    """Linear layers of a forward pass.

    links: by layer the layers that it reads directly, of all its uses.  reached: layers that the model's output depends
    on.  by_row: layers that see something of each row, row after row.  widths: by block, a part of a list, the size of
    the tokens that it is given.  failed: why there was no pass; then all else is empty.
    """

    links: Mapping[str, tuple[Link, ...]] = field(default_factory=dict)
    reached: frozenset[str] = frozenset()
    by_row: frozenset[str] = frozenset()
    widths: Mapping[str, int] = field(default_factory=dict)
    failed: str | None = None


def dataflow(module: nn.Module, linears: Mapping[str, nn.Module], kind: str) -> Dataflow:
    """The dataflow of a transformers model on the meta device, as training runs it; linears: by name.  What the model
    has elsewhere goes there: some make parameters on a device of their own choice."""
    failed = ""
    module.to("meta")
    for tokens in _TOKENS:
        try:
            with quiet():
                return _followed(module, linears, _inputs(module, kind, tokens))
        except Exception as error:  # a model may fail on numbers that it cannot see
            failed = failed or f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if kind == "text-classification" and sum(x.numel() for x in module.parameters()) <= _SMALL:
        try:
            return _with_numbers(module, linears, kind)
        except Exception:  # the first failure says more
            pass
    return Dataflow(failed=failed)


def _with_numbers(module: Any, linears: Mapping[str, nn.Module], kind: str) -> Dataflow:
    """The dataflow of a model with random weights, for one that asks for numbers on its way (Longformer's places of
    global attention)."""
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        real = type(module)(copy.deepcopy(module.config)).eval()
        own = {name: part for name, part in real.named_modules() if name in linears}
        return _followed(real, own, _inputs(real, kind, _TOKENS[0], "cpu"))


def _inputs(module: Any, kind: str, tokens: int, device: str = "meta") -> dict[str, Any]:
    if kind != "image-classification":
        ids_RT = torch.arange(3, 3 + tokens, device=device).repeat(_ROWS, 1)
        more = {"use_cache": False} if kind == "causal-lm" else {"attention_mask": torch.ones_like(ids_RT)}
        return {"input_ids": ids_RT, **more}
    config = getattr(module.config, "vision_config", module.config)
    size = getattr(config, "image_size", None) or _SIDE
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    channels = getattr(config, "num_channels", 3)
    pixels = torch.zeros(_ROWS, channels, *sides, dtype=module.dtype, device="meta", requires_grad=True)
    return {"pixel_values": _marked(pixels, ("tokens", ""))}


class _Mark(torch.autograd.Function):
    """The same numbers; its node in the graph has `sign`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sign: tuple[str, str]) -> Tensor:
        ctx.sign = sign
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None]:
        return outputs[0], None


def _marked(x: Any, sign: tuple[str, str]) -> Any:
    if not isinstance(x, Tensor) or not x.requires_grad:
        return x
    return _Mark.apply(x, sign)  # type: ignore[no-untyped-call]


def _followed(module: Any, linears: Mapping[str, nn.Module], inputs: Mapping[str, Any]) -> Dataflow:
    strange: set[str] = set()  # layers that do not see row after row
    if hasattr(module, "set_experts_implementation"):
        module.set_experts_implementation("batched_mm")  # the one that need not know which expert takes a token
    widths: dict[str, int] = {}
    embeddings = _embeddings(module) if "input_ids" in inputs else []
    with _marks(module, embeddings, linears, strange, widths), torch.enable_grad(), Affirming():  # type: ignore[no-untyped-call]
        logits = module(**inputs).logits
    graph = _Graph(logits.grad_fn)
    ends = {sign: [node for node in graph.signed if node.sign == sign] for sign in {n.sign for n in graph.signed}}
    after = graph.before(ends.get(("tokens", ""), []))  # all nodes that depend on tokens
    links, by_row = {}, set()
    for name in linears:
        begins = ends.get(("in", name), [])
        if begins:
            links[name] = tuple(link for node in begins for link in graph.links(node))
        if begins and name not in strange and all(node in after for node in begins):
            by_row.add(name)
    reached = frozenset(name for (place, name) in ends if place == "out")
    return Dataflow(links, reached, frozenset(by_row), widths)


def _embeddings(module: Any) -> list[nn.Module]:
    """The embeddings of tokens: the model's own; of encoder-decoders, which may have one for each half, all of its
    size; and all embeddings where the model does not say which (CANINE hashes characters)."""
    every: list[nn.Module] = [part for part in module.modules() if isinstance(part, nn.Embedding)]
    try:
        own = module.get_input_embeddings()
    except NotImplementedError:
        return every
    if not isinstance(own, nn.Module):
        return every
    halves = getattr(module.config, "is_encoder_decoder", False) and isinstance(own, nn.Embedding)
    return [part for part in every if part.weight.shape == own.weight.shape] if halves else [own]


@contextmanager
def _marks(
    module: nn.Module,
    embeddings: Sequence[nn.Module],
    linears: Mapping[str, nn.Module],
    strange: set[str],
    widths: dict[str, int],
) -> Iterator[None]:
    """Within it a pass leaves marks in the graph: at the inputs and outputs of linear layers, at the inputs of blocks,
    and behind the embedding of tokens.  It adds to `strange` and `widths`."""
    handles = []

    def before(name: str) -> Callable[..., Any]:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> Any:
            # An expert that is given no token would be given a number of them that follows from their values.
            if not args or not args[0].numel() or args[0].shape[0] % _ROWS:
                strange.add(name)
            return (_marked(args[0], ("in", name)), *args[1:]) if args else None

        return hook

    def after(sign: tuple[str, str]) -> Callable[..., Any]:
        return lambda layer, args, result: _marked(result, sign)

    def given(name: str) -> Callable[..., Any]:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            tokens = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.requires_grad]
            if tokens and tokens[0].ndim == 3:
                widths[name] = tokens[0].shape[-1]
            sign = ("block", "")
            return tuple(_marked(x, sign) for x in args), {key: _marked(x, sign) for key, x in kwargs.items()}

        return hook

    try:
        for name, layer in linears.items():
            handles.append(layer.register_forward_pre_hook(before(name)))
            handles.append(layer.register_forward_hook(after(("out", name))))
        for name, outer in module.named_modules():
            for number, part in outer.named_children() if isinstance(outer, nn.ModuleList) else ():
                hook = given(f"{name}.{number}" if name else number)
                handles.append(part.register_forward_pre_hook(hook, with_kwargs=True))
        for embedding in embeddings:
            handles.append(embedding.register_forward_hook(after(("tokens", ""))))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Graph:
    """Autograd's graph behind an output.  signed: nodes of marks."""

    def __init__(self, root: Any) -> None:
        self._order: list[Any] = []  # every node before those that it reads
        self.signed = []
        self._read: dict[Any, list[Any]] = {}
        waiting, seen = [root], {root}
        while waiting:
            node = waiting.pop()
            self._order.append(node)
            if _sign(node) is not None:
                self.signed.append(node)
            self._read[node] = [read for read, _ in node.next_functions if read is not None]
            for read in self._read[node]:
                if read not in seen:
                    seen.add(read)
                    waiting.append(read)

    def before(self, ends: Sequence[Any]) -> set[Any]:
        """All nodes from which one of these is reached."""
        return _reaching(ends, self._readers())

    def _readers(self) -> dict[Any, list[Any]]:
        readers: dict[Any, list[Any]] = {node: [] for node in self._order}
        for node in self._order:
            for read in self._read[node]:
                readers[read].append(node)
        return readers

    def links(self, begin: Any) -> list[Link]:
        """The layers that the layer marked at its input by `begin` reads, without passing through another."""
        region, sources, waiting = {begin}, [], [begin]
        readers: dict[Any, list[Any]] = {begin: []}
        while waiting:
            node = waiting.pop()
            if node is not begin and _sign(node) is not None:
                sources += [node] if node.sign[0] in ("out", "block") else []
                continue
            for read in self._read[node]:
                readers.setdefault(read, []).append(node)
                if read not in region:
                    region.add(read)
                    waiting.append(read)
        found = []
        for source in sources:
            between = _reaching([source], readers)
            acting = frozenset(id(node) for node in between if _acts(node, readers))
            found.append(Link(source.sign[1], acting, any(_meets(node) for node in between)))
        return found


def _sign(node: Any) -> tuple[str, str] | None:
    return getattr(node, "sign", None)


def _reaching(ends: Sequence[Any], readers: Mapping[Any, Sequence[Any]]) -> set[Any]:
    found, waiting = set(ends), list(ends)
    while waiting:
        for reader in readers.get(waiting.pop(), ()):
            if reader not in found:
                found.add(reader)
                waiting.append(reader)
    return found


def _acts(node: Any, readers: Mapping[Any, Sequence[Any]]) -> bool:
    """True for an activation; a root, and a square that a mean reads, are a norm's."""
    name = type(node).__name__
    if _own(node):
        return bool(_OWN_ACTIVATIONS.fullmatch(name))
    root = isinstance(power := getattr(node, "_saved_exponent", None), int | float) and power < 1
    squared = any(_MEANS.fullmatch(type(reader).__name__) for reader in readers.get(node, ()))
    return bool(_ACTIVATIONS.fullmatch(name)) and not root and not squared


def _meets(node: Any) -> bool:
    """True where tokens meet, or may: nobody knows of a model's own autograd functions."""
    name = type(node).__name__
    return not _OWN_ACTIVATIONS.fullmatch(name) if _own(node) else bool(_ACROSS.fullmatch(name))


def _own(node: Any) -> bool:
    """True for an autograd function of the model's own."""
    return isinstance(node, torch.autograd.function.BackwardCFunction) and _sign(node) is None
