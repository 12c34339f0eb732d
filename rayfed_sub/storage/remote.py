"""Run folders in an object store: the run works in a temporary local folder (TMPDIR), whose new files are uploaded.

Upload order: the files that a manifest needs, then the manifest, then deletions, then summary.json.  So a run can go on
from the store wherever an upload was cut off.  An object appears whole or not at all, as do files of
`atomic_files.write`.

pyarrow takes address and credentials from the URI (s3://bucket/path?region=eu-central-1) and from the environment:
AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_PROFILE and the like, the machine's role; GOOGLE_APPLICATION_CREDENTIALS.
Credentials belong into the environment: in a URI they work, and are never shown or stored (`redacted` in
`core/errors.py`).
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from textwrap import shorten
from typing import Any

import pyarrow as pa
from pyarrow import fs

from rayfed_sub.core.errors import RunError, UserError, redacted
from rayfed_sub.storage.table_parts import KINDS, PARTS

_MANIFESTS = ("checkpoints/manifest-*.json", "checkpoints/best-*.json")
_NEEDED = (
    *("checkpoints/clients/[0-9]*.safetensors", "checkpoints/server-*.safetensors", "log.jsonl"),
    *(f"{name}.parquet" for name in KINDS),
    *(f"{name}.parquet/{PARTS}" for name in KINDS),
    *("model.json", "model.safetensors"),
    *("report.html", "tensorboard/*", "tracker-*.json"),  # for people, but complete where summary.json is there
)

Order = tuple[tuple[str, ...], ...]
"""Patterns of the files to send, in groups; files that are gone are deleted before the last group is sent.  No other
object of the store is read or changed.  The first file identifies the folder as a run's or a sweep's."""
RUN: Order = (("config.yaml",), _NEEDED, _MANIFESTS, ("summary.json",))
SWEEP: Order = (("sweep.yaml",), ("data.json", "trials.parquet", "curves.parquet", "best.yaml", "report.html"))
_REFUSED = (OSError, pa.ArrowException)
_THREADS = 16  # a small object takes tens of milliseconds, most of them on the way
_CHUNK = 8 * 2**20  # bytes read in one request
_SETTINGS = {
    "s3": "allow_delayed_open=true",  # a small file goes in one request, not in three
    **dict.fromkeys(("gs", "gcs"), "retry_limit_seconds=60"),  # pyarrow's is 15 minutes, also without a network
}

Sign = tuple[int, int, int]
"""Version of a file's content: inode, bytes, nanoseconds; `atomic_files.write` makes a new inode."""
_GONE: Sign = (0, 0, 0)


def uri_of(place: str | Path | None) -> str | None:
    """The URI of a place in an object store; None for a folder of this machine.

    >>> uri_of("s3://bucket/run/"), uri_of(Path("s3://bucket/run")), uri_of("runs/tiny"), uri_of(None)
    ('s3://bucket/run', 's3://bucket/run', None, None)
    """
    text = re.sub(r"^(s3|gs):/+", r"\1://", str(place))  # of two slashes a Path leaves one
    return text.rstrip("/") if re.match(r"[a-z][a-z0-9+.-]*://", text) else None


def inside(place: str, name: str) -> str:
    """Path or URI of a file or folder inside `place`, which is a folder of this machine or a URI.

    >>> inside("s3://bucket/run?region=eu-west-1", "config.yaml"), inside("runs/tiny", "config.yaml")
    ('s3://bucket/run/config.yaml?region=eu-west-1', 'runs/tiny/config.yaml')
    """
    base, mark, query = place.partition("?") if uri_of(place) else (place, "", "")
    return f"{base}/{name}{mark}{query}"


