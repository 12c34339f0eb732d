"""The sources of a task's rows: hub ids, folders, files and globs, by split and by client."""

from __future__ import annotations

import glob
import logging
import os
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayfed_sub.config.schema import Task
from rayfed_sub.core.errors import UserError
from rayfed_sub.data.hub_client import hub_or_cache, is_hub_id, plain_files
from rayfed_sub.data.readers import READERS, Part, Wanted, read_file
from rayfed_sub.data.split_names import SPLITS, Split, bare_split, split_of

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)

_PLAIN = (*(suffix for suffix in READERS if suffix != ".parquet"), ".md")
"""Suffixes of a hub's data set in whose files `datasets` would guess at types."""
_IMAGES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"))


_NAMED = 3  # files named in a warning

_NO_ROWS = _IMAGES | frozenset(("", ".md", ".rst", ".html", ".pdf", ".py", ".sh", ".ipynb", ".yaml", ".yml", ".toml"))
"""Suffixes of files that lie beside rows and hold none."""


@dataclass(frozen=True, eq=False)
class Source:
    """A file, or a data set that `datasets` has read.  client: the name that the file's place gives it."""

    place: str
    file: Path | None = None
    data: datasets.Dataset | None = None
    client: str = ""


Found = Mapping[str, Sequence[Source]]
"""Sources by the name of their split; what has no splits is "train"."""


def sources_of(task: Task, by_client: bool = False) -> dict[Split, list[Source]]:
    """The sources of the task's splits; with task.split_column all are in train, as rows say their splits themselves.

    Raises UserError (task.path, task.train, task.validation, task.test) for a split or a file that is not there, and
    for one that is named twice.
    """
    found: dict[str, list[Source]] = {}
    for place in listed(task.path):
        for split, sources in sources_at("task.path", place, by_client, task.image is not None).items():
            found.setdefault(split, []).extend(sources)
    if task.split_column is not None:
        every = [source for sources in found.values() for source in sources]
        _check_once(task, {"train": every})
        return {"train": every}
    chosen: dict[Split, list[Source]] = {}
    for split in SPLITS:
        names = names_of(task, split, found)
        chosen[split] = [source for name in names for source in _named(task, split, name, found, by_client)]
    if not chosen["train"]:
        allowed = f"names of the training rows, of the splits {', '.join(found) or 'of task.path'} or of files"
        raise UserError("task.train", task.train, allowed, "set task.train")
    if task.train is None and any(glob.has_magic(place) or _is_file(place) for place in listed(task.path)):
        _warn_of_names(chosen["train"])
    _check_once(task, chosen)
    used = {id(source) for sources in chosen.values() for source in sources}
    if idle := [name for name, sources in found.items() if not any(id(source) in used for source in sources)]:
        log.warning("task.path: the splits %s are not used", ", ".join(idle))
    return chosen


def _check_once(task: Task, chosen: Mapping[Split, Sequence[Source]]) -> None:
    """UserError for a source that two splits have, or one twice."""
    seen: dict[object, Split] = {}
    named: set[object] = set()
    for split, sources in chosen.items():
        for source in sources:
            given = getattr(task, split)
            other = seen.setdefault(source.file.resolve() if source.file else source.place, split)
            if other != split:
                allowed = f"other rows than task.{other} has; {source.place} is in both"
                raise UserError(f"task.{split}", given, allowed, "name another split or file")
            # Files of one content may be links to one file, as in the hub's cache.
            place = os.path.abspath(source.file) if source.file else source.place
            if place in named:
                field, value = ("task.path", task.path) if given is None else (f"task.{split}", given)
                allowed = f"each file once, whose rows would count twice; {source.place} comes again"
                raise UserError(field, value, allowed, "name it once")
            named.add(place)


def _is_file(place: str) -> bool:
    return os.path.isfile(os.path.expanduser(place))


