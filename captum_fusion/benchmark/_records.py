"""Records that survive whatever happens to the process: one line of JSON each, appended and flushed."""

import base64
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from captum_fusion._app.atomic_files import stale_temp_files, write_whole
from captum_fusion.benchmark._measures import MEASURES

try:
    import fcntl
except ModuleNotFoundError:  # pragma: no cover  (Windows has no such locks)
    fcntl = None  # type: ignore[assignment]

Record = dict[str, Any]

SHARDS = "records-*.jsonl"
CURVES = ("insertion_curve", "deletion_curve")
_MEASURED = tuple(measure.column for measure in MEASURES.values())
_LOCK = ".lock"
_HASHES = "hashes.json"
_PIECE = 1 << 20
# How many lines a message names.
_NAMED = 5


class Key(NamedTuple):
    """What a record is of."""

    model: str
    weights: str
    layer: str
    image: str
    requested: str
    method: str
    percentile: float | None
    stage: str | None

    @property
    def item(self) -> tuple[str, ...]:
        """The picture and the target that were asked of which model, whatever the method."""
        return self[:5]

    @property
    def base(self) -> str:
        """The method, whatever its weighting."""
        return self.method.partition(":")[0]

    def label(self, several: Iterable[str]) -> str:
        """What a row is called; its percentile is told where the method is there with several.

        Stages that do not depend on the weighting or the percentile have one name.
        """
        method = self.base if self.stage in ("gradient", "denoised", "region") else self.method
        told = self.method in several and self.stage not in ("gradient", "region")
        return f"{method}{f' {self.percentile:g}%' if told else ''}{f' {self.stage}' if self.stage else ''}"


def key_of(record: Mapping[str, Any]) -> Key:
    """The key of a record."""
    return Key(*(record[field] for field in Key._fields))


def with_several_percentiles(keys: Iterable[Key]) -> set[str]:
    """The methods that are there with more than one percentile."""
    seen: dict[str, set[float | None]] = {}
    for key in keys:
        seen.setdefault(key.method, set()).add(key.percentile)
    return {method for method, percentiles in seen.items() if len(percentiles) > 1}


class Line(NamedTuple):
    """A whole line of a shard: its number, its content, and the record in it, None if it is damaged."""

    number: int
    content: bytes
    record: Record | None


def _lines(writer: Path) -> Iterator[Line]:
    """The whole lines of a shard; a half-written last line is none."""
    with writer.open("rb") as stream:
        for number, content in enumerate(stream, start=1):
            if content.endswith(b"\n"):
                yield Line(number, content, parse(content))


def parse(line: bytes) -> Record | None:
    """The record in a line, or None if it holds none."""
    try:
        record = json.loads(line)
        assert isinstance(record, dict)
        texts = ("model", "weights", "layer", "image", "requested", "method", "file")
        assert all(isinstance(record[name], str) for name in texts)
        assert record["percentile"] is None or _is_number(record["percentile"])
        assert record["stage"] is None or isinstance(record["stage"], str)
        if "error" in record:
            assert isinstance(record["error"], str)
            return record
        assert _is_number(record["seconds"])
        assert all(record.get(name) is None or _is_number(record[name]) for name in _MEASURED)
        assert all(all(map(_is_number, record.get(name, []))) for name in CURVES)
        assert round(len(base64.b64decode(record["map"], validate=True)) ** 0.5) ** 2
    except (AssertionError, KeyError, TypeError, ValueError, RecursionError):
        return None
    return record


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(float(value)) < float("inf")  # type: ignore[arg-type]


def read_records(folder: Path) -> dict[Key, Record]:
    """All finished records of all processes, in the order in which they were made.

    What was measured first stays; a later record adds what is new, and replaces an error. Damaged lines are named in a
    warning.
    """
    records: dict[Key, Record] = {}
    for writer in sorted(folder.glob(SHARDS)):
        damaged = []
        for line in _lines(writer):
            if line.record is None:
                damaged.append(line.number)
                continue
            key = key_of(line.record)
            kept = records.get(key)
            if kept is None or "error" in kept:
                records[key] = line.record
            elif "error" not in line.record:
                records[key] = line.record | kept
        if damaged:
            warnings.warn(f"{writer} {_numbered(damaged)} damaged and left out", stacklevel=2)
    return records


