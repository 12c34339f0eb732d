"""One Ray session for the whole test run: 4 CPUs and 1 GPU as counters, so that placement can be tested anywhere."""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from rayfed_sub.telemetry.events import Summary

# The tests' matrices are tiny: more threads only wait for each other.  Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two processes share the tests (`-n 2 --dist loadgroup`): one begins with all that use Ray, in one Ray session,
    the other takes the rest file by file."""
    with_ray = {"ray_session", "undisturbed_job"}

    def group(item: pytest.Item) -> str:
        room = Path(item.path).parent.name
        uses_ray = room in ("end_to_end", "runtime", "sweeps") or with_ray & set(getattr(item, "fixturenames", ()))
        return "ray" if uses_ray else str(item.path)

    for item in items:
        item.add_marker(pytest.mark.xdist_group(group(item)))
    items.sort(key=lambda item: group(item) != "ray")


def pytest_collection_finish() -> None:
    """The tests and the libraries that they import stay to the end: the garbage collector need not visit them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def shared_models(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test changes the models that all tests share."""
    yield
    helpers = sys.modules.get("tests.helpers.tiny_models")
    own = [getattr(value, "__module__", None) for value in vars(request.module).values()]
    if helpers is not None and helpers.__name__ in own:
        names = [type(tiny.model).__name__ for tiny in helpers.SHARED if not tiny.intact]
        assert not names, f"a test of {request.module.__name__} changed the weights of {names}"


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    from rayfed_sub.runtime.fork_server import fork_server

    with fork_server(wanted=True) as forks:
        ray.init(
            address="local",
            num_cpus=4,
            num_gpus=1,
            include_dashboard=False,
            object_store_memory=1_000_000_000,
            log_to_driver=False,
            logging_level="error",
            runtime_env={} if forks is None else {"py_executable": forks},
        )
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def undisturbed_job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Summary]:
    """The job of `helpers/chaos.py`, run once in this process, for all tests that disturb it; none may change its
    folder."""
    from tests.helpers import chaos

    summary = chaos.undisturbed(0, tmp_path_factory.mktemp("undisturbed") / "run")
    before = contents(Path(summary.folder))
    yield summary
    assert contents(Path(summary.folder)) == before, "a test changed the run that others compare with"


def contents(folder: Path) -> dict[str, str]:
    """The checksum of every file in the folder, by path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """An S3 server in this process, with the environment variables that point to it."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # one line per request
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "somebody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield "s3://bucket"
    server.stop()