class Mirror:
    """Folder `root` of pyarrow's `filesystem`.  Remembers the files that it sent or fetched, and sends none twice.

    Refusals of the store are raised as OSError or ArrowException, by `push` as RunError.  Two runs must not use one
    folder at a time: an object store has no locks.
    """

    def __init__(self, uri: str, filesystem: Any, root: str, order: Order = RUN) -> None:
        self.uri, self.filesystem, self.root, self._order = uri, filesystem, root, order
        self._known: dict[str, Sign] = {}  # files in the store -> version of the local file

    def at(self, name: str = "") -> str:
        """URI of the folder, or of a file in it, without the credentials that `uri` may hold."""
        return redacted(inside(self.uri, name) if name else self.uri)

    def names(self) -> list[str]:
        """Names of the run's files in the store, relative to the folder."""
        patterns = [f"{self.root}/{pattern}" for group in self._order for pattern in group]
        found: list[fs.FileInfo] = []
        for at in sorted({pattern.rpartition("/")[0] for pattern in patterns}):  # each after the one that it is in
            if at == self.root or any(info.path == at and info.type == fs.FileType.Directory for info in found):
                found += self.filesystem.get_file_info(fs.FileSelector(at, allow_not_found=True))
        paths = [info.path.removeprefix(f"{self.root}/") for info in found if info.is_file]
        return [path for path in paths if any(_fits(path, pattern) for patterns in self._order for pattern in patterns)]

    def try_out(self) -> None:
        """Checks write access: writes a file and deletes it again."""
        path = f"{self.root}/.rayfed-sub"
        with self.filesystem.open_output_stream(path) as file:
            file.write(b"can this be written?")
        self.filesystem.delete_file(path)

    def pull(self, folder: Path) -> None:
        """Fetches the run into a folder, which is created.

        A table of which the store has one file and parts too, since an upload was cut off, is in that file: it is sent
        before its parts are deleted, and deleted before later parts are sent.
        """

        def fetch(name: str) -> None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            self._copy(self.filesystem, f"{self.root}/{name}", fs.LocalFileSystem(), str(folder / name))
            self._known[name] = _sign(folder / name)

        names = set(self.names())
        doubled = {name for name in names if name.rpartition("/")[0] in names}
        _each(fetch, names - doubled)
        self._known |= dict.fromkeys(doubled, _GONE)  # the next `push` deletes them

    def fetch(self, into: Path) -> Path:
        """Fetches the run, or the file that the URI names, into an existing folder; returns its path."""
        path = into / Path(self.root).name
        if self.filesystem.get_file_info(self.root).is_file:
            self._copy(self.filesystem, self.root, fs.LocalFileSystem(), str(path))
        else:
            self.pull(path)
        return path

    def push(self, folder: Path) -> None:
        """Sends new and changed files, and deletes those that are gone.  Raises RunError where the store refuses.

        Safe while the folder's owner writes a checkpoint.
        """

        def send(name: str) -> None:
            sign = _sign(folder / name)
            if self._known.get(name) != sign:
                self._copy(fs.LocalFileSystem(), str(folder / name), self.filesystem, f"{self.root}/{name}")
                self._known[name] = sign

        def delete(name: str) -> None:
            with suppress(FileNotFoundError):
                self.filesystem.delete_file(f"{self.root}/{name}")
            del self._known[name]

        # List the last group first: the files that a listed manifest needs were written before it.
        here = [_found(folder, patterns) for patterns in reversed(self._order)][::-1]
        *before, summary = here
        gone = self._known.keys() - {name for names in here for name in names}
        manifests = {name for name in gone if any(_fits(name, pattern) for pattern in _MANIFESTS)}
        try:
            for names in before:
                _each(send, names)
            _each(delete, manifests)
            _each(delete, gone - manifests)
            _each(send, summary)
        except _REFUSED as error:
            raise RunError("writing files", f"{self.at()}: {_line(error, self.uri)}") from None

    @staticmethod
    def _copy(source: Any, path: str, destination: Any, to: str) -> None:
        # In one call: an interruption would close a stream of our own, and leave a cut object that counts.
        fs.copy_files(path, to, source_filesystem=source, destination_filesystem=destination, chunk_size=_CHUNK)


@dataclass(frozen=True)
class Place:
    """A folder of this machine; with a mirror, a temporary folder whose files belong into an object store."""

    path: Path
    mirror: Mirror | None = None

    def display_name(self, name: str = "") -> str:
        """Path or URI of the folder, or of a file in it, as messages show it."""
        return str(self.path / name) if self.mirror is None else self.mirror.at(name)

    def push(self) -> None:
        """Sends new files to the object store, if there is one.  Raises RunError where the store refuses."""
        if self.mirror is not None:
            self.mirror.push(self.path)


