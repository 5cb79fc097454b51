"""A log that another process writes, read on from where the last look ended, also after it was cut back or replaced."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

BLOCK = 1 << 22  # bytes read at a time
REMEMBERED = 256  # bytes before the place where the last look ended; other bytes there tell of another past


class Tail:
    """The whole lines of one file, each given once; half a last line waits for its end.

    A resumed run cuts its logs back to its checkpoint and writes on; a run that is replaced gets new files. Both are
    noticed by the file's number, its size, or the bytes before the place that was reached, and it is read from its
    start again: the writer's lines of before count no longer.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start_over()

    def _start_over(self) -> None:
        self._file: tuple[int, int] | None = None  # device and number of the file
        self._place, self._before = 0, b""

    def rewound(self) -> bool:
        """Tell whether the next lines are again the file's first ones, because it is not the file of the last look."""
        try:
            with self.path.open("rb") as file:
                facts = os.fstat(file.fileno())
                same = self._file in (None, (facts.st_dev, facts.st_ino)) and facts.st_size >= self._place
                if same and self._before:
                    file.seek(self._place - len(self._before))
                    same = file.read(len(self._before)) == self._before
                found = (facts.st_dev, facts.st_ino)
        except OSError:
            same, found = self._file is None, None
        if not same:
            self._start_over()
        self._file = found
        return not same

    def lines(self) -> Iterator[bytes]:
        """Give the whole lines that came since; nothing without a file. Call ``rewound`` first."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._place)
                rest = b""
                while block := file.read(BLOCK):
                    *whole, rest = (rest + block).split(b"\n")
                    for line in whole:
                        self._place += len(line) + 1
                        self._before = (self._before + line + b"\n")[-REMEMBERED:]
                        yield line
        except OSError:
            return
