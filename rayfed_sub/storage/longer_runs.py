"""More rounds than a run began with: where they end with the bits of one run of that length, and how they begin."""

from __future__ import annotations

from pathlib import Path

from rayfed_sub.config.schema import Config
from rayfed_sub.core.errors import UserError
from rayfed_sub.storage import checkpoints
from rayfed_sub.storage.remote import Place
from rayfed_sub.telemetry.events import Decided

ROUNDS = "federation.rounds"


def is_longer(config: Config, old: Config) -> bool:
    """True where `config`, resolved, has more rounds than the stored configuration `old`."""
    return (config.federation.rounds or 0) > (old.federation.rounds or 0)


def check_longer(path: Path, old: Config, config: Config, stopped: Decided | None) -> None:
    """UserError where the rounds of a longer run would not begin with those of the run in the folder.  stopped: what
    ended that run early."""
    rounds = old.federation.rounds or 0
    run, last = f"{rounds}, with which the run in {path} began", f"{rounds}, for the last round of the run in {path}"
    if old.optimizer.schedule != "constant":
        raise _refused(config, f"{run}: optimizer.schedule={old.optimizer.schedule} follows their number")
    if old.privacy.epsilon is not None:
        raise _refused(config, f"{run}: privacy.epsilon is a budget of them all")
    if stopped is not None:
        raise _refused(config, f"{run}: it stopped after round {stopped.finished} ({stopped.stop})")
    if not _out_of_turn(path, old):
        return
    last = f"{last} was judged or diagnosed out of turn"
    if checkpoints.count(path) < 2:
        raise _refused(config, f"{last}, and no checkpoint before it is left (checkpoint.every={old.checkpoint.every})")
    if checkpoints.best(path) == rounds:
        raise _refused(config, f"{last}, and became the best one")


def lengthened(place: Place, old: Config, config: Config) -> Config:
    """Makes an unfinished run of the one in the folder, and lets a last round like no other run again; returns the
    configuration to write then.

    One step after the other, also in an object store: wherever this is cut off, there is a run to lengthen.
    Raises RunError where the store refuses.
    """
    (place.path / "summary.json").unlink(missing_ok=True)
    place.push()
    if _out_of_turn(place.path, old):
        checkpoints.go_back(place.path)
        place.push()
    federation = old.federation.model_copy(update={"rounds": config.federation.rounds})
    return old.model_copy(update={"federation": federation})


def _refused(config: Config, allowed: str) -> UserError:
    return UserError(ROUNDS, config.federation.rounds, allowed, "begin anew in another folder")


def _out_of_turn(path: Path, old: Config) -> bool:
    """True where the run has finished a last round with what only a last round has, which a longer run would lack."""
    rounds, evaluation, diagnostics = old.federation.rounds or 0, old.evaluation, old.diagnostics
    if checkpoints.newest(path) != rounds:
        return False
    unlike = bool(rounds % evaluation.every) or bool(diagnostics.every and rounds % diagnostics.every)
    return unlike or evaluation.generate_rows > 0
