"""Records that survive a killed process: one line of JSON each, appended and flushed."""

import base64
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, cast

from filelock import FileLock, Timeout

from captum_fusion._app.output_files import stale_temp_files, write_atomically
from captum_fusion._app.settings import MEASURES

PATTERN = "records-*.jsonl"
CURVES = ("insertion_curve", "deletion_curve")
_COLUMNS = [measure.column for measure in MEASURES.values()]
_TEXTS = ("model", "weights", "layer", "image", "requested", "method", "file")
_HASHES = "hashes.json"
_CHUNK = 1 << 20
# How many damaged lines a message names.
_NAMED = 5


class Record(TypedDict, total=False):
    """One explanation: its key, what its values depend on, and the values or the error; metrics are further columns."""

    model: str
    weights: str
    layer: str
    image: str
    requested: str
    method: str
    percentile: float | None
    stage: str | None
    version: str
    weights_hash: str
    model_hash: str
    image_hash: str
    objects_hash: str | None
    target_kind: str
    steps: int | None
    protocol: str | None
    weighting: str
    tolerance: float
    precision: str
    activation: str
    grid: list[int] | None
    device: str
    batch_size: int
    compile: bool
    file: str
    error: str
    target: int
    category: str
    probability: float
    frame: list[float]
    note: str
    empty: bool
    instances: int
    map: str
    """The map in 28 x 28 pixels, 8 bits each, in base 64."""
    seconds: float


class Key(NamedTuple):
    """Identifies a record."""

    model: str
    weights: str
    layer: str
    image: str
    requested: str
    method: str
    percentile: float | None
    stage: str | None

    @property
    def subject(self) -> tuple[str, str, str]:
        """The model, its weights and its layer."""
        return self[:3]

    @property
    def item(self) -> tuple[str, ...]:
        """The subject, the image and the requested target."""
        return self[:5]

    @property
    def base(self) -> str:
        """The method without its weighting."""
        return self.method.partition(":")[0]

    def label(self, several: Iterable[str]) -> str:
        """The name of a row of the tables; stages that do not depend on the weighting or the percentile have one."""
        method = self.base if self.stage in ("gradient", "denoised", "region") else self.method
        varies = self.method in several and self.stage not in ("gradient", "region")
        percentile = f" {self.percentile:g}%" if varies else ""
        return f"{method}{percentile}{f' {self.stage}' if self.stage else ''}"


def key_of(record: Mapping[str, Any]) -> Key:
    """The key of a record."""
    return Key(*(record[field] for field in Key._fields))


def with_several_percentiles(keys: Iterable[Key]) -> set[str]:
    """The methods that have records of more than one percentile."""
    percentiles: dict[str, set[float | None]] = {}
    for key in keys:
        percentiles.setdefault(key.method, set()).add(key.percentile)
    return {method for method, values in percentiles.items() if len(values) > 1}


def read_lines(file: Path, start: int = 0) -> Iterator[tuple[int, bytes, Record | None]]:
    """The number, the content and the record of each whole line from a byte on; the record of a damaged one is None."""
    with file.open("rb") as stream:
        stream.seek(start)
        for number, content in enumerate(stream, start=1):
            if content.endswith(b"\n"):
                yield number, content, _parse(content)


def _parse(line: bytes) -> Record | None:
    """The record in a line, or None if it holds none."""
    try:
        record = json.loads(line)
        assert isinstance(record, dict)
        assert all(isinstance(record[name], str) for name in _TEXTS)
        assert record["percentile"] is None or _is_number(record["percentile"])
        assert record["stage"] is None or isinstance(record["stage"], str)
        if "error" in record:
            assert isinstance(record["error"], str)
        else:
            assert _is_number(record["seconds"])
            assert all(record.get(name) is None or _is_number(record[name]) for name in _COLUMNS)
            assert all(all(map(_is_number, record.get(name, []))) for name in CURVES)
            assert round(len(base64.b64decode(record["map"], validate=True)) ** 0.5) ** 2
    except (AssertionError, KeyError, TypeError, ValueError, RecursionError):
        return None
    return cast(Record, record)


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(float(value)) < float("inf")  # type: ignore[arg-type]


