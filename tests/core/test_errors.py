"""UserError and RunError: one line each, unchanged across a process boundary."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from rayfed_sub.config.schema import Config
from rayfed_sub.core.errors import RunError, UserError, redacted
from rayfed_sub.methods.scaffold import Scaffold
from rayfed_sub.planning.call import NOTHING, Given
from rayfed_sub.runtime.session import _resume_hint
from rayfed_sub.storage import checkpoints
from rayfed_sub.storage.remote import Place
from rayfed_sub.storage.run_folder import RunFolder
from rayfed_sub.telemetry.environment import environment, machine, merged
from rayfed_sub.training.client_errors import client_failed

USER = UserError("task.prompt", "{a}\n{b}", "a template", "see\n  the manual")
RUN = RunError("local training", "the loss is not finite", round=3, client=17, resume=None)


def test_user_error_is_one_line_of_field_value_allowed_and_advice() -> None:
    assert str(USER) == r"task.prompt: got '{a}\n{b}'; allowed: a template; see the manual"
    assert str(UserError("seed", -1, "an integer >= 0")) == "seed: got -1; allowed: an integer >= 0"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RUN, "round 3, client 17, local training: the loss is not finite"),
        (RunError("start", "no workers"), "start: no workers"),
        (RunError("x", "y", round=0), "round 0, x: y"),
        (RunError("x", "y", client=0), "client 0, x: y"),
    ],
)
def test_run_error_names_round_client_stage_and_cause(error: RunError, text: str) -> None:
    assert str(error) == text


@pytest.mark.parametrize("error", [USER, RUN, RunError("start", "no workers")], ids=["user", "run", "run, bare"])
def test_errors_survive_a_process_boundary(error: Exception) -> None:
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back) == vars(error)


def test_user_error_is_a_value_error_and_run_error_a_runtime_error() -> None:
    """A calling program can catch the built-in types without importing ours."""
    assert isinstance(USER, ValueError)
    assert isinstance(RUN, RuntimeError)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://AKIA:abc@bucket/run", "s3://bucket/run"),
        ("s3:/AKIA:abc@bucket/run", "s3:/bucket/run"),  # the form that a Path gives it
        ("S3://AKIA:abc@bucket", "S3://bucket"),
        ("gs://someone@bucket/run", "gs://bucket/run"),
        ("s3://AKIA:a/b+c@d@bucket/run?region=eu", "s3://bucket/run?region=eu"),  # a key with a slash and an @
        ("s3://b/r?access_key=A&secret_key=B&session_token=C", "s3://b/r"),
        ("s3://b/r?region=eu&access_key=A&scheme=http", "s3://b/r?region=eu&scheme=http"),
        ("s3://b/r?X-Amz-Signature=A&X-Amz-Date=1", "s3://b/r?X-Amz-Date=1"),
        ("s3://b/r?endpoint_override=http://u:p@h:9000", "s3://b/r?endpoint_override=http://h:9000"),
        ("s3://AKIAKEY:7/SECRET/SECRET@bucket/run", "s3://bucket/run"),  # no port: HTTP only
        ("gs://K:12/3@bucket; s3:9/4", "gs://bucket; s3:9/4"),
        ("http://host:9000/a@b and http://K:S@host:9000/a@b", "http://host:9000/a@b and http://host:9000/a@b"),
        ("s3:////K:S@b/run", "s3:////b/run"),
        ("s3://b/r?endpoint_override=http%3A%2F%2Fu%3Apw%40h", "s3://b/r?endpoint_override=http%3A%2F%2Fh"),
        ("s3://b/r?endpoint_override=http%253A%252F%252Fu%253Apw%2540h", "s3://b/r?endpoint_override=http%3A%2F%2Fh"),
        ("s3://b/r?secret%5Fkey=S&%73ecret%5Fkey=S&region=eu", "s3://b/r?region=eu"),
        ("s3://b/r?endpoint_override=http%3A%2F%2Fh%3A9000", "s3://b/r?endpoint_override=http%3A%2F%2Fh%3A9000"),
        ("no: 's3://K:S@b/r?token=t', gone; try", "no: 's3://b/r', gone; try"),
        ("http://host:9000/a@b, x@y.org: what?", "http://host:9000/a@b, x@y.org: what?"),
        ("runs/a@b?key=c", "runs/a@b?key=c"),
    ],
)
def test_credentials_are_not_repeated(text: str, shown: str) -> None:
    assert redacted(text) == shown
    assert str(UserError("--out", text, f"not {text}", f"use {text}")) == str(
        UserError("--out", shown, f"not {shown}", f"use {shown}")
    )
    assert str(RunError("writing files", text)) == f"writing files: {shown}"


SKIP = "federation.on_client_failure=skip"


@pytest.mark.parametrize(
    ("cause", "advice"),
    [
        ("non-finite loss at local step 1", f"lower optimizer.lr and begin anew in another folder; {SKIP} would leave"),
        ("non-finite norm of its change", "lower optimizer.lr and begin anew in another folder"),
        (
            "batch of local step 2: ValueError: not a finite number",
            f"{SKIP} would go on without it; go on with: rayfed",
        ),
        ("batch of local step 2: OSError: gone", f"{SKIP} would go on without it; go on with: rayfed-sub run"),
    ],
)
def test_advice_after_a_client_failure_fits_the_cause(
    cause: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that resumes from its checkpoint gets the same loss again; without the client it gets further."""
    monkeypatch.setattr(checkpoints, "newest", lambda folder: 3)
    config = Config(name="x", method={"name": "mine.module:Mine"})
    with pytest.raises(RunError) as caught, _resume_hint(RunFolder(Place(tmp_path)), config, print):
        raise client_failed(cause, 4, 17)
    message = str(caught.value)
    assert message.startswith(f"round 4, client 17, local training: {cause}; {advice}")
    path = tmp_path / "config.yaml"
    words = f"rayfed-sub run {path} method.name=mine.module:Mine {SKIP} --out {tmp_path} --resume"
    assert message.endswith(words) == ("non-finite" not in cause)
    assert ("--resume" in message) == ("non-finite" not in cause)


