"""Where processes of a run meet: the address and port of the first one, and the interface they talk over."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as TooLate

from eetrain.cluster.launch import Launch
from eetrain.diagnosis.check import Check, reason

_SECONDS = 3.0
_FIRST_PORT = 15000  # Lightning's choice in a Slurm job, plus the last four digits of the job's id


def meeting_checks(environ: Mapping[str, str]) -> list[Check]:
    """Address and port of the first process, and interfaces, as far as variables name them."""
    return [*check_meeting_point(environ), *check_interfaces(environ, [name for _, name in socket.if_nameindex()])]


def check_meeting_point(environ: Mapping[str, str]) -> list[Check]:
    """Whether ``MASTER_ADDR`` is an address and ``MASTER_PORT`` is free; nothing where neither is set or needed."""
    launch = Launch.of(environ)
    checks = []
    if (address := environ.get("MASTER_ADDR")) is not None:
        checks.append(_address(address))
    in_slurm = launch.launcher == "slurm" and launch.world_size > 1
    port = environ.get("MASTER_PORT", _slurm_port(environ) if in_slurm else None)
    if port is None:
        return checks
    if not port.isdigit() or not 0 < int(port) < 65536:
        hint = "Set it to a free port between 1024 and 65535, or leave it to the launcher."
        return [*checks, Check("meeting port", f"MASTER_PORT={port!r} is no port", "error", hint)]
    # torchrun itself listens there; elsewhere the first process will.
    if launch.launcher != "torchrun" and launch.rank == 0:
        checks.append(_port(int(port), named="MASTER_PORT" in environ))
    return checks


def check_interfaces(environ: Mapping[str, str], present: Iterable[str]) -> list[Check]:
    """Whether the interfaces that variables name are there, and what is used where none is named.

    Args:
        environ: variables.
        present: names of the interfaces of this machine.
    """
    names = sorted(present)
    rules: dict[str, Callable[[str], list[str]]] = {
        "GLOO_SOCKET_IFNAME": lambda value: [name for name in value.split(",") if name in names],
        "NCCL_SOCKET_IFNAME": lambda value: _as_nccl(value, names),
    }
    checks = []
    for variable, chosen in rules.items():
        value = environ.get(variable)
        if not value:
            continue
        label = f"{variable.partition('_')[0].lower()} interface"
        if chosen(value):
            checks.append(Check(label, f"{', '.join(chosen(value))} ({variable}={value})"))
        else:
            hint = f"This machine has {', '.join(names)}; `ip -brief address` shows which one reaches other nodes."
            checks.append(Check(label, f"{variable}={value}, which is not there", "error", hint))
    return checks if environ.get("GLOO_SOCKET_IFNAME") else [_default_interface(Launch.of(environ).nodes), *checks]


def _as_nccl(value: str, names: list[str]) -> list[str]:
    """NCCL's rules: beginnings of names, ``=`` in front for whole names, ``^`` in front for all others."""
    excluded, plain = value.startswith("^"), value.removeprefix("^")
    exact, plain = plain.startswith("="), plain.removeprefix("=")
    wanted = tuple(plain.split(","))
    return [name for name in names if (name in wanted if exact else name.startswith(wanted)) != excluded]


def _default_interface(nodes: int) -> Check:
    """Gloo takes the interface of this host's own name; NCCL looks for one by itself, so this is no error."""
    host = socket.gethostname()
    found = _resolve(host)
    if isinstance(found, str):
        if not found.startswith("127.") or nodes == 1:
            return Check("gloo interface", f"that of {found} ({host})")
        hint = "Set GLOO_SOCKET_IFNAME to the interface that reaches the other nodes (`ip -brief address`)."
        return Check("gloo interface", f"{host} is {found}, which other nodes cannot reach", "note", hint)
    if nodes == 1:
        return Check("gloo interface", f"loopback: {host} has no address")
    hint = f"Set GLOO_SOCKET_IFNAME, or give {host} an address in /etc/hosts or DNS."
    return Check("gloo interface", f"{host} has no address ({reason(found)})", "note", hint)


def _address(address: str) -> Check:
    found = _resolve(address)
    if isinstance(found, str):
        return Check("meeting point", address if found == address else f"{address} is {found}")
    hint = "Set it to a host that every node knows, or unset it: srun and torchrun find one."
    return Check("meeting point", f"MASTER_ADDR={address} has no address ({reason(found)})", "error", hint)


def _port(port: int, *, named: bool) -> Check:
    what = f"MASTER_PORT={port}" if named else f"{port} (from the job's id)"
    try:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("", port))
            listener.listen()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            hint = "Set MASTER_PORT to a free port" + (", or unset it." if named else " for all processes.")
            return Check("meeting port", f"{what} is taken on this machine", "error", hint)
        hint = "Set MASTER_PORT to a free port above 1023."
        return Check("meeting port", f"{what} cannot be used: {reason(error)}", "error", hint)
    return Check("meeting port", f"{what} is free")


def _slurm_port(environ: Mapping[str, str]) -> str | None:
    last = environ.get("SLURM_JOB_ID", "")[-4:]
    return str(_FIRST_PORT + int(last)) if last.isdigit() else None


def _resolve(host: str) -> str | OSError:
    """An address of ``host``; the error if there is none, or no answer in time."""
    pool = ThreadPoolExecutor(1)  # a lookup cannot be given a time limit of its own
    try:
        return str(pool.submit(socket.gethostbyname, host).result(timeout=_SECONDS))
    except TooLate:
        return OSError(errno.ETIMEDOUT, "no answer from name service")
    except (OSError, UnicodeError) as error:
        return error if isinstance(error, OSError) else OSError(errno.EINVAL, str(error))
    finally:
        pool.shutdown(wait=False)
