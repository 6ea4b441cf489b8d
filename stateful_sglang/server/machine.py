"""What this machine has: cores, free memory, free ports. Read once at start, never during a run."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import NamedTuple

import psutil

_CGROUP = Path("/sys/fs/cgroup")


class Machine(NamedTuple):
    """The part of a machine that a CPU server is sized by."""

    cores: int
    """Physical cores this process may use, within its affinity and CPU quota."""
    free_memory: int
    """Bytes that can be taken without swapping, within the container's limit."""
    load: float = 0.0
    """Runnable processes of others, averaged over the last minute."""


def probe() -> Machine:
    """Look at this machine as it is now."""
    return Machine(usable_cores(), free_memory(), psutil.getloadavg()[0])


def usable_cores() -> int:
    """Physical cores within the affinity mask and the cgroup's CPU quota; at least 1."""
    logical = _affinity()
    cores = len(_one_thread_per_core(logical))
    quota = _cpu_quota()
    return max(1, cores if quota is None else min(cores, round(quota)))


def free_memory() -> int:
    """Available bytes: the kernel's estimate, or what the cgroup still allows if that is less."""
    available = psutil.virtual_memory().available
    limit, current = _read_int("memory.max"), _read_int("memory.current")
    if limit is None or current is None:
        return available
    return max(0, min(available, limit - current + _reclaimable_file_cache()))


def port_problem(host: str, port: int) -> str | None:
    """Why a server could not listen at this address, or None where it can."""
    if not 0 <= port <= 65535:
        return "a port is a number up to 65535"
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        return f"{host}:{port} is no address to listen on: {error}"
    with socket.socket(family, kind, proto) as probe_socket:
        probe_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe_socket.bind(address)
        except OSError as error:
            return error.strerror or str(error)
    return None


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _one_thread_per_core(logical: set[int]) -> set[int]:
    """The lowest-numbered usable hardware thread of each core."""
    chosen = set()
    for cpu in logical:
        siblings = _siblings(cpu) & logical
        chosen.add(min(siblings, default=cpu))
    return chosen


def _siblings(cpu: int) -> set[int]:
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    try:
        text = path.read_text().strip()
    except OSError:
        return {cpu}
    siblings: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        siblings.update(range(int(first), int(last or first) + 1))
    return siblings


def _cpu_quota() -> float | None:
    """CPUs that the cgroup (version 2) allows, or None where it sets no limit."""
    try:
        quota, period = (_CGROUP / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _read_int(name: str) -> int | None:
    try:
        return int((_CGROUP / name).read_text())
    except (OSError, ValueError):
        return None


def _reclaimable_file_cache() -> int:
    try:
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    values = dict(line.split(maxsplit=1) for line in lines)
    return int(values.get("inactive_file", 0))
