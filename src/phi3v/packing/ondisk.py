"""A sequence in a temporary file: a data set costs disk space instead of memory in every process."""

from __future__ import annotations

import os
import pickle
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from phi3v.base.errors import InputError

T = TypeVar("T")


class OnDisk(Sequence[T], Generic[T]):
    """Picklable items in a temporary file without a name. In memory is the position where each item ends: 8 bytes.

    An item is read from disk every time it is asked for. The file lies where Python puts temporary files (`TMPDIR`) and
    disappears with the process, however that ends. Raises InputError, naming the folder, when the disk is full.
    """

    def __init__(self) -> None:
        with _disk_errors():  # unbuffered: what a full disk refuses must not be tried again when the file is closed
            self._file = tempfile.TemporaryFile(prefix="phi3v-", buffering=0)  # noqa: SIM115  (as long as this is there)
        weakref.finalize(self, self._file.close)
        self._ends = array("q", [0])

    def extend(self, items: Iterable[T]) -> None:
        pickled = [pickle.dumps(item, pickle.HIGHEST_PROTOCOL) for item in items]
        rest = memoryview(b"".join(pickled))
        with _disk_errors():
            while rest:
                rest = rest[self._file.write(rest) :]
        for item in pickled:
            self._ends.append(self._ends[-1] + len(item))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        found = range(len(self))[index]
        if isinstance(found, range):
            return [self[number] for number in found]
        start, end = self._ends[found : found + 2]
        with _disk_errors():
            return pickle.loads(os.pread(self._file.fileno(), end - start, start))


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        folder = tempfile.tempdir or "no temporary folder"
        raise InputError(f"{folder}: {error.strerror}; the data set is kept there (TMPDIR names another)") from error