def _warn_of_names(sources: Sequence[Source]) -> None:
    """Warning of files that are trained on as task.path names them one by one, or by a glob, and whose names say that
    they are for something else."""
    files = [source.place for source in sources if source.file is not None]
    if strange := [place for place in files if split_of(Path(place))[0] not in (None, "train")]:
        log.warning(
            "task.path: %s of %s training files have names of another split: %s; name them in task.test or "
            "task.validation, or give their folder",
            f"{len(strange):,}",
            f"{len(files):,}",
            ", ".join(strange[:_NAMED]),
        )


def names_of(task: Task, split: Split, found: Container[str]) -> list[str]:
    """The names of a split's rows: those that its key gives, else its own where it is found and not, but for training,
    what another split's key names: task.test=validation leaves no validation split."""
    given = getattr(task, split)
    elsewhere = split != "train" and any(split in listed(getattr(task, other)) for other in SPLITS if other != split)
    return [split] if given is None and split in found and not elsewhere else listed(given)


def listed(names: str | Sequence[str] | None) -> list[str]:
    """A name or a list of names as a list."""
    return [names] if isinstance(names, str) else list(names or ())


def _named(task: Task, split: Split, name: str, found: Found, by_client: bool) -> Sequence[Source]:
    """The sources of a split of task.path, or, where it has none of that name, at the place of that name."""
    if name in found:
        return found[name]
    path = task.path
    field, within = f"task.{split}", Path(os.path.expanduser(path)) / name if isinstance(path, str) else Path(name)
    place = next((str(file) for file in (Path(os.path.expanduser(name)), within) if file.exists()), name)
    if not (Path(place).exists() or glob.has_magic(name) or Path(name).suffix.lower() in READERS):
        known = f"a split of {', '.join(listed(path))} ({', '.join(found)}), or " if found else ""
        raise UserError(field, name, f"{known}a file, a folder or a glob", f"change {field}")
    there = sources_at(field, place, by_client, task.image is not None)
    return there.get(split) or [source for sources in there.values() for source in sources]


def sources_at(field: str, place: str, by_client: bool = False, images: bool = False) -> dict[str, list[Source]]:
    """The sources at a place: a file, a glob of files, a folder (of files, of images, or written by `save_to_disk`), or
    a hub id.

    Files of a folder are in the split that a word of their path names, as in train.csv, a/test.jsonl or
    dev-00000-of-00002.parquet, else in train; all of a glob are in train.  by_client: files belong to the client that
    the first folder below the place, or else their own name names.  images: rows are images, so that plain text beside
    them is not read.
    Raises UserError for `field` where there is nothing that can be read.
    """
    path = Path(os.path.expanduser(place))
    if path.is_dir():
        return _of_folder(field, place, path, by_client, images)
    if path.is_file():
        named = split_of(Path(path.name))[1]  # north.csv; of north/train.csv the folder names the client
        return {"train": [_file(field, path, path.parent if named else path.parent.parent, by_client)]}
    if glob.has_magic(place):
        files = sorted(Path(file) for file in glob.glob(str(path), recursive=True) if os.path.isfile(file))
        if not files:
            raise UserError(field, place, "a glob that files match", "check the path")
        root = Path(*(part for part in _fixed(path.parts)))
        return {"train": [_file(field, file, root, by_client) for file in files]}
    if by_client and path.suffix.lower() not in READERS:
        allowed = "another kind than files where task.path is a hub id, whose rows say no client by their place"
        raise UserError("federation.partition.kind", "files", allowed, "name a column that does")
    if path.suffix.lower() not in READERS and is_hub_id(place):
        return _of_hub(field, place)
    kinds = ", ".join(READERS)
    raise UserError(field, place, f"a file that exists ({kinds}), a folder, a glob or a hub id", "check the path")


