"""Disturbances that must not change a run's bits: more workers, and the death of a worker, a node, the coordinator, the
command.

    python -m tests.helpers.chaos       the table of fifteen hashes, thirty ways of packing, and the soak (`make chaos`)

Each function runs the same small job with one disturbance and returns its summary.  Those that need no cluster of their
own use the Ray session of the calling process."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil

from rayfed_sub import load_config, run
from rayfed_sub.config.schema import Config
from rayfed_sub.storage.run_folder import summary_of
from rayfed_sub.telemetry.events import PackDone, RoundDone, Summary

ROOT = Path(__file__).parents[2]
JOB = [
    "model.random.hidden_size=32",
    "model.random.intermediate_size=96",
    "model.random.num_hidden_layers=2",
    "task.max_rows=240",  # of 1,180, which take longer to tokenise than to train on
    # Four packs a round, projector refreshes within and across rounds, a server with a state of its own.
    *("federation.sampled=7", "federation.rounds=4", "federation.local_steps=4", "federation.batch_size=2"),
    *("method.refresh_every=6", "server.optimizer=momentum", "optimizer.lr=0.01"),
    *("resources.pack_size=2", "resources.cpus_per_worker=0.5", "evaluation.batch_size=8"),
]
PAUSE = 2.5  # minimum seconds between two deaths: a pack takes 0.1 s, and a worker about three to come back
Kill = Callable[[], object]


def settings(workers: int) -> list[str]:
    return [*JOB, f"resources.workers={workers}"]


def job(workers: int, *overrides: str) -> Config:
    return load_config(ROOT / "experiments" / "tiny.yaml", [*settings(workers), *overrides])


def undisturbed(workers: int, folder: Path) -> Summary:
    return run(job(workers), folder)


def worker_killed(workers: int, folder: Path) -> Summary:
    return run(job(workers), folder, in_the_middle(lambda: kill_one("ray::Worker")))


def coordinator_killed(workers: int, folder: Path) -> Summary:
    return run(job(workers), folder, in_the_middle(lambda: kill_one("ray::Coordinator")))


def node_killed(workers: int, folder: Path) -> Summary:
    """Run in a cluster of two nodes, one of which is lost with all or half of the workers."""
    _python("node", str(workers), str(folder))
    return summary(folder)


def command_killed(workers: int, folder: Path) -> Summary:
    """SIGKILL in the second or third round, then --resume."""
    command = [sys.executable, "-m", "rayfed_sub.cli.main", "run", "experiments/tiny.yaml", *settings(workers)]
    command += ["--out", str(folder)]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    for line in first.stdout:
        if line.strip().startswith("1/4"):
            break
    time.sleep(0.2)
    first.kill()
    first.wait()
    assert not (folder / "summary.json").exists()
    subprocess.run([*command, "--resume"], cwd=ROOT, check=True, capture_output=True, timeout=280)
    return summary(folder)


DISTURBANCES = (undisturbed, worker_killed, node_killed, coordinator_killed, command_killed)


def in_the_middle(kill: Kill) -> Callable[[Any], None]:
    """A listener that calls `kill` once, when the first pack of the third round is accumulated and three are not."""
    called: list[object] = []

    def listener(record: Any) -> None:
        if isinstance(record, PackDone) and record.round == 2 and not called:
            called.append(kill())

    return listener


def kill_one(title: str) -> int:
    """Kill the oldest actor of that name with SIGKILL; return its process id."""
    found = sorted(actors(title), key=lambda process: process.create_time())
    found[0].kill()
    return found[0].pid


def actors(title: str) -> list[psutil.Process]:
    """The processes of this process's own Ray session whose title, an actor's class, has this prefix."""
    return [process for process in psutil.Process().children(recursive=True) if _title(process).startswith(title)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


class Soak:
    """A listener for a long run: it records the memory of all its processes round by round, bytes, and during the run
    it kills actors: a worker every `pause` to 2 `pause` seconds, the coordinator every tenth time.

    pause 0: no deaths.  The moments are random, and must not matter."""

    def __init__(self, pause: float) -> None:
        self.memory: list[int] = []
        self.deaths: list[str] = []
        self._over, self._pause = threading.Event(), pause

    def __enter__(self) -> Soak:
        if self._pause:
            threading.Thread(target=self._kill, daemon=True).start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._over.set()

    def __call__(self, record: Any) -> None:
        if isinstance(record, RoundDone):
            self.memory.append(memory())

    def _kill(self) -> None:
        while not self._over.wait(self._pause * random.uniform(1, 2)):
            title = "ray::Worker" if (len(self.deaths) + 1) % 10 else "ray::Coordinator"
            if self.memory and actors(title):  # not before the first round
                victim = random.choice(actors(title))
                victim.kill()
                self.deaths.append(title)

    def growth(self, since: int) -> float:
        """Bytes a round: the slope of a straight line through the rounds from `since` on."""
        tail = np.asarray(self.memory[since:], dtype=np.float64)
        return float(np.polyfit(np.arange(len(tail)), tail, 1)[0])


def memory() -> int:
    """Bytes of this process, the coordinator and the workers, shared pages by their share (PSS)."""
    total = 0
    for process in [psutil.Process(), *actors("ray::Worker"), *actors("ray::Coordinator")]:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_full_info().pss
    return total


def soak(rounds: int, pause: float, folder: Path) -> tuple[Summary, Soak]:
    """The job over many rounds; with a pause, under random deaths."""
    config = job(2, f"federation.rounds={rounds}", f"evaluation.every={rounds}")
    with Soak(pause) as listener:
        return run(config, folder, listener), listener


def summary(folder: Path) -> Summary:
    """The summary of a finished run, read from its folder."""
    found = summary_of(folder, load_config(folder / "config.yaml"))
    assert found is not None
    return found


def _python(*arguments: str) -> None:
    """Run this module in a separate process."""
    command = [sys.executable, "-m", "tests.helpers.chaos", *arguments]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]


def _on_two_nodes(workers: int, folder: Path) -> None:
    """The head has room for half of the workers, the other node for the rest; a third node joins when that is lost."""
    soon = {"period_ms": 500, "timeout_ms": 1000, "initial_delay_ms": 1000, "failure_threshold": 3}
    os.environ |= {f"RAY_health_check_{name}": str(value) for name, value in soon.items()}
    import ray
    from ray.cluster_utils import Cluster

    head = workers // 2  # of one worker, none
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": head, "include_dashboard": False})
    other = cluster.add_node(num_cpus=workers - head)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")

    def lose() -> None:
        cluster.remove_node(other, allow_graceful=False)
        cluster.add_node(num_cpus=workers - head)

    try:
        run(job(workers, "resources.cpus_per_worker=1"), folder, in_the_middle(lose))  # a node has whole CPUs
    finally:
        ray.shutdown()
        cluster.shutdown()


def table(root: Path) -> Iterator[tuple[str, int, str, str]]:
    """Disturbance, workers, hash, seconds; in the Ray session of this process."""
    for disturbance in DISTURBANCES:
        for workers in (1, 2, 4):
            began = time.perf_counter()
            done = disturbance(workers, root / f"{disturbance.__name__}-{workers}")
            took = f"{time.perf_counter() - began:.0f} s"
            yield disturbance.__name__.replace("_", " "), workers, done.weights_sha256, took


def main() -> None:
    """Print the table and run the soak; exit code 1 if hashes differ."""
    from rayfed_sub.cli.run_view import print_table
    from rayfed_sub.runtime.fork_server import fork_server
    from rayfed_sub.runtime.local_ray import ray_session
    from tests.helpers.packings import table as packed_cases

    with fork_server(wanted=True) as forks, ray_session(forks), TemporaryDirectory() as folder:
        root, rows = Path(folder), []
        for row in table(root):
            rows.append(row)
            print(*row, flush=True)
        packings = []
        for case, equal in packed_cases(root / "packings"):
            packings.append(equal)
            print(*case.values(), "the same hash" if equal else "ANOTHER HASH", flush=True)
        calm, _ = soak(200, 0, root / "calm")
        fierce, fire = soak(200, PAUSE, root / "fierce")
    print_table(("disturbance", "workers", "weights_sha256", "took"), rows)
    hashes = {row[2] for row in rows}
    print(f"{len(rows)} runs, {len(hashes)} hash{'es' if len(hashes) > 1 else ''}")
    print(f"{len(packings)} ways of packing, {packings.count(False)} with another hash")
    same = fierce.weights_sha256 == calm.weights_sha256
    print(
        f"200 rounds with {len(fire.deaths)} deaths: {'the same hash' if same else 'ANOTHER HASH'} as without; "
        f"memory grew by {fire.growth(20) / 1e3:.0f} kB a round after round 20"
    )
    sys.exit(len(hashes) > 1 or not same or not all(packings))


if __name__ == "__main__":
    if sys.argv[1:2] == ["node"]:
        _on_two_nodes(int(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
