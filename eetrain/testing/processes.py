"""Run a function on several gloo processes of this machine, in one line."""

from __future__ import annotations

import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Value = TypeVar("Value")


def run_on_processes(fn: Callable[..., Value], num: int = 2, *args: Any, timeout: float = 120.0) -> list[Value]:
    """Call ``fn(*args)`` on ``num`` processes that form a gloo process group, and return what each returned.

    The variables that torch and Lightning read (``RANK``, ``LOCAL_RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``,
    ``MASTER_PORT``) are set, on the loopback address.

    Example::

        def total(start):
            value = torch.tensor(start + dist.get_rank())
            dist.all_reduce(value)
            return int(value)

        assert run_on_processes(total, 2, 10) == [21, 21]

    Args:
        fn: a function of a module's top level; it and ``args`` are pickled.
        num: how many processes.
        *args: its arguments.
        timeout: seconds until the processes are killed.

    Returns:
        The values, by rank; they are pickled.

    Raises:
        TimeoutError: a process did not end in time.
        Exception: what the first process to fail raised, with its traceback as a note.
    """
    context = mp.get_context("spawn")
    port, ends, processes = _free_port(), [], []
    for rank in range(num):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(fn, args, rank, num, port, theirs), daemon=False)
        process.start()
        theirs.close()
        ends.append(ours)
        processes.append(process)
    try:
        return _collect(ends, time.monotonic() + timeout, timeout)
    finally:
        for process in processes:
            process.join(timeout=2.0)
            if process.is_alive():
                process.kill()
                process.join()


def _collect(ends: list[Connection], deadline: float, timeout: float) -> list[Any]:
    values: dict[int, Any] = {}
    while len(values) < len(ends):
        waiting = [end for rank, end in enumerate(ends) if rank not in values]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = [rank for rank in range(len(ends)) if rank not in values]
            raise TimeoutError(f"ranks {missing} of {len(ends)} did not end within {timeout:g} s")
        for end in ready:
            assert isinstance(end, Connection)
            rank = ends.index(end)
            values[rank] = _value(rank, end)
    return [values[rank] for rank in range(len(ends))]


def _value(rank: int, end: Connection) -> Any:
    try:
        value, error, trace = pickle.loads(end.recv_bytes())
    except EOFError:
        raise RuntimeError(f"rank {rank} ended without a result (killed, or out of memory)") from None
    if error is not None:
        error.add_note(f"on rank {rank}:\n{trace}")
        raise error
    return value


def _child(fn: Callable[..., Any], args: tuple[Any, ...], rank: int, num: int, port: int, end: Connection) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num),
        LOCAL_WORLD_SIZE=str(num),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", rank=rank, world_size=num)
        message = pickle.dumps((fn(*args), None, ""))
    except BaseException as error:
        message = _pickled_error(error)
    end.send_bytes(message)
    end.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def _pickled_error(error: BaseException) -> bytes:
    trace = traceback.format_exc()
    try:
        message = pickle.dumps((None, error, trace))
        pickle.loads(message)
    except Exception:
        return pickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}"), trace))
    return message


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port
