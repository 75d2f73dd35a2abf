"""A sequence that is kept in a file: a data set costs disk instead of the memory of every process that trains on it."""

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
    """Items that can be pickled, in a temporary file without a name. In memory is where each of them ends: 8 bytes.

    An item is read anew whenever it is asked for. The file lies where Python puts temporary ones (`TMPDIR`) and is gone
    with the process, however that ends. Raises InputError, naming the folder, for whatever its disk refuses.
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
