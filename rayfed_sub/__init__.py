"""rayfed_sub: federated fine-tuning in gradient subspaces, simulated on Ray.

>>> from rayfed_sub import load_config, run          # doctest: +SKIP
>>> run(load_config("experiments/tiny.yaml")).metrics  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayfed_sub.core.errors import RunError, UserError
from rayfed_sub.models.own_model import OwnModel

if TYPE_CHECKING:
    from rayfed_sub.config.loading import load_config
    from rayfed_sub.config.schema import Config
    from rayfed_sub.data.given import RowSource
    from rayfed_sub.methods.hooks import LocalHook
    from rayfed_sub.methods.protocol import Method
    from rayfed_sub.runtime.rounds import Listener
    from rayfed_sub.sweeps.outcome import SweepResult
    from rayfed_sub.telemetry.events import Callback, Decision, Progress, Summary

__all__ = ["Config", "Decision", "OwnModel", "Progress", "RunError", "UserError", "load_config", "run", "sweep"]

_LATER = {
    "Config": "rayfed_sub.config.schema",
    "load_config": "rayfed_sub.config.loading",
    "Decision": "rayfed_sub.telemetry.events",
    "Progress": "rayfed_sub.telemetry.events",
}
"""Names that are imported when somebody asks for one: local training works without a configuration's libraries."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(_LATER[name]), name)
    return value


def run(
    config: Config,
    out: str | Path | None = None,
    listener: Listener | None = None,
    *,
    data: Mapping[str, RowSource] | None = None,
    validation: Mapping[str, RowSource] | RowSource | None = None,
    test: Mapping[str, RowSource] | RowSource | None = None,
    model: OwnModel | None = None,
    method: Method | None = None,
    hooks: LocalHook | Sequence[LocalHook] = (),
    resume: bool = False,
    address: str | None = None,
    callbacks: Sequence[Callback] = (),
) -> Summary:
    """Runs a federated job to the end, or goes on with one; writes a report; returns the summary.

    out, listener, resume, address: see `rayfed_sub.runtime.session.run`.

    data: the training rows of each client by its name, in place of task.path; each a `datasets.Dataset`, a torch
    Dataset with a length, or a list.  The names are the partition, so federation.clients is their number.  Rows are
    mappings of columns to values, of which the configuration's task names those to read (task.prompt and answer or
    label, messages, text, or image and label), as of files; or, with a loss of the caller's own, anything that can be
    pickled.
    validation, test: official rows, as `data` a mapping of clients to their own rows, or rows of nobody in particular;
    without them shares of the training rows, task.validation_share and task.test_share.  A configuration that says
    evaluation.split=validation before it knows the rows says task.name=given too.
    model: an `OwnModel`, in place of model.path: a module with a tokenizer, or with a loss and batch function.
    method: an instance of a class with a method's functions (`rayfed_sub.methods.protocol.Method`), in place of
    `config.method`.
    hooks: an instance of a class with a hook's functions (`rayfed_sub.methods.hooks.LocalHook`), or a list of one, in
    place of `config.hook`.
    callbacks: functions that are asked between rounds, besides those that the configuration names
    (`rayfed_sub.telemetry.events.Callback`); they may stop the run or change its learning rate.

    The run folder knows these objects by digests: the same call with resume=True goes on with the run, one with others
    is refused, as is the command line, which cannot have them.  Raises UserError, naming the argument, for objects that
    do not fit; RunError, naming client, round and stage, where the caller's code fails later.
    """
    from rayfed_sub.runtime.fork_server import fork_server

    with fork_server(config.resources.forked, address) as forks:  # it imports beside this process, which begins here
        from rayfed_sub.planning.call import given  # heavy: torch and Ray
        from rayfed_sub.reports.report import report_run
        from rayfed_sub.runtime import session

        handed = given(data, validation, test, model, method, hooks or None)
        how: dict[str, Any] = {"callbacks": callbacks, "resume": resume, "address": address, "forks": forks}
        return session.run(config, out, listener, given=handed, finish=report_run, **how)


def sweep(
    file: str | Path,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    *,
    resume: bool = False,
    address: str | None = None,
) -> SweepResult:
    """Runs the sweep that a YAML file describes, or goes on with it; see `rayfed_sub.sweeps.runner.run_sweep`.

    The result has the table of trials as a pandas DataFrame, the best configuration, and Ray Tune's ResultGrid.
    """
    from rayfed_sub.sweeps.runner import run_sweep
    from rayfed_sub.sweeps.space import load_sweep

    return run_sweep(load_sweep(file, overrides), out, resume=resume, address=address)
