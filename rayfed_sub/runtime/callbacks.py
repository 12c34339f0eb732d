"""Callbacks: functions of the caller's that are asked between rounds, given to `run` or named by the configuration."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence

from rayfed_sub.config.schema import Config
from rayfed_sub.core.errors import RunError, UserError
from rayfed_sub.planning.sampling import learning_rate
from rayfed_sub.telemetry.events import Callback, Decided, Decision, Progress

FIELD = "callbacks"


def with_callbacks(config: Config, given: Sequence[Callback]) -> tuple[Config, dict[str, Callback]]:
    """The configuration with the names of the given callbacks besides those that it names, and all of them by name, in
    that order.

    Names are package.module:name, so a run folder says what its run asked; a function that cannot be imported by its
    name has to be given again.  Raises UserError for a name that cannot be imported, for two functions of one name, and
    for anything but a sequence of functions.
    """
    if not isinstance(given, Sequence) or not all(callable(one) and not isinstance(one, type) for one in given):
        allowed = "a list of functions of the run's progress, or of instances that can be called as such"
        raise UserError(FIELD, _kinds(given), allowed, "give e.g. callbacks=[on_plateau]")
    objects: dict[str, Callback] = {}
    for callback in given:
        if objects.setdefault(name_of(callback), callback) is not callback:
            raise UserError(FIELD, name_of(callback), "functions with names of their own", "give each its own name")
    names = tuple(dict.fromkeys([*config.callbacks, *objects]))
    found = {name: objects.get(name) or _imported(name) for name in names}
    return config.model_copy(update={"callbacks": names}), found


def _kinds(given: object) -> str:
    """What was given in place of callbacks, by type."""
    if not isinstance(given, list | tuple):
        return type(given).__name__
    return f"[{', '.join('a class' if isinstance(one, type) else type(one).__name__ for one in given)}]"


def name_of(callback: Callback) -> str:
    """The callback's module and name; of an object those of its class.

    >>> name_of(learning_rate)
    'rayfed_sub.planning.sampling:learning_rate'
    """
    named = callback if hasattr(callback, "__qualname__") else type(callback)
    return f"{named.__module__}:{named.__qualname__}"


def asked(callbacks: Mapping[str, Callback], progress: Progress) -> Decided:
    """What the callbacks decide, each after the one before it; the first that stops ends the questions.

    Raises RunError where one fails, or answers with no `Decision` that can be followed.
    """
    factor = progress.lr_factor
    for name, callback in callbacks.items():
        now = Progress(progress.config, progress.finished, progress.rounds, progress.scores, factor)
        try:
            decision = callback(now)
        except Exception as error:
            raise _failed(name, now, f"{type(error).__name__}: {error}") from error
        if decision is None:
            continue
        if (fault := _fault(decision, now)) is not None:
            raise _failed(name, now, fault)
        factor = factor if decision.lr_factor is None else float(decision.lr_factor)
        if decision.stop is not None:
            return Decided(progress.finished, factor, f"{name}: {decision.stop}")
    return Decided(progress.finished, factor)


def _fault(decision: object, progress: Progress) -> str | None:
    """What is wrong with an answer, in words."""
    if not isinstance(decision, Decision):
        return f"answered {decision!r}, not a Decision or None"
    factor, stop = decision.lr_factor, decision.stop
    if stop is not None and not isinstance(stop, str):
        return f"gave {stop!r} as the reason to stop, not a text"
    if factor is None:
        return None
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 <= factor < math.inf:
        return f"answered lr_factor={factor!r}, not a finite number >= 0"
    federation = progress.config.federation
    mu, rate = federation.proximal, learning_rate(progress.config, progress.finished, factor)
    if federation.normalise_steps and mu * rate >= 1:
        return f"answered lr_factor={factor!r}: federation.proximal must stay below {1 / rate:g}, 1 / the learning rate"
    return None


def _failed(name: str, progress: Progress, cause: str) -> RunError:
    return RunError(f"callback {name}", " ".join(cause.split()), round=progress.finished)


def _imported(name: str) -> Callback:
    module, _, attribute = name.partition(":")
    allowed = "package.module:name of a function of the run's progress, or a class of such"
    try:
        found = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
        callback = found() if isinstance(found, type) else found
    except Exception as error:  # the module runs, and anything may go wrong in it
        advice = (
            f"give it to rayfed_sub.run(..., callbacks=[...]) if it has no such name ({type(error).__name__}: {error})"
        )
        raise UserError(FIELD, name, allowed, " ".join(advice.split())) from None
    if not callable(callback):
        raise UserError(FIELD, name, allowed, "name a function")
    called: Callback = callback
    return called
