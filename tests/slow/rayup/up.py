"""The cluster of cluster.yaml from `ray up` to `ray down`.  Runs on the stage of stage.sh; one line for each step."""

from __future__ import annotations

import copy
import json
import os
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pandas as pd
import psutil
import yaml
from botocore.exceptions import BotoCoreError, ClientError

ROOT = Path(__file__).parents[3]
HOME = Path("/home/ubuntu")  # of every node
DASHBOARD = "http://127.0.0.1:8266"  # the head's port 8265, forwarded
JOB = "grid"
# Two trials of one worker with one CPU, so that each has a node of its own.
GRID = ("sweeps/tagg-rank-lr.yaml", "federation.rounds=20", "sweep.space={method.rank: {grid: [2, 4]}}")
TRIALS = ("00000", "00001")
PATIENCE = 400  # seconds; the machine may have other things to do


def adapted(cluster: dict[str, Any], image: str) -> tuple[dict[str, Any], list[str]]:
    """The project's cluster with the changes that a machine without a cloud requires, and a description of them."""
    changed = copy.deepcopy(cluster)
    kinds = changed["available_node_types"]
    for kind in kinds.values():
        kind["node_config"]["ImageId"] = image
    workers = [kind for name, kind in kinds.items() if name != changed["head_node_type"]]
    for kind in workers:
        kind["resources"] = {**kind["resources"], "CPU": 1}
    changed["idle_timeout_minutes"] = 1
    changed["provider"]["use_internal_ips"] = True
    setup = [line for line in changed["setup_commands"] if "sudo " not in line and "pip install" not in line]
    changed["setup_commands"], changed["head_setup_commands"] = setup, []
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        lines = [line for line in changed[key] if not line.endswith("ray stop")]
        own = "--node-ip-address=$(set -- $SSH_CONNECTION; echo $3) --object-store-memory=200000000"
        changed[key] = [*lines[:-1], f"{lines[-1]} {own}"]
    *before, start = changed["worker_start_ray_commands"]
    apart = "mkdir -p /tmp/ray && mount -t tmpfs tmpfs /tmp/ray"  # or one node deletes the working files of another
    changed["worker_start_ray_commands"] = [*before, f"unshare --mount bash -c {shlex.quote(f'{apart} && {start}')}"]
    return changed, [
        f"ImageId: {image}, which moto knows, for the placeholder",
        "workers: CPU: 1 for 8, so that two trials need two nodes; their GPU is a figure only",
        "idle_timeout_minutes: 1 for 5",
        "provider.use_internal_ips: true, so that a node is reached at the address that it has in the cluster",
        "setup commands: none that installs something, since there is no network; ~/venv is this Python's",
        "start commands: no `ray stop`, since all nodes share their processes",
        "start commands: --node-ip-address, since all nodes share their interfaces",
        "start commands: --object-store-memory, since all nodes share their memory",
        "start commands: a worker has a /tmp/ray of its own, since all nodes share their files",
    ]


@contextmanager
def step(what: str) -> Iterator[list[str]]:
    """Print what was done, with the lines that the block adds to the list, and the seconds taken."""
    began, found = time.monotonic(), list[str]()
    yield found
    print(f"{time.monotonic() - began:6.1f} s  {what}{': ' if found else ''}{', '.join(found)}", flush=True)


def until(true: Callable[[], Any], what: str) -> Any:
    """Wait for a true value, and return it."""
    end = time.monotonic() + PATIENCE
    while not (value := true()):
        assert time.monotonic() < end, f"waited {PATIENCE} s in vain for {what}"
        time.sleep(1)
    return value


def started(*words: str, log: Path, **environment: str) -> subprocess.Popen[bytes]:
    """Start a command in the background; its output goes to the log."""
    file = log.open("ab")
    return subprocess.Popen(
        words, stdout=file, stderr=file, stdin=subprocess.DEVNULL, env={**os.environ, **environment}
    )


def call(*words: str, log: Path, **environment: str) -> None:
    """Run a command to its end; its output goes to the log."""
    ended = started(*words, log=log, **environment).wait()
    assert ended == 0, f"{' '.join(words)} ended with {ended}:\n{log.read_text()[-3000:]}"


def answer(token: str | None, about: str = "") -> tuple[int, Any]:
    """The dashboard's answer about its jobs, a job, or a job's output (`<job>/logs`)."""
    request = urllib.request.Request(f"{DASHBOARD}/api/jobs/{about}")
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, None
    except OSError:
        return 0, None  # not there yet