def _numbered(lines: list[int]) -> str:
    shown = ", ".join(map(str, lines[:_NAMED]))
    more = f" and {len(lines) - _NAMED} more" if len(lines) > _NAMED else ""
    return f"line {shown} is" if len(lines) == 1 else f"lines {shown}{more} are"


def repair(folder: Path) -> None:
    """Sets damaged lines aside, into a file beside their shard, so that their work is done again; says which.

    Files that a killed run had begun are removed.
    """
    for draft in stale_temp_files(folder):
        draft.unlink()
    for writer in sorted(folder.glob(SHARDS)):
        damaged = [line for line in _lines(writer) if line.record is None]
        if not damaged:
            continue
        aside = writer.with_suffix(".damaged")
        with aside.open("ab") as stream:
            stream.writelines(line.content for line in damaged)
        write_whole(writer, b"".join(line.content for line in _lines(writer) if line.record is not None))
        warnings.warn(
            f"{writer} {_numbered([line.number for line in damaged])} damaged; set aside in {aside.name}, and the work "
            "is done again",
            stacklevel=2,
        )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder while this one is in it.

    Raises:
        ValueError: If another run is in it.
    """
    # The lock is the system's and ends with the process, however that ends; the file alone means nothing.
    with (folder / _LOCK).open("a+") as stream:
        if fcntl is not None:
            try:
                fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(
                    f"Another run is writing to {folder}; wait for it, or give another output folder"
                ) from error
        yield


class Hashes:
    """The hashes of files' contents, kept in the output folder by size and time so that each file is read once."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / _HASHES
        self.known: dict[str, Any] = {}
        try:
            known = json.loads(self.file.read_bytes())
            if isinstance(known, dict):
                self.known = {
                    name: value for name, value in known.items() if isinstance(value, list) and len(value) == 4
                }
        except (OSError, ValueError):
            pass  # They are computed again.

    def of(self, file: Path) -> str:
        """The hash of a file's content; of a file that cannot be read, why."""
        try:
            state = file.stat()
            known = self.known.get(str(file.absolute()))
            stamp = [state.st_size, state.st_mtime_ns, state.st_ctime_ns]
            if known is not None and known[:3] == stamp:
                return str(known[3])
            with file.open("rb") as stream:
                value = hash_of(iter(lambda: stream.read(_PIECE), b""))
        except OSError as error:
            return f"unreadable: {error.strerror}"
        self.known[str(file.absolute())] = [*stamp, value]
        return value

    def save(self) -> None:
        """Writes what is known."""
        write_whole(self.file, json.dumps(self.known))


def hash_of(parts: Iterable[bytes]) -> str:
    """The hash of some bytes."""
    value = hashlib.sha256()
    for part in parts:
        value.update(part)
    return value.hexdigest()[:16]


class RecordWriter:
    """The file to which one process appends its records."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.file = folder / f"records-{rank:05d}.jsonl"
        content = self.file.read_bytes() if self.file.exists() else b""
        self.end = content.rfind(b"\n") + 1
        with self.file.open("ab") as stream:
            stream.truncate(self.end)

    def append(self, records: Iterable[Record]) -> None:
        """Appends records; when that fails, the file ends after its last whole record.

        Raises:
            OSError: If they cannot be written.
        """
        lines = b"".join(json.dumps(record, allow_nan=False).encode() + b"\n" for record in records)
        try:
            with self.file.open("ab") as stream:
                stream.write(lines)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError:
            with self.file.open("ab") as stream:
                stream.truncate(self.end)
            raise
        self.end += len(lines)
