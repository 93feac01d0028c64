"""Does a folder do what checkpoints need of it: speed, renaming in one step, locks, a clock that agrees."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from eetrain.diagnosis import lock_trial
from eetrain.diagnosis.check import Check, duration, reason, size

_BLOCK = 8 * 2**20
_MOST = 64 * 2**20
_LONGEST = 3.0
_SLOW = 50e6
_LONG_SAVE = 60.0
_APART = 2.0  # seconds; some file systems count in steps of two
_RENAMES = 50
_LOCK_SECONDS = 5
_PREFIX = ".eetrain-doctor-"


@dataclass(frozen=True)
class Speed:
    """Bytes written and read back, and the seconds each took."""

    count: int
    write_seconds: float
    read_seconds: float

    @property
    def written(self) -> float:
        """Bytes per second, on the disk."""
        return self.count / max(self.write_seconds, 1e-9)

    @property
    def read(self) -> float:
        """Bytes per second; from memory where the system does not let go of them."""
        return self.count / max(self.read_seconds, 1e-9)


def writing_checks(folder: Path, free: int, checkpoint: int | None) -> list[Check]:
    """Try it; if nothing can be written, that is the only line. Nothing is left there.

    Args:
        folder: an existing one.
        free: bytes free; at most a quarter of them is used.
        checkpoint: bytes of a checkpoint, if known.
    """
    try:
        speed = measure_speed(folder, min(_MOST, free // 4))
        with tempfile.TemporaryDirectory(dir=folder, prefix=_PREFIX) as trial:
            others = [_renaming(Path(trial)), check_locks(Path(trial) / "lock"), check_clock(clock_offset(folder))]
    except OSError as error:
        hint = "Set a folder by --run that you may write to, on a disk with room."
        return [Check("writing", f"{folder}: {reason(error)}", "error", hint)]
    return [check_speed(speed, checkpoint), *others]


def measure_speed(folder: Path, count: int) -> Speed:
    """Write about ``count`` bytes, flush them to the disk, and read them back.

    After :data:`_LONGEST` seconds no more is written.

    Raises:
        OSError: it cannot be done, or what is read differs from what was written.
    """
    block = os.urandom(max(1, min(_BLOCK, count)))  # disks that compress would be too fast with zeros
    with tempfile.TemporaryFile(dir=folder, prefix=_PREFIX, buffering=0) as file:
        start, blocks = time.perf_counter(), 0
        while blocks == 0 or ((blocks + 1) * len(block) <= count and time.perf_counter() - start < _LONGEST):
            left = memoryview(block)
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
            blocks += 1
        written = time.perf_counter() - start
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start, same = time.perf_counter(), True
        for _ in range(blocks):
            same &= file.read(len(block)) == block
        read = time.perf_counter() - start
    if not same:
        raise OSError("what is read differs from what was written")
    return Speed(blocks * len(block), written, read)


def check_speed(speed: Speed, checkpoint: int | None) -> Check:
    """Whether checkpoints are written in reasonable time.

    Args:
        speed: as measured.
        checkpoint: bytes of one, if known.
    """
    found = f"{size(speed.count)} at {speed.written / 1e6:.0f} MB/s, read back at {speed.read / 1e6:.0f} MB/s"
    measured = {"write_bytes_per_second": speed.written, "read_bytes_per_second": speed.read}
    if checkpoint is not None:
        seconds = checkpoint / speed.written
        found += f"; a checkpoint takes {duration(seconds)}"
        measured["checkpoint_seconds"] = seconds
        if seconds > _LONG_SAVE:
            hint = f"Have Slurm's signal come early enough: #SBATCH --signal=SIGUSR1@{round(2 * seconds)}"
            return Check("writing", found, "note", hint, measured)
    if speed.written < _SLOW:
        return Check("writing", found, "note", "Slow: set a faster folder by --run, or save less often.", measured)
    return Check("writing", found, measured=measured)


def clock_offset(folder: Path) -> float:
    """Seconds by which the clock of the folder's file system, perhaps a server's, is ahead of this machine's."""
    before = time.time()
    with tempfile.TemporaryFile(dir=folder, prefix=_PREFIX) as file:
        file.write(b"x")
        file.flush()
        os.fsync(file.fileno())
        stamp = os.fstat(file.fileno()).st_mtime
    return stamp - min(max(stamp, before), time.time())


def check_clock(offset: float) -> Check:
    """Whether two clocks agree.

    Args:
        offset: seconds by which the file system is ahead.
    """
    measured = {"offset_seconds": offset}
    if abs(offset) < _APART:
        return Check("clock", f"the file system's agrees within {_APART:g} s", measured=measured)
    found = f"the file system's is {duration(abs(offset))} {'ahead of' if offset > 0 else 'behind'} this machine's"
    hint = "Files will seem older or newer than they are: have the clocks set (chrony or ntp) on both sides."
    return Check("clock", found, "note", hint, measured)


def check_locks(path: Path, seconds: float = _LOCK_SECONDS) -> Check:
    """Whether a lock keeps a second process out: run folders are locked so that two jobs do not share one.

    Args:
        path: of a file to lock; it is made.
        seconds: to wait for an answer.
    """
    program = [sys.executable, "-I", lock_trial.__file__, str(path)]
    try:
        done = subprocess.run(program, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        hint = "A run would wait for its lock for ever: start the lock service, or mount with local locks (nolock)."
        return Check("locks", f"no answer within {seconds:g} s", "error", hint)
    if done.returncode == lock_trial.KEPT:
        return Check("locks", "a second process is kept out")
    hint = "Two jobs in one run folder will not be noticed: see to it that each has its own."
    if done.returncode == lock_trial.SHARED:
        return Check("locks", "a second process gets the same lock", "note", hint)
    return Check("locks", f"none here: {done.stdout.strip() or 'the trial failed'}", "note", hint)


def _renaming(folder: Path) -> Check:
    problem = renaming_problem(folder)
    if problem is None:
        return Check("renaming", "in one step: readers see the old file or the new one")
    hint = "A kill while a checkpoint is replaced can leave none here: set a folder on another disk by --run."
    return Check("renaming", problem, "error", hint)


def renaming_problem(folder: Path) -> str | None:
    """Replace a file many times while it is read, and move a folder; what went wrong, if anything did."""
    target, part, done = folder / "target", folder / "part", threading.Event()
    target.write_bytes(bytes(4096))
    seen: list[str] = []

    def read() -> None:
        while not done.is_set():
            try:
                found = target.read_bytes()
            except OSError as error:
                seen.append(f"while a file was replaced, a reader found: {reason(error)}")
                return
            if len(found) != 4096 or len(set(found)) != 1:
                seen.append("while a file was replaced, a reader found half of it")
                return

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(1, _RENAMES + 1):
            part.write_bytes(bytes([number]) * 4096)
            os.replace(part, target)
        (folder / "before").mkdir()
        os.replace(folder / "before", folder / "after")
    except OSError as error:
        seen.append(f"cannot be done: {reason(error)}")
    finally:
        done.set()
        reader.join()
    return seen[0] if seen else None