def instances(ec2: Any) -> list[dict[str, Any]]:
    """The instances that AWS reports as running or pending."""
    there = [node for group in ec2.describe_instances()["Reservations"] for node in group["Instances"]]
    return [node for node in there if node["State"]["Name"] in ("pending", "running")]


def workers(ec2: Any) -> list[dict[str, Any]]:
    return [node for node in instances(ec2) if {"Key": "ray-node-type", "Value": "worker"} in node["Tags"]]


def kind_of(node: dict[str, Any]) -> str:
    return str(next(tag["Value"] for tag in node["Tags"] if tag["Key"] == "ray-user-node-type"))


def raylet(node: dict[str, Any]) -> psutil.Process | None:
    """The raylet of an instance, by its address, once it runs."""
    flag = f"--node_ip_address={node['PrivateIpAddress']}"
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] == "raylet" and flag in (process.info["cmdline"] or []):
            return process
    return None


def lose(ec2: Any, node: dict[str, Any]) -> None:
    """Ends an instance as AWS reclaims a spot instance: everything on it ends at once, then it is gone."""
    root = raylet(node)
    assert root is not None
    for process in [root, *root.children(recursive=True)]:
        process.kill()
    ec2.terminate_instances(InstanceIds=[node["InstanceId"]])


@dataclass(frozen=True)
class Stage:
    """Locations: the folder of this machine's files, the changed cluster.yaml, the commands' output."""

    folder: Path
    ec2: Any

    @property
    def cluster(self) -> str:
        return str(self.folder / "cluster.yaml")

    @property
    def log(self) -> Path:
        return self.folder / "up.log"

    @property
    def no_spot(self) -> Path:
        """While this file exists, the cloud has no spot capacity."""
        return self.folder / "no-spot"

    @property
    def token(self) -> str:
        return (self.folder / "laptop/.ray/auth_token").read_text().strip()


