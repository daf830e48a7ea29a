"""Files that are whole or not there."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

PARTIAL = ".partial"
"""Ending of a file that is being written."""


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that at any moment there is the old one or the new one, whole.

    Args:
        path: the file.
        write: writes its content.

    Raises:
        OSError: it could not be written; the old one is untouched, and nothing else is left.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    # The new name must be on the disk too before anything relies on it.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network disks cannot
            raise
    finally:
        os.close(folder)
