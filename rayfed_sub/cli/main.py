"""The command line.  Heavy libraries are imported inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

import rayfed_sub
from rayfed_sub.cli.trust import check_classes, check_named, check_programs
from rayfed_sub.config.edits import check_editable, edited
from rayfed_sub.config.loading import load_config
from rayfed_sub.core.errors import RunError, UserError, redacted, unknown_word
from rayfed_sub.runtime.fork_server import joins
from rayfed_sub.runtime.front import drive, front_of_this_process

app = typer.Typer(
    name="rayfed-sub",
    help="Federated fine-tuning in gradient subspaces, simulated on Ray.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

PACK_SIZE = "resources.pack_size"
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="the configuration")]
Anywhere = Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="the configuration, here or at s3://bucket/path")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. method.rank=4")]
Resume = Annotated[bool, typer.Option("--resume", help="go on with what is in the folder")]
Out = Annotated[
    str | None, typer.Option("--out", help="its folder, or s3://bucket/path (default: runs/<name>)", metavar="DIR")
]
Address = Annotated[
    str | None,
    typer.Option("--address", help="a Ray cluster to join: auto, or HOST:PORT (default: RAY_ADDRESS, or none)"),
]


@app.command()
def run(
    context: typer.Context,
    config: Anywhere,
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    address: Address = None,
) -> None:
    """Run a federated job to the end; Ctrl-C leaves a checkpoint to go on from."""
    from rayfed_sub.storage.remote import local_copy

    with local_copy(config, "CONFIG.yaml") as path:
        checked = load_config(path, overrides or [])
    check_classes(config, checked, overrides or [])
    check_programs(config, checked.programs, overrides or [])
    elsewhere: Callable[[], int | None] | None = context.obj
    if elsewhere is not None and checked.resources.forked and not joins(address):
        code = elsewhere()
        if code is not None:
            raise _Ended(code)
    from rayfed_sub.cli.run_view import Display

    with Display() as display:
        summary = rayfed_sub.run(checked, out, display.show, resume=resume, address=address)
    display.table(summary)


@app.command()
def sweep(
    file: Annotated[str, typer.Argument(metavar="SWEEP.yaml", help="a configuration with a section `sweep`")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. method.rank=4 sweep.trials=20")
    ] = None,
    out: Out = None,
    resume: Resume = False,
    address: Address = None,
) -> None:
    """Run one configuration at many points of a space, side by side."""
    from rayfed_sub.storage.remote import local_copy
    from rayfed_sub.sweeps.space import load_sweep

    with local_copy(file, "SWEEP.yaml") as path:
        checked = load_sweep(
            path, overrides or [], lambda group, name, base: check_named(base or file, group, name, overrides or [])
        )
    for place in (file, *checked.base):
        check_programs(place, checked.programs, overrides or [])
    from rayfed_sub.cli.sweep_view import SweepDisplay
    from rayfed_sub.sweeps.runner import run_sweep

    with SweepDisplay() as display:
        result = run_sweep(checked, out, display.show, resume=resume, address=address)
    display.table(result.frame, result.best[0] if result.best else None)


@app.command()
def study(
    file: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="a claim, its variants and its seeds")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="for all runs, e.g. task.path=FILE.parquet")
    ] = None,
    runs: Annotated[Path, typer.Option("--runs", metavar="DIR", help="its run folders")] = Path("runs/studies"),
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="runs at a time, at most")] = 1,
    show: Annotated[bool, typer.Option("--show", help="run nothing: the table of the rows that are there")] = False,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="VARIANT",
            help="run nothing: this variant's scores less each other's, seed by seed, and their ratio",
        ),
    ] = None,
) -> None:
    """Run variants of one configuration, tuned first, over several seeds, or go on with them."""
    from rayfed_sub.sweeps.study import check_variant, load_study

    checked = load_study(file)
    if show or against is not None:
        from rayfed_sub.sweeps.study_clocks import tables
        from rayfed_sub.sweeps.study_tables import csv_files, differences, read_rows

        if against is None:
            lines = tables(checked)
        else:
            check_variant(checked, "--against", against)
            lines = differences(checked, read_rows(csv_files(checked)[0]), against)
        typer.echo("\n".join(lines))
        return
    given = [*checked.set, *(overrides or [])]
    base = load_config(checked.base, given)
    check_classes(str(checked.base), base, given)
    check_programs(str(checked.base), base.programs, given)
    from rayfed_sub.cli.sweep_view import SweepDisplay
    from rayfed_sub.sweeps.study_runner import run_study

    typer.echo(checked.claim.strip())
    with SweepDisplay() as display:
        lines = run_study(checked, overrides or [], runs, jobs, display.show)
    typer.echo("\n".join(lines))


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
    probe: Annotated[
        bool, typer.Option("--probe", help="time a few local steps as well, and find the quickest pack size")
    ] = False,
    write: Annotated[
        bool, typer.Option("--write", help="with --probe: set that pack size in CONFIG.yaml, and nothing else")
    ] = False,
    on: Annotated[
        str | None, typer.Option("--on", metavar="GPU", help="what fits on a GPU, e.g. a100-80gb, l4, or 24GB")
    ] = None,
) -> None:
    """Bytes, memory, disk and what fits, before anything starts."""
    checked = load_config(config, overrides or [])
    check_classes(str(config), checked, overrides or [])
    check_programs(str(config), checked.programs, overrides or [])
    if write:
        _check_write(config, overrides or [], probe, on)
    from dataclasses import replace

    from rayfed_sub.methods import adopted
    from rayfed_sub.planning.fit import roomy_packs
    from rayfed_sub.planning.job import prepare
    from rayfed_sub.planning.plan import as_dict, check, plan_of
    from rayfed_sub.storage.earlier_runs import read_start

    checked, left_out = adopted(checked)
    if left_out:
        typer.echo(f"rayfed-sub: {left_out}", err=True)
    job = prepare(checked, start=read_start(checked))
    planned = plan_of(job, on)
    check(job, on=on)
    if probe:
        from rayfed_sub.runtime import probe as timing

        planned = replace(planned, speed=timing.probe(job, roomy_packs(planned.fits, job.config.resources)))
    if as_json:
        typer.echo(json.dumps(as_dict(planned), indent=2))
    else:
        from rayfed_sub.cli.plan_view import show

        show(planned)
        if probe and not write and planned.speed.best != planned.speed.now:
            typer.echo(f"rayfed-sub plan {config} --probe --write sets it in the file")
    if write:
        from rayfed_sub.cli.plan_view import written

        if planned.speed.best != planned.speed.now:
            _set(config, PACK_SIZE, planned.speed.best)
        typer.echo(written(config, checked.resources.pack_size, planned.speed), err=as_json)


def _check_write(config: Path, overrides: list[str], probe: bool, on: str | None) -> None:
    """UserError where --write cannot work, before minutes are spent on the probe."""
    if not probe:
        raise UserError("--probe", False, "given with --write, which sets the pack size that it finds", "add --probe")
    if on is not None:
        raise UserError("--on", on, "nothing with --write, for this machine is what --probe times", "leave one out")
    check_editable(config, PACK_SIZE, overrides)


def _set(config: Path, key: str, number: int) -> None:
    """Sets the key in an existing file, or in the target of a link; keeps its permissions."""
    from rayfed_sub.storage.atomic_files import write

    path = config.resolve()
    rights = path.stat().st_mode
    write(path, edited(path, key, number).encode())
    path.chmod(rights)


@app.command()
def data(
    config: ConfigFile,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.png|.svg|.pdf", help="write the picture to a file as well")
    ] = None,
) -> None:
    """Rows, tokens and classes (without a label, keys) of every client, before anything starts."""
    from rayfed_sub.cli.partition_picture import check_path, draw

    if out is not None:
        check_path(out)
    checked = load_config(config, overrides or [])
    from rayfed_sub.data.partition_stats import as_dict, read_partition_stats
    from rayfed_sub.planning.job import model_kind, processor_of

    held = read_partition_stats(checked, processor_of(checked, model_kind(checked)))
    if out is not None:
        draw(held, out)
    if as_json:
        typer.echo(json.dumps(as_dict(held), indent=2))
    else:
        from rayfed_sub.cli.data_view import show

        show(held)


@app.command()
def report(
    run_dirs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="folders of runs, finished or not, or s3://bucket/path")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.html", help="the file (default: report.html, in a single run)")
    ] = None,
) -> None:
    """Write one run, or several side by side, as a page for a browser; it needs no network."""
    from contextlib import ExitStack

    from rayfed_sub.reports.report import write_report
    from rayfed_sub.reports.run_reader import read_run
    from rayfed_sub.storage.remote import local_copy, uri_of
    from rayfed_sub.storage.run_folder import make

    alone = len(run_dirs) == 1 and uri_of(run_dirs[0]) is None
    path = out or (Path(run_dirs[0]) if alone else Path()) / "report.html"
    if path.is_dir() or uri_of(path) is not None:
        raise UserError("--out", str(path), "a file of this machine", "e.g. --out report.html")
    with ExitStack() as stack:
        runs = [read_run(stack.enter_context(local_copy(place, "RUN")), redacted(place)) for place in run_dirs]
        make(path.parent, "--out")
        write_report(runs, path)
    typer.echo(path)


@app.command()
def retime(
    run_dir: Annotated[str, typer.Argument(metavar="RUN", help="a finished synchronous run, or s3://bucket/path")],
    devices: Annotated[
        Path, typer.Option("--devices", metavar="FILE.yaml", help="a section `devices`, see rayfed-sub config devices")
    ],
    target: Annotated[
        str | None, typer.Option("--target", metavar="SCORE=VALUE", help="what it costs to reach, e.g. held_out_loss=2")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """Tell a finished run again for other devices and links: nothing is trained."""
    from dataclasses import replace

    from rayfed_sub.cli.retime_view import show, target_of
    from rayfed_sub.reports.retiming import devices_in, retimed, with_devices
    from rayfed_sub.reports.run_reader import read_run
    from rayfed_sub.reports.simulated_time import told
    from rayfed_sub.storage.remote import local_copy
    from rayfed_sub.storage.run_folder import finished

    asked = devices_in(devices)
    with local_copy(run_dir, "RUN") as folder:
        finished(folder)
        run = read_run(folder, redacted(run_dir))
    wanted = None if target is None else target_of(run, target)
    timeline = retimed(run, asked)
    again = replace(run, config=with_devices(run.config, asked), timeline=timeline)
    if as_json:
        typer.echo(json.dumps(told(again), indent=2))
    else:
        show(again, told(again), wanted)


@app.command()
def export(
    run_dir: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="the folder of a finished run, or s3://bucket/path; for flower also a YAML file"
        ),
    ],
    to: Annotated[Path, typer.Option("--to", help="the folder to write")],
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="hf|peft|state-dict|flower",
            help="hf: a transformers model folder (default); peft: a LoRA adapter, which is much smaller; state-dict: "
            "of a model that a Python call handed over; flower: a Flower app that trains on real machines",
        ),
    ] = None,
    client: Annotated[
        int | None, typer.Option("--client", help="whose model, with methods that give every client its own")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option("--method", help="the run's method where it is your own: package.module:Class"),
    ] = None,
    hook: Annotated[
        str | None,
        typer.Option("--hook", help="for a Flower app: the run's hook where it is your own: package.module:Class"),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            "--checkpoint",
            metavar="last|best",
            help="the last round's (default), or the best (early_stopping.metric); a Flower app goes on from it, and "
            "begins anew without",
        ),
    ] = None,
) -> None:
    """Write the trained model so that transformers, peft or its own module loads it, or a run as a Flower app.

    Prints the line of Python that loads it, to be run in its folder wherever
    that lies; README.md there has it too, with how to make a prompt. Where
    transformers could not load an adapter's base by a name (random, GGUF, with
    a classification head), it is written beside the adapter, to the folder base.
    Of a Flower app it prints the command that starts it.
    """
    from rayfed_sub.export.exported import LAST, export_hf, export_peft, export_state, usual_format
    from rayfed_sub.export.flower import export_flower
    from rayfed_sub.storage.remote import local_copy

    formats = {"hf": export_hf, "peft": export_peft, "state-dict": export_state}
    if format is not None and format not in (*formats, "flower"):
        raise unknown_word("--format", format, [*formats, "flower"])
    if format == "flower" and client is not None:
        raise UserError("--client", client, "nothing with --format flower, whose nodes are the clients", "leave it out")
    if format != "flower" and hook is not None:
        allowed = "nothing without --format flower, for a trained model is read without its hook"
        raise UserError("--hook", hook, allowed, "leave it out")
    with local_copy(run_dir, "RUN") as folder:
        if format == "flower":
            if not folder.is_dir():
                named = [f"{key}.name={name}" for key, name in (("method", method), ("hook", hook)) if name is not None]
                check_classes(run_dir, load_config(folder), named, "--{group} {name}")
            written = export_flower(folder, to, method, checkpoint, hook)
        else:
            written = formats[format or usual_format(folder)](folder, to, client, method, checkpoint or LAST)
    if written.warning is not None:
        typer.echo(f"rayfed-sub: {written.warning}", err=True)
    typer.echo(written.loading)


@app.command("config")
def config_(
    key: Annotated[
        str | None,
        typer.Argument(metavar="[KEY]", help="a key or a group, e.g. optimizer.lr, federation, sweep"),
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="a JSON schema of runs and sweeps, by which editors complete and check")
    ] = False,
) -> None:
    """Print the keys of a configuration, a sweep or a study: default, type, allowed values, meaning."""
    if schema and key is not None:
        raise UserError("KEY", key, "nothing with --schema, which has all keys", "leave one out")
    if schema:
        from rayfed_sub.cli.editor_schema import editor_schema

        typer.echo(json.dumps(editor_schema(), indent=2))
    else:
        from rayfed_sub.cli.config_view import show

        show(key)


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(metavar="methods|choices|hooks|tasks|models")],
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="as a table for a document")] = False,
) -> None:
    """List the methods, facts to choose one by, hooks, tasks or model presets."""
    from rayfed_sub.cli.listings import LISTINGS, families, markdown

    if what not in LISTINGS:
        raise unknown_word("WHAT", what, list(LISTINGS))
    columns, rows = LISTINGS[what]()
    if as_markdown:
        typer.echo(markdown(columns, rows))
    elif as_json:
        typer.echo(json.dumps([dict(zip(columns, row, strict=True)) for row in rows], indent=2))
    else:
        from rayfed_sub.cli.run_view import print_table

        left, groups = families(columns, rows)
        for family, members in groups:
            if family:
                typer.echo(f"\n{family}")
            print_table(left, members, whole=True)


class _Ended(Exception):  # noqa: N818
    """Another process has run the command, to this exit code, and has said what is to be said."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def main() -> None:
    """Exit codes: 0 done; 1 the run could not go on; 2 something for the person to mend; 130 interrupted."""
    sys.exit(_code())