def open_cloud(stage: Stage) -> subprocess.Popen[bytes]:
    """Start moto, give it the key pair that Ray would make, write the changed cluster.yaml and print the changes."""
    cloud = (sys.executable, "-m", "tests.slow.rayup.cloud", str(stage.no_spot))
    moto = started(*cloud, log=stage.log, MOTO_IAM_LOAD_MANAGED_POLICIES="true")  # Ray gives the head two of them
    image = until(lambda: images(stage.ec2), "moto")
    public = next((stage.folder / "laptop/.ssh").glob("*.pub"))
    stage.ec2.import_key_pair(KeyName=public.name.removesuffix(".pem.pub"), PublicKeyMaterial=public.read_bytes())
    content, changes = adapted(yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8")), image)
    Path(stage.cluster).write_text(yaml.safe_dump(content, sort_keys=False))
    print("cluster.yaml, but", *changes, sep="\n    ", flush=True)
    return moto


def come_up(stage: Stage) -> subprocess.Popen[bytes]:
    """Bring up the head, and forward its dashboard's port."""
    with step("ray up"):
        call("ray", "get-auth-token", "--generate", log=stage.log)
        call("ray", "up", "-y", "--no-config-cache", stage.cluster, log=stage.log)
    assert [kind_of(node) for node in instances(stage.ec2)] == ["head"]
    assert (HOME / ".ray/auth_token").stat().st_mode & 0o777 == 0o600
    forwarded = started("ray", "dashboard", stage.cluster, "-p", "8266", log=stage.log)
    with step("the dashboard, forwarded") as found:
        until(lambda: answer(None)[0], "the dashboard")
        another = "0" * len(stage.token)
        assert (answer(None)[0], answer(another)[0], answer(stage.token)[0]) == (401, 403, 200)
        found += ["401 without the token", "403 with another", "200 with it"]
    return forwarded


def submit(stage: Stage, job: str, *words: str) -> None:
    """Submit a sweep to the cluster, which runs on by itself."""
    command = ("ray", "job", "submit", "--no-wait", "--submission-id", job, "--address", DASHBOARD)
    sweep = ("--working-dir", "experiments", "--", "rayfed-sub", "sweep", *words)
    call(*command, *sweep, log=stage.log, RAY_AUTH_MODE="token")


def status(stage: Stage, job: str) -> Any:
    """The status in Ray's words; None without an answer."""
    _, found = answer(stage.token, job)
    return found and found["status"]


def printed(stage: Stage, job: str) -> str:
    output = until(lambda: answer(stage.token, f"{job}/logs")[1], "the job's output")
    return str(output["logs"])


def be_refused(stage: Stage) -> None:
    """More workers than the cluster can ever have: one line at once, and nothing is started for them."""
    with step("a sweep for 99 workers") as found:
        submit(stage, "99", *GRID, "resources.workers=99", "--out", str(HOME / "runs/99"))
        until(lambda: status(stage, "99") == "FAILED", "the refusal")
        ray = ("job_manager.py", "Running entrypoint")  # what Ray itself adds
        lines = [line for line in printed(stage, "99").splitlines() if not any(its in line for its in ray)]
        assert len(lines) == 1, lines
        assert "resources.workers: got 99; allowed: 1 to 4 with cpus_per_worker=1" in lines[0], lines
        assert not (HOME / "runs/99").exists()
        assert workers(stage.ec2) == []
        found.append(lines[0])


def survive(stage: Stage) -> pd.DataFrame:
    """A sweep that begins without a worker and loses all in the middle; its table."""
    sweep, ec2 = HOME / "runs/grid", stage.ec2

    def there(file: str) -> bool:
        """True if both trials have the file."""
        assert status(stage, JOB) not in ("FAILED", "STOPPED"), printed(stage, JOB)
        return all((sweep / "trials" / trial / file).exists() for trial in TRIALS)

    def up(kind: str) -> int:
        assert status(stage, JOB) not in ("FAILED", "STOPPED", "SUCCEEDED"), printed(stage, JOB)
        return sum(kind_of(node) == kind and raylet(node) is not None for node in workers(ec2))

    with step("ray job submit"):
        submit(stage, JOB, *GRID, "--out", str(sweep))
    with step("two spot workers, where there was none: both trials at once"):
        until(lambda: up("gpu-spot") == 2, "two workers")
        assert ", 2 at once, " in printed(stage, JOB)
    with step("the first rounds"):
        until(lambda: there("rounds.parquet"), "the first rounds")
    with step("both lost in the middle, spot refused from now on: two workers on demand"):
        stage.no_spot.touch()
        for node in workers(ec2):
            lose(ec2, node)
        assert not [trial for trial in TRIALS if (sweep / "trials" / trial / "summary.json").exists()]
        until(lambda: up("gpu-on-demand") == 2, "two others")
        assert up("gpu-spot") == 0
    with step("the sweep to its end"):
        until(lambda: there("summary.json") and status(stage, JOB) == "SUCCEEDED", "the sweep's end")
    with step("ray rsync-down") as found:
        call("ray", "rsync-down", stage.cluster, f"{sweep}/", str(stage.folder / "fetched"), log=stage.log)
        found.extend(short(table(stage.folder / "fetched")))
    for trial in TRIALS:
        ended = json.loads((stage.folder / "fetched/trials" / trial / "summary.json").read_text())
        assert ended["resumed"] == [], "a trial that loses its worker waits for another, and does not begin again"
    return table(stage.folder / "fetched")


def go(stage: Stage) -> None:
    """Idle workers stop by themselves, the head on command."""
    with step("no worker left, since they were idle"):
        until(lambda: not workers(stage.ec2), "the scale-down")
    with step("ray down") as found:
        call("ray", "down", "-y", stage.cluster, log=stage.log)
        assert instances(stage.ec2) == []
        found.append("no instance left")


def table(sweep: Path) -> pd.DataFrame:
    """The sweep's table; all its trials are finished."""
    frame = pd.read_parquet(sweep / "trials.parquet")
    assert list(frame["status"]) == ["finished"] * len(TRIALS), frame
    return frame


def short(frame: pd.DataFrame) -> list[str]:
    return [str(weights)[:16] for weights in frame["weights_sha256"]]


def main(folder: Path) -> None:
    stage = Stage(folder, boto3.client("ec2"))
    background = [open_cloud(stage)]
    try:
        background.append(come_up(stage))
        be_refused(stage)
        survived = survive(stage)
        go(stage)
    finally:
        started("cp", "-r", "/tmp/ray", str(folder / "ray"), log=stage.log).wait()  # its logs, for later inspection
        for process in background:
            process.terminate()
    with step("the same sweep on one machine, undisturbed, to the same table") as found:
        file, *overrides = GRID
        words = ("rayfed-sub", "sweep", f"experiments/{file}", *overrides, "--out", str(folder / "local"))
        call(*words, log=stage.log)
        pd.testing.assert_frame_equal(table(folder / "local"), survived)  # including the sums of the weights
        found.extend(short(survived))


def images(ec2: Any) -> str | None:
    """The id of an image that moto has, once it answers."""
    try:
        found = ec2.describe_images(Owners=["amazon"])["Images"]
    except (BotoCoreError, ClientError):  # it is still starting
        return None
    return str(found[0]["ImageId"]) if found else None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
