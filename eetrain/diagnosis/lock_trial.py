"""Run as a program of its own, since a lock on a broken network file system can hang: does a lock keep others out?

Exit status 0: it does; 3: a second process got it as well; 4: no lock at all, with the reason on stdout.
"""

from __future__ import annotations

import fcntl
import os
import sys

KEPT, SHARED, NONE = 0, 3, 4  # 1 and 2 are those of a Python program that fails


def main(path: str) -> int:
    """Lock the file, and try again from a child, which must be refused."""
    with open(path, "a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            sys.stdout.write(error.strerror or str(error))
            return NONE
        child = os.fork()
        if child == 0:
            os._exit(_second(path))
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _second(path: str) -> int:
    try:
        with open(path, "a") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return KEPT
    return SHARED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
