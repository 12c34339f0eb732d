"""Updates of clients that began from an earlier server: which methods' a later server can use, and in which form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rayfed_sub.core.errors import UserError
from rayfed_sub.core.types import ModelShape
from rayfed_sub.methods import METHODS, class_of
from rayfed_sub.methods.hooked import unhooked
from rayfed_sub.methods.protocol import Method

if TYPE_CHECKING:
    from rayfed_sub.config.schema import Config


def sent_values(method: Method, shape: ModelShape) -> tuple[str, ...]:
    """Names of the tensors in an update that are values of the server's: see `Method.sent_values`, which it has."""
    own: Any = unhooked(method)
    found: tuple[str, ...] = own.sent_values(shape)
    return found


def check_asynchronous(config: Config, method: Method, shape: ModelShape) -> None:
    """UserError where the method's updates are of no use to a server that has moved on."""
    if config.federation.mode != "async":
        return
    fitting = [name for name in METHODS if hasattr(class_of(name), "sent_values")]
    name = config.method["name"]
    if not hasattr(unhooked(method), "sent_values"):
        allowed = f"sync or semi-sync with method.name={name}, whose updates are in a basis of their round"
        raise UserError("federation.mode", "async", allowed, f"or choose one of {', '.join(fitting)}")
    values = set(sent_values(method, shape)) - set(shape.head_names)
    rule = config.federation.asynchronous
    if rule.rule == "fedasync" and not values:
        allowed = f"fedbuff with method.name={name}, whose clients send changes, not models to mix"
        advice = "set rule=fedbuff, buffer=1 and server.lr in place of mixing"
        raise UserError("federation.asynchronous.rule", "fedasync", allowed, advice)
    alone = rule.rule == "fedasync" or rule.buffer == 1
    if alone and getattr(unhooked(method), "optimizer_state", None) == "average":
        how = "rule=fedasync" if rule.rule == "fedasync" else "buffer=1"
        allowed = f"keep or reset with federation.asynchronous.{how}, by which one client's would replace the average"
        raise UserError("method.optimizer_state", "average", allowed, "set method.optimizer_state=keep")