def connect(uri: str, order: Order = RUN) -> Mirror:
    """Mirror of a URI.  Raises OSError or ArrowException where pyarrow knows no such store."""
    ours = _SETTINGS.get(uri.partition(":")[0], "")  # after those in the URI: the first of a name counts
    filesystem, root = fs.FileSystem.from_uri(f"{uri}{'&' if '?' in uri else '?'}{ours}" if ours else uri)
    if not root or isinstance(filesystem, fs.LocalFileSystem):
        raise OSError("no bucket is named")
    return Mirror(uri, filesystem, root, order)


@contextmanager
def open_place(out: str | Path, notify: Callable[[Any], None], *, resume: bool, order: Order = RUN) -> Iterator[Place]:
    """Place of a run or sweep: a folder of this machine, or a temporary folder that mirrors one in an object store.
    With `resume` the temporary folder begins with the files in the store.

    The run calls `push` after each checkpoint; on exit, also after an error, the rest is sent from here.
    Raises UserError where the store cannot be written to, or holds a run that is not to be resumed; RunError where the
    last files cannot be sent: they then stay in the temporary folder.
    """
    from rayfed_sub.telemetry.events import Notice, Stage  # reaches torch, for which `local_copy` need not wait

    uri = uri_of(out)
    if uri is None:
        yield Place(Path(out))
        return
    with store_errors(uri, "--out"):
        mirror = connect(uri, order)
        mirror.try_out()
        names = mirror.names()
    if names and not (resume and order[0][0] in names):
        advice = "choose another, or go on with --resume" if order[0][0] in names else "choose another"
        raise UserError("--out", uri, "a folder without a run in it", advice)
    path, unsent = Path(tempfile.mkdtemp(prefix="rayfed-sub-")), False
    try:
        if names:
            notify(Stage(f"fetching what is in {mirror.at()}"))
            with store_errors(uri, "--out"):
                mirror.pull(path)
        try:
            with _errors_name_uri(path, uri):
                yield Place(path, mirror)
        finally:
            unsent = True
            mirror.push(path)
            unsent = False
    finally:
        if unsent:
            lost = f"what could not be sent to {mirror.at()} is in {path}"
            notify(Notice(f"{lost}: go on there, with --out {path} --resume"))
        else:
            shutil.rmtree(path, ignore_errors=True)  # an actor on its way out may still be writing


@contextmanager
def local_copy(place: str | Path, field: str) -> Iterator[Path]:
    """Path of a local file or run folder, unchanged; for a URI, that of a copy in a temporary folder.

    Raises UserError, naming `field`, where the copy cannot be fetched.
    """
    uri = uri_of(place)
    if uri is None:
        yield Path(place)
        return
    with tempfile.TemporaryDirectory(prefix="rayfed-sub-") as folder:
        with store_errors(uri, field):
            path = connect(uri).fetch(Path(folder))
        with _errors_name_uri(path, uri):
            yield path


def _found(folder: Path, patterns: Iterable[str]) -> list[str]:
    found = (path for pattern in patterns for path in folder.glob(pattern))
    return sorted(str(path.relative_to(folder)) for path in found if path.is_file())


def _fits(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatch(name, pattern)


def _sign(path: Path) -> Sign:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _each(action: Callable[[str], None], names: Iterable[str]) -> None:
    """Calls `action` for all names in threads; raises the first error once the calls that began have ended."""
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(action, names))


@contextmanager
def _errors_name_uri(path: Path, uri: str) -> Iterator[None]:
    """Puts the URI in place of the temporary path in UserErrors."""
    try:
        yield
    except UserError as error:
        value = error.value.replace(str(path), uri) if isinstance(error.value, str) else error.value
        allowed, advice = (text.replace(str(path), uri) for text in (error.allowed, error.advice))
        raise UserError(error.field, value, allowed, advice) from None


@contextmanager
def store_errors(uri: str, field: str) -> Iterator[None]:
    """Turn a store's refusal before the start into a UserError."""
    try:
        yield
    except _REFUSED as error:
        advice = "check its name, the credentials and the network"
        raise UserError(field, uri, f"what an object store gives access to ({_line(error, uri)})", advice) from None


def _line(error: Exception, uri: str) -> str:
    """The store's error in one line; without its text where the URI holds credentials, which pyarrow may repeat."""
    if redacted(uri) != uri:
        return f"{type(error).__name__}, whose text may repeat the credentials in the URI"
    return shorten(redacted(str(error)), 300)  # Google's have a thousand characters
