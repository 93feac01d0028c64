"""One job at a time in a run folder."""

from __future__ import annotations

import errno
import fcntl
import json
import warnings
from datetime import datetime
from pathlib import Path

from eetrain.cluster.launch import this_process
from eetrain.errors import ConfigError

LOCK_FILE = ".lock"
_TAKEN = (errno.EACCES, errno.EAGAIN)


class RunLock:
    """Holds a run folder until it is released or the process ends, however it ends.

    A POSIX record lock: unlike ``flock`` it is not handed on to forked children (data loader workers outlive a killed
    parent by seconds), and network file systems know it. The file stays; what counts is the lock on it.

    Args:
        folder: of the run; made if it is not there.

    Raises:
        ConfigError: another job holds it; names its owner.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / LOCK_FILE
        self._file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115 - open as long as it is held
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _TAKEN:
                raise self._refused(folder) from None
            warnings.warn(
                f"{folder} is on a file system without locks ({error.strerror}): see to it that no other job writes "
                "there.",
                stacklevel=2,
            )
        self._write({"owner": this_process(), "since": datetime.now().astimezone().isoformat(timespec="seconds")})

    def release(self) -> None:
        """Let others have the folder."""
        if not self._file.closed:
            self._write({})
            self._file.close()

    def _write(self, record: dict[str, str]) -> None:
        self._file.truncate(0)
        self._file.write(json.dumps(record))
        self._file.flush()

    def _refused(self, folder: Path) -> ConfigError:
        self._file.seek(0)
        try:
            record = json.loads(self._file.read())
            owner = f"{record['owner']}, since {record['since']}"
        except (ValueError, KeyError, TypeError):
            owner = "another job"
        self._file.close()
        return ConfigError(
            f"The run folder {folder} is in use by {owner}.",
            hint="Wait for that job to end, or set another folder by --run.",
        )