def read_records(folder: Path) -> dict[Key, Record]:
    """All finished records of all processes, in the order in which they were appended.

    The first value of a metric stays; a later record adds metrics and what these depend on, and replaces an error.
    Damaged lines are named in a warning.
    """
    records: dict[Key, Record] = {}
    for file in sorted(folder.glob(PATTERN)):
        damaged = []
        for number, _, record in read_lines(file):
            if record is None:
                damaged.append(number)
                continue
            earlier = records.setdefault(key_of(record), record)
            if "error" in earlier:
                records[key_of(record)] = record
            elif "error" not in record:
                # The steps and the objects are None until a metric depends on them.
                first: Any = {name: value for name, value in earlier.items() if value is not None}
                records[key_of(record)] = record | first
        if damaged:
            warnings.warn(f"{file} {_are_damaged(damaged)} and left out", stacklevel=2)
    return records


def _are_damaged(lines: list[int]) -> str:
    more = f" and {len(lines) - _NAMED} more" if len(lines) > _NAMED else ""
    names = f"{', '.join(map(str, lines[:_NAMED]))}{more}"
    return f"line {names} is damaged" if len(lines) == 1 else f"lines {names} are damaged"


def repair(folder: Path) -> None:
    """Moves damaged lines to a file beside their own, and warns of them, so that their work is repeated.

    Files that a killed run had begun to write are removed.
    """
    for draft in stale_temp_files(folder):
        draft.unlink()
    for file in sorted(folder.glob(PATTERN)):
        lines = list(read_lines(file))
        numbers = [number for number, _, record in lines if record is None]
        if numbers:
            aside = file.with_suffix(".damaged")
            with aside.open("ab") as stream:
                stream.writelines(content for _, content, record in lines if record is None)
            write_atomically(file, b"".join(content for _, content, record in lines if record is not None))
            text = f"{file} {_are_damaged(numbers)}; moved to {aside.name}, and the work is repeated"
            warnings.warn(text, stacklevel=2)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks a folder against other runs.

    Raises:
        ValueError: If another run holds the lock.
    """
    # The operating system releases the lock when the process ends, however it ends; the file alone means nothing.
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise ValueError(f"Another run is writing to {folder}; wait for it, or choose another output folder") from error


class Hashes:
    """Hashes of files, cached in the output folder by size and time, so that each file is read once."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / _HASHES
        self.cached: dict[str, Any] = {}
        try:
            content = json.loads(self.file.read_bytes())
            self.cached = {
                name: value for name, value in content.items() if isinstance(value, list) and len(value) == 4
            }
        except (AttributeError, OSError, ValueError):
            pass  # They are computed again.

    def of(self, file: Path) -> str:
        """The hash of a file's content, or the reason why it cannot be read."""
        name = str(file.absolute())
        try:
            state = file.stat()
            stamp = [state.st_size, state.st_mtime_ns, state.st_ctime_ns]
            if self.cached.get(name, [])[:3] != stamp:
                with file.open("rb") as stream:
                    self.cached[name] = [*stamp, hash_of(iter(lambda: stream.read(_CHUNK), b""))]
        except OSError as error:
            return f"unreadable: {error.strerror}"
        return str(self.cached[name][3])

    def save(self) -> None:
        """Writes the cache."""
        write_atomically(self.file, json.dumps(self.cached))


def hash_of(parts: Iterable[bytes]) -> str:
    """The hash of some bytes."""
    value = hashlib.sha256()
    for part in parts:
        value.update(part)
    return value.hexdigest()[:16]


class RecordWriter:
    """Appends the records of one process to its file."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.file = folder / f"records-{rank:05d}.jsonl"
        content = self.file.read_bytes() if self.file.exists() else b""
        self.end = content.rfind(b"\n") + 1
        with self.file.open("ab") as stream:
            stream.truncate(self.end)

    def append(self, records: list[Record]) -> None:
        """Appends the records of one image or batch; when that fails, the file ends after its last whole record.

        Raises:
            OSError: If they cannot be written, naming the images.
        """
        lines = b"".join(json.dumps(record, allow_nan=False).encode() + b"\n" for record in records)
        try:
            with self.file.open("ab") as stream:
                stream.write(lines)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            with self.file.open("ab") as stream:
                stream.truncate(self.end)
            images = ", ".join(dict.fromkeys(record["image"] for record in records))
            text = (
                f"{error.strerror}. The records of {images} are not written, all earlier ones are; run again to resume"
            )
            raise OSError(error.errno, text, str(self.file)) from error
        self.end += len(lines)