@pytest.mark.parametrize(
    ("error", "resumes"),
    [
        (RunError("writing files", "No space left on device"), True),
        (RunError("local training", "pack 0 lost 3 times in a row: a worker died"), True),
        (RunError("aggregation", "non-finite values in a/left", resume=None), False),
    ],
)
def test_resume_command_is_given_where_it_helps(
    error: RunError, resumes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(Place(tmp_path))
    monkeypatch.setattr(checkpoints, "newest", lambda folder: 3)
    with pytest.raises(RunError) as caught, _resume_hint(folder, Config(), print):
        raise error
    hint = f"; go on with: rayfed-sub run {tmp_path / 'config.yaml'} --out {tmp_path} --resume"
    assert str(caught.value) == f"{error}{hint if resumes else ''}"
    monkeypatch.setattr(checkpoints, "newest", lambda folder: None)  # nothing to resume from
    with pytest.raises(RunError) as caught, _resume_hint(folder, Config(), print):
        raise error
    assert str(caught.value) == str(error)


@pytest.mark.parametrize(
    ("config", "given"),
    [
        (Config(), Given(hook=Scaffold())),
        (Config(), Given(callbacks=(print,))),
        (Config(method={"name": "__main__:Mine"}), NOTHING),
        (Config(callbacks=("mine.module:made.<locals>.callback",)), NOTHING),
    ],
)
def test_call_with_objects_goes_on_in_python(
    config: Config, given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "newest", lambda folder: 3)
    for resume, words in (((), ""), ((SKIP,), f", with {SKIP}")):
        error = RunError("local training", "gone", resume=resume)
        with pytest.raises(RunError) as caught, _resume_hint(RunFolder(Place(tmp_path)), config, print, given):
            raise error
        hint = f"go on with the same call in Python{words}: run(..., {str(tmp_path)!r}, resume=True)"
        assert str(caught.value) == f"{error}; {hint}"


def test_environment_reports_the_workers_versions_and_devices() -> None:
    """A head without a GPU starts a run whose workers have two kinds of GPU."""
    reports = [{"processor": "EPYC", "cpu_capability": "AVX2", "gpu": gpu} for gpu in ("L4", "A100", "L4")]
    assert environment(Config(), reports, False) == {
        **{"processor": "EPYC", "threads": 1, "pack_size": 4, "cpu_capability": "AVX2", "gpu": "A100, L4"},
    }
    alone = environment(Config(), [{**reports[0], "gpu": None}], True)
    assert (alone["gpu"], alone["pack_size"]) == (None, "any")
    assert merged([{"torch": "2.13.0+cu128"}, {"torch": "2.13.0"}]) == {"torch": "2.13.0, 2.13.0+cu128"}
    assert machine(gpu=False)["gpu"] is None
