"""The hub of models, data sets and metrics: which names it can have, and how to go on where it does not answer."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

log = logging.getLogger(__name__)

_PATIENCE = 5.0  # seconds for an answer
_REMEMBERED = 60.0  # seconds after which the hub is asked again


def is_hub_id(name: str) -> bool:
    """True where the hub can have a repository of this name, whether or not it has.

    >>> [is_hub_id(name) for name in ("gpt2", "openai-community/gpt2", "two words", "a/b/c", "./here")]
    [True, True, False, False, False]
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def plain_files(name: str, suffixes: Sequence[str]) -> Path | None:
    """Folder with all files of a data set of the hub, where those with a suffix end in these; None where it has others,
    or is not there.  Without an answer of the hub: what the cache has of the set."""
    import httpx
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        if not constants.HF_HUB_OFFLINE:
            files = HfApi().list_repo_files(name, repo_type="dataset")
            if any(Path(file).suffix.lower() not in ("", *suffixes) for file in files):
                return None  # before it is fetched
        folder = Path(snapshot_download(name, repo_type="dataset"))
        if any(file.suffix.lower() not in ("", *suffixes) for file in folder.rglob("*") if file.is_file()):
            return None
        if constants.HF_HUB_OFFLINE:
            log.warning("%s: the hub is not asked; read is what its cache has", name)
        return folder
    except (HfHubHTTPError, LocalEntryNotFoundError, httpx.HTTPError, OSError):
        # `datasets` says what is wrong, or has the rows in a cache of its own.
        return None


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """Sets the hub's client offline inside where the hub does not answer: what is in the cache is read, anything else
    raises at once.  By itself the client tries every file six times, which takes a minute and a half for a model, and
    logs each try."""
    from huggingface_hub import constants

    minute = int(time.monotonic() / _REMEMBERED)
    if constants.HF_HUB_OFFLINE or _answers(constants.ENDPOINT, minute):
        yield
        return
    constants.HF_HUB_OFFLINE = True  # read at every request
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


@lru_cache(maxsize=1)
def _answers(endpoint: str, minute: int) -> bool:
    """True where a request gets any answer; minute: when it is asked, so that an answer is not kept for ever."""
    import httpx
    from huggingface_hub.utils import get_session

    try:
        get_session().head(endpoint, timeout=_PATIENCE)
    except httpx.TransportError:
        return False
    return True
