"""Updates of clients that began from an earlier server: which methods' a later server can use, and in which form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rayfed_sub.core.errors import UserError
from rayfed_sub.core.types import ModelShape
from rayfed_sub.methods import METHODS, build, class_of
from rayfed_sub.methods.hooked import unhooked
from rayfed_sub.methods.protocol import Method

if TYPE_CHECKING:
    from rayfed_sub.config.schema import Config


def sent_values(method: Method, shape: ModelShape) -> tuple[str, ...]:
    """Names of the tensors in an update that are values of the server's: see `Method.sent_values`, which it has."""
    own: Any = unhooked(method)
    found: tuple[str, ...] = own.sent_values(shape)
    return found


def _values(method: Method, shape: ModelShape) -> set[str]:
    """Those of `sent_values` that are not the head's, which every method sends as values."""
    return set(sent_values(method, shape)) - set(shape.head_names)


def check_asynchronous(config: Config, method: Method, shape: ModelShape) -> None:
    """UserError where the method's updates are of no use to a server that has moved on."""
    if config.federation.mode != "async":
        return
    name, rule = config.method["name"], config.federation.asynchronous
    if not hasattr(unhooked(method), "sent_values"):
        known = {one: build({"name": one}) for one in METHODS if hasattr(class_of(one), "sent_values")}
        fitting = [one for one, other in known.items() if rule.rule == "fedbuff" or _values(other, shape)]
        allowed = f"sync or semi-sync with method.name={name}, whose updates are for the server that clients began from"
        raise UserError("federation.mode", "async", allowed, f"or choose one of {', '.join(fitting)}")
    if rule.rule == "fedasync" and not _values(method, shape):
        allowed = f"fedbuff with method.name={name}, whose clients send changes, not models to mix"
        advice = "set rule=fedbuff, buffer=1 and server.lr in place of mixing"
        raise UserError("federation.asynchronous.rule", "fedasync", allowed, advice)
    alone = rule.rule == "fedasync" or rule.buffer == 1
    if alone and getattr(unhooked(method), "optimizer_state", None) == "average":
        how = "rule=fedasync" if rule.rule == "fedasync" else "buffer=1"
        allowed = f"keep or reset with federation.asynchronous.{how}, by which one client's would replace the average"
        raise UserError("method.optimizer_state", "average", allowed, "set method.optimizer_state=keep")