def read_source(source: Source, wanted: Wanted, field: str, split: Split = "train") -> Part:
    """The rows of a source, which are in that split.  Raises UserError for `field`, or for the field of a column."""
    import datasets

    if source.file is not None:
        return replace(read_file(source.file, wanted, field), place=source.place, split=split, client=source.client)
    data = source.data
    assert data is not None, "a source is a file or a data set"
    names, rows = tuple(data.column_names), len(data)
    data = data.select_columns([name for name in names if name in wanted.names])
    # Of chosen, filtered or shuffled rows: tables are read column by column.
    if data._indices is not None and data.column_names:
        data = data.flatten_indices()
    for name, feature in data.features.items():
        if isinstance(feature, datasets.Image):  # its file's bytes will do, nobody needs the pixels yet
            data = data.cast_column(name, datasets.Image(decode=False))
    return Part(source.place, names, rows, data, split=split, client=source.client)


def _file(field: str, file: Path, root: Path, by_client: bool) -> Source:
    if file.suffix.lower() not in READERS:
        raise UserError(field, str(file), f"a file ending in {', '.join(READERS)}, or a hub id", "convert the file")
    below = file.relative_to(root)
    client = split_of(below)[1] if by_client else ""
    if by_client and not client:
        allowed = "a file whose name, or whose folder below the path, names its client"
        raise UserError(field, str(file), allowed, "put each client's files in a folder of its own")
    return Source(str(below), file, client=client)


def _fixed(parts: Sequence[str]) -> list[str]:
    """The parts of a glob before the first that has magic."""
    fixed: list[str] = []
    for part in parts:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return fixed


def _of_folder(field: str, place: str, folder: Path, by_client: bool, images: bool) -> dict[str, list[Source]]:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        if by_client:
            allowed = "another kind than files for a saved data set, whose rows say no client by their place"
            raise UserError("federation.partition.kind", "files", allowed, "name a column that does")
        return _loaded(field, place, str(folder), saved=True)
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and not _hidden(file.relative_to(folder))]
    rows = [file for file in files if file.suffix.lower() in READERS]
    beside = [file for file in rows if file.stem != "metadata"]
    texts = images and all(file.suffix.lower() == ".txt" for file in beside)  # names of the classes, notes
    if any(file.suffix.lower() in _IMAGES for file in files) and (texts or not beside):
        return _of_images(field, place, folder, by_client)
    if not rows:
        allowed = f"a folder with data that can be loaded: files ending in {', '.join(READERS)}, or images"
        raise UserError(field, place, allowed, "check the path")
    kinds = Counter(file.suffix.lower() for file in files if file.suffix.lower() not in _NO_ROWS)
    if unread := {kind: count for kind, count in kinds.items() if kind not in READERS}:
        shown = ", ".join(f"{count:,} of {kind}" for kind, count in sorted(unread.items()))
        log.warning("%s: files in %s that are not read: %s; those read are %s", field, place, shown, ", ".join(READERS))
    found: dict[str, list[Source]] = {}
    for file in rows:
        split, _ = split_of(file.relative_to(folder))
        found.setdefault(split or "train", []).append(_file(field, file, folder, by_client))
    return found


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.parts) or path.stem.lower() in (
        "readme",
        "license",
        "dataset_infos",
    )


def _of_images(field: str, place: str, folder: Path, by_client: bool) -> dict[str, list[Source]]:
    """Images with the names of their folders as labels, as `datasets` reads them; by client: a folder for each, which
    may lie in one for its split."""
    if not by_client:
        return _loaded(field, place, str(folder), "imagefolder", **_one_class(folder))
    found: dict[str, list[Source]] = {}
    for inner in _folders(folder):
        outer = bare_split(inner.name)
        for own in [inner] if outer is None else _folders(inner):
            classed = bool(_folders(own))
            if outer and not classed and not any(path.stem == "metadata" for path in own.iterdir()):
                allowed = f"another kind than files where no folder names a client: {own} has images of one class"
                advice = "put each client's images in a folder of its own, or deal them out by the label"
                raise UserError("federation.partition.kind", "files", allowed, advice)
            options = {"drop_labels": False} if classed else {}  # of one class too, see `_one_class`
            for split, parts in _loaded(field, str(own), str(own), "imagefolder", **options).items():
                found.setdefault(outer or split, []).extend(replace(part, client=own.name) for part in parts)
    return found


