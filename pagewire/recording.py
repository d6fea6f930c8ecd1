"""Files of recorded runs: framing, reading, and refusing what cannot be read. protos/pagewire/v1/recording.proto says
what is in them, docs/replay.md what for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from google.protobuf.message import DecodeError, Message

from pagewire.v1 import recording_pb2

FORMAT = "pagewire.recording"
FORMAT_VERSION = 1
FORMAT_REVISION = 1
"""Additions to the version that older readers may skip."""
PROTOCOL_VERSION = 1
"""Of worker.proto."""
MAX_MESSAGE_BYTES = 1 << 30
"""A larger size is no size: the file is damaged there."""
_MAX_VARINT_BYTES = 5


class RecordingError(Exception):
    """A file cannot be replayed. The message is one clear line that begins with the file's name."""


class WorkerRefusedError(RecordingError):
    """A worker that came does not fit the recording. It is told so too, and ends with the same words."""


class _CutError(Exception):
    """The file ends within a message."""


def frame(message: Message) -> bytes:
    """A message behind its size."""
    raw = message.SerializeToString()
    size, left = bytearray(), len(raw)
    while left > 0x7F:
        size.append(left & 0x7F | 0x80)
        left >>= 7
    size.append(left)
    return bytes(size) + raw


class Recording:
    """A recorded run on disk. It may be read several times; what `events` finds at the end is in `end` and `cut_at`."""

    def __init__(self, path: Path) -> None:
        """Reads and checks the header. Raises RecordingError for a file that is none, of another version, or cut within
        its header."""
        self.path = path
        self.end: recording_pb2.RecordingEnded | None = None
        """Why the recording ended; None: it has not been read to its end, or it ended without saying so."""
        self.cut_at: int | None = None
        """Number of bytes before a message that the file ends within; None: there is no such message."""
        try:
            with path.open("rb") as file:
                self.header = self._read_header(file)
        except OSError as error:
            raise RecordingError(f"{path}: cannot be read: {error.strerror}") from None

    def events(self) -> Iterator[recording_pb2.RecordingEvent]:
        """The events in order, up to the end or the cut. Raises RecordingError where the file is damaged."""
        with self.path.open("rb") as file:
            self._read_header(file)
            while True:
                position = file.tell()
                try:
                    raw = _read_message(file)
                except _CutError:
                    self.cut_at = position
                    return
                except ValueError:
                    raise self._damaged(position) from None
                if raw is None:
                    return
                try:
                    event = recording_pb2.RecordingEvent.FromString(raw)
                except DecodeError:
                    raise self._damaged(position) from None
                if event.WhichOneof("event") == "recording_ended":
                    self.end = event.recording_ended
                else:
                    yield event

    def how_it_ends(self) -> str:
        """One line for people, or an empty one for a whole recording. Only after the events have been read."""
        if self.cut_at is not None:
            return f"{self.path}: cut within a record at byte {self.cut_at}; what is before it was used"
        if self.end is None:
            return f"{self.path}: the scheduler ended without closing the file; what it had written was used"
        if self.end.cause == recording_pb2.RECORDING_END_CAUSE_TOO_SLOW:
            dropped = self.end.dropped_events
            return (
                f"{self.path}: the disk was too slow, so the recording ended early ({dropped} events or more are lost)"
            )
        return ""

    def _damaged(self, position: int) -> RecordingError:
        return RecordingError(f"{self.path}: damaged at byte {position}: no record begins there")

    def _read_header(self, file: BinaryIO) -> recording_pb2.RecordingHeader:
        path = self.path
        try:
            raw = _read_message(file)
        except _CutError:
            raise RecordingError(f"{path}: no recording, or cut within its header: nothing can be replayed") from None
        except ValueError:
            raise RecordingError(f"{path}: no recording of Pagewire") from None
        if raw is None:
            raise RecordingError(f"{path}: empty: the recording had no worker yet")
        try:
            header = recording_pb2.RecordingHeader.FromString(raw)
        except DecodeError:
            raise RecordingError(f"{path}: no recording of Pagewire") from None
        if header.format != FORMAT:
            raise RecordingError(f"{path}: no recording of Pagewire")
        if header.format_version != FORMAT_VERSION:
            raise RecordingError(
                f"{path}: written in version {header.format_version} of the format (by Pagewire "
                f"{header.pagewire_version}); this one reads version {FORMAT_VERSION}"
            )
        if header.protocol_version != PROTOCOL_VERSION:
            raise RecordingError(
                f"{path}: its plans are of protocol version {header.protocol_version} (Pagewire "
                f"{header.pagewire_version}); this one speaks version {PROTOCOL_VERSION}"
            )
        return header


def _read_message(file: BinaryIO) -> bytes | None:
    """The next message's bytes; None at the end of the file. Raises _CutError, and ValueError for what is no size."""
    size = shift = 0
    for position in range(_MAX_VARINT_BYTES):
        byte = file.read(1)
        if not byte:
            if position == 0:
                return None
            raise _CutError
        size |= (byte[0] & 0x7F) << shift
        shift += 7
        if byte[0] < 0x80:
            break
    else:
        raise ValueError
    if not 0 < size <= MAX_MESSAGE_BYTES:
        raise ValueError
    raw = file.read(size)
    if len(raw) < size:
        raise _CutError
    return raw
