"""TensorBoard's event files in a run folder, written record by record."""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayfed_sub.storage import atomic_files


class Events:
    """TensorBoard's event files, one for each session, ordered by name.

    first: the session's first step; TensorBoard drops values of earlier sessions from this step on.  tensorboardX's
    writer is not used: on a full disk its thread dies, and its caller waits for ever.
    """

    def __init__(self, folder: Path, first: int) -> None:
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        with atomic_files.disk_errors(folder):
            folder.mkdir(exist_ok=True)
            sitting = sum(1 for _ in folder.glob("*.tfevents.*"))
        self._path = folder / f"events.out.tfevents.{sitting:06d}"
        start = SessionLog(status=SessionLog.START)
        self._write(Event(file_version="brain.Event:2"), Event(step=first, session_log=start))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Writes values by name after `step` finished rounds.  Raises RunError where the disk is full."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(Event(step=step, summary=Summary(value=scalars)))

    def _write(self, *events: Any) -> None:
        now = time.time()
        for event in events:
            event.wall_time = now
        with atomic_files.disk_errors(self._path), self._path.open("ab") as file:
            file.write(b"".join(_framed(event.SerializeToString()) for event in events))


def _framed(record: bytes) -> bytes:
    """A record of a TFRecord file: its length, the record, and a checksum of each.

    https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details
    """
    from tensorboardX.record_writer import masked_crc32c

    length = struct.pack("<Q", len(record))
    return length + struct.pack("<I", masked_crc32c(length)) + record + struct.pack("<I", masked_crc32c(record))
