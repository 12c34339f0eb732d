"""One run from configuration to summary: checks first, then Ray, then the coordinator's stream of records."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from rayfed_sub.config import Config
from rayfed_sub.engine import checkpoints
from rayfed_sub.engine.folder import RunFolder, check_free, fresh
from rayfed_sub.engine.job import Job, check_resources, prepare
from rayfed_sub.engine.journal import PackDone, RoundDone, RoundRow, Stage, Started, Summary
from rayfed_sub.engine.memory import PeakMemory
from rayfed_sub.errors import RunError, UserError

_CALL_SECONDS = 3600.0  # no evaluation or snapshot takes longer; a round may, it reports pack by pack
_LIBRARIES = ("rayfed_sub", "ray", "torch", "transformers", "numpy", "datasets")

Listener = Callable[[Stage | Started | PackDone | RoundDone], None]
"""Is shown the journal's records as they come."""


def run(config: Config, out: str | Path | None = None, listener: Listener | None = None) -> Summary:
    """Runs a federated job and returns its summary; the run folder is `out` (default: runs/<name>, or the next free).

    Uses the Ray cluster this process is connected to, or starts a local one of its own and shuts it down again.
    Raises UserError before anything starts where the configuration does not fit, RunError where the run cannot go on.
    """
    tell = listener or (lambda record: None)
    began, memory = time.perf_counter(), PeakMemory()
    path = None if out is None else Path(out)
    if path is not None:
        check_free(path)
    check_resources(config, _available())
    tell(Stage("reading task and model"))
    job = prepare(config)
    folder = RunFolder(fresh(path, config.name), job.config)
    tell(Stage("starting Ray, loading weights"))
    with ThreadPoolExecutor(1) as pool:
        loading = [pool.submit(_load_backbone, job)]
        with _ray():
            coordinator = _coordinator(job, loading.pop())  # no name here may hold the weights for the whole run
            try:
                summary = _rounds(job, folder, coordinator, tell)
            finally:
                ray.kill(coordinator)  # its workers are its children and go with it
    whole = replace(
        summary,
        wall_seconds=time.perf_counter() - began,
        peak_memory_bytes=summary.peak_memory_bytes + memory.peak,
    )
    folder.write_summary(whole)
    return whole


def _coordinator(job: Job, backbone: Future[Any]) -> Any:
    """The coordinator actor, with all that it shares already in the object store."""
    from rayfed_sub.engine.coordinator import Coordinator, Shared
    from rayfed_sub.engine.workers import Spec

    spec = Spec(job.config, job.method, job.skeleton, job.codec)
    shared = Shared(ray.put(spec), ray.put(backbone.result()), ray.put(job.dataset))
    parts = (job.method, job.skeleton.shape, job.skeleton.transposed)
    return ray.remote(num_cpus=0)(Coordinator).remote(job.config, *parts, shared)


def _rounds(job: Job, folder: RunFolder, coordinator: Any, tell: Listener) -> Summary:
    """Walks the rounds and writes tables and checkpoints; the summary without the time and memory of this process."""
    config = job.config

    def ask(name: str) -> Any:
        return _asked(getattr(coordinator, name).remote(), name)

    ask("start")
    tell(Stage("evaluating the initial model"))
    first = {"held_out_loss": ask("held_out_loss"), "rouge_l": ask("held_out_rouge")}
    targets = sum(4 * layer.m * layer.n for layer in job.skeleton.shape.targets)
    tell(Started(config, folder.path, first["held_out_loss"], first["rouge_l"], targets))
    rows: list[RoundRow] = []
    rounds, every = config.federation.rounds or 0, config.checkpoint.every
    for n in range(rounds):
        for reference in coordinator.run_round.options(num_returns="streaming").remote(n):
            record = _asked(reference, f"round {n}")
            if isinstance(record, RoundDone):
                rows.append(record.row)
                folder.add(record.row, record.client_rows)
            tell(record)
        if every and (n + 1) % every == 0 and n + 1 < rounds:  # the last one is written below
            folder.write_tables()
            checkpoints.write(folder.path, ask("snapshot"))
    last = {"held_out_loss": rows[-1].held_out_loss, "rouge_l": ask("held_out_rouge")}
    folder.write_tables()
    checkpoints.write(folder.path, ask("snapshot"))
    return Summary(
        name=config.name,
        method=str(config.method["name"]),
        rounds=len(rows),
        weights_sha256=ask("weights_sha256"),
        uplink_bytes=sum(row.uplink_bytes for row in rows),
        downlink_bytes=sum(row.downlink_bytes for row in rows),
        dense_bytes=sum(row.clients for row in rows) * targets,
        change_rank=rows[-1].change_rank,
        wall_seconds=0.0,
        train_seconds=sum(row.train_seconds for row in rows),
        peak_memory_bytes=ask("peak_memory"),
        metrics={**{f"{k}_before": v for k, v in first.items()}, **last},
        versions={name: version(name) for name in _LIBRARIES} | {"python": platform.python_version()},
        environment=_environment(config),
        folder=str(folder.path),
    )


def _asked(reference: Any, stage: str) -> Any:
    """The coordinator's answer, or the cause of its failure."""
    try:
        return ray.get(reference, timeout=_CALL_SECONDS)
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, RunError | UserError) else error from None
    except GetTimeoutError:
        raise RunError(stage, f"no answer from the coordinator for {_CALL_SECONDS:.0f} s") from None
    except RayActorError as error:
        raise RunError(stage, f"the coordinator died: {str(error).strip().splitlines()[-1].strip()}") from None


def _load_backbone(job: Job) -> Any:
    from rayfed_sub.engine.exchange import packed
    from rayfed_sub.models.weights import load_weights

    return packed(load_weights(job.config.model, job.skeleton, job.config.seed))


def _available() -> dict[str, float]:
    """CPUs and GPUs of the cluster in use, or of this machine."""
    if ray.is_initialized():
        return dict(ray.cluster_resources())
    import torch

    return {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}


@contextmanager
def _ray() -> Iterator[None]:
    """A Ray session: the one there is, or a local one for this run alone (never somebody's cluster by accident)."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Processes that wait for actors import these while the weights load here.
    os.environ.setdefault("RAY_preload_python_modules", "rayfed_sub.engine.coordinator,transformers.modeling_utils")
    # In a container Ray may count fewer CPUs than `check_resources` did, and workers would wait for the rest for ever.
    cpus = os.cpu_count()
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level="error")
    _tighten_token()
    try:
        yield
    finally:
        ray.shutdown()


def _tighten_token() -> None:
    """Ray writes its token readable by everyone; it opens the cluster to whoever has it."""
    token = Path.home() / ".ray" / "auth_token"
    if token.exists():
        token.chmod(0o600)


def _environment(config: Config) -> dict[str, Any]:
    """What the bits depend on besides configuration and versions."""
    import torch

    return {
        "processor": _processor(),
        "threads": max(1, int(config.resources.cpus_per_worker)),
        "pack_size": config.resources.pack_size,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else platform.processor()
    return platform.processor()