def command() -> None:
    """`main` in a process of its own, which ends here; a run may have two of them (`runtime/front.py`)."""
    front = front_of_this_process()
    try:
        code = _code(partial(drive, __file__, sys.argv) if front is None else None)
    except BaseException as error:  # as the interpreter would end, so that a front learns of it
        traceback.print_exc()
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed from the beginning
        with suppress(OSError, ValueError):  # `| head` has seen enough, or somebody has closed it
            stream.flush()
    if front is not None:
        front.ended(code)
    os._exit(code)  # the interpreter would take the imported libraries apart, for more than a second


def _code(elsewhere: Callable[[], int | None] | None = None) -> int:
    """elsewhere: runs the command line in another process, where it can, and returns its exit code."""
    os.environ.setdefault(
        "TQDM_DISABLE", "1"
    )  # transformers reads GGUF files under a bar, which makes 30 lines in ours
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a machine that is taken away asks like Ctrl-C
    try:
        # A number where it ends early: 0 after --help, 130 with Ctrl-C.
        code: int | None = app(standalone_mode=False, obj=elsewhere)
    except UserError as error:
        print(f"rayfed-sub: {error}", file=sys.stderr)
        return 2
    except TyperException as error:
        message = error.format_message() if isinstance(error, typer.BadParameter) else str(error)
        if message:  # nothing where Typer has shown the help because nothing was asked for
            line = redacted(" ".join(message.split())).rstrip(".")
            print(f"rayfed-sub: {line}; see rayfed-sub --help", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"rayfed-sub: {error}", file=sys.stderr)
        return 1
    except SystemExit as ended:
        if not isinstance(ended.__context__, BrokenPipeError):
            raise
        return 1  # `| head` has seen enough, at which Rich and Typer end the process
    except _Ended as ended:
        return ended.code
    if code == 130:
        print("rayfed-sub: interrupted", file=sys.stderr)
    return code or 0


if __name__ == "__main__":
    command()