def _one_class(folder: Path) -> dict[str, Any]:
    """Options of `datasets` for a folder of images: a client may have those of one class alone, whose folder is taken
    for no label unless it is asked for."""
    below = (file.relative_to(folder) for file in folder.rglob("*") if file.suffix.lower() in _IMAGES)
    holders = {path.parent.name for path in below if not _hidden(path)}
    classes = {name for name in holders if name and bare_split(name) is None}
    return {"drop_labels": False} if len(holders) == len(classes) == 1 else {}


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not _hidden(Path(path.name)))


def _of_hub(field: str, place: str) -> dict[str, list[Source]]:
    """The splits of a hub's data set: of one that consists of files that we read, its files, else what `datasets` makes
    of it."""
    with hub_or_cache():
        folder = plain_files(place, _PLAIN)
    found = _plain(folder, place) if folder is not None else None
    return _loaded(field, place, place) if found is None else found


def _plain(folder: Path, place: str) -> dict[str, list[Source]] | None:
    """The splits of a folder of a data set's files as `datasets` finds them, by the words of their paths or by the
    configuration in README.md; None where `datasets` reads more out of them than their text: where README.md names
    classes, images or options of a reader."""
    import datasets

    try:
        builder = datasets.load_dataset_builder(str(folder))
    except Exception:  # several kinds; whatever it cannot load is refused by its own words, under the set's own name
        return None
    config = builder.config
    files = {str(split): [Path(file) for file in given] for split, given in (config.data_files or {}).items()}
    every = [file for given in files.values() for file in given]
    ours = {"name", "version", "data_dir", "data_files", "description", "features"}
    own = {name for name, value in vars(config).items() if value != getattr(type(config)(), name, None)} - ours
    read = every and all(file.suffix.lower() in READERS and file.is_file() for file in every)
    if not read or own or not _of_texts(builder.info.features):
        return None
    return {split: [Source(f"{place}/{file.name}", file) for file in given] for split, given in files.items()}


def _of_texts(feature: Any) -> bool:
    """True for features, declared or not (None), that say no more than a file's own text."""
    import datasets

    if isinstance(feature, Mapping):
        return all(map(_of_texts, feature.values()))
    inner = getattr(feature, "feature", None) if not isinstance(feature, list) else feature[0]
    return feature is None or isinstance(feature, datasets.Value) or (inner is not None and _of_texts(inner))


def _loaded(
    field: str, place: str, path: str, builder: str | None = None, saved: bool = False, **options: Any
) -> dict[str, list[Source]]:
    """The splits of what `datasets` itself reads.  builder: of the folder `path`."""
    import datasets

    bars = not datasets.are_progress_bars_disabled()
    try:
        if saved or builder:  # which takes no time worth a bar
            datasets.disable_progress_bars()
        if saved:
            data = datasets.load_from_disk(path)
        elif builder:
            data = datasets.load_dataset(builder, data_dir=path, **options)
        else:
            with hub_or_cache():
                data = datasets.load_dataset(path)
    except Exception as error:  # the hub's client raises several families of errors; all mean the same to a person
        cause = str(error).partition("\n")[0][:200]
        raise UserError(field, place, "a hub id or folder that can be loaded", cause or type(error).__name__) from error
    finally:
        if bars:
            datasets.enable_progress_bars()
    if isinstance(data, datasets.Dataset):
        return {"train": [Source(place, data=data)]}
    return {str(split): [Source(f"{place}, {split}", data=rows)] for split, rows in data.items()}
