"""What would keep this machine from serving, found before it does.

Every check stands alone and none may raise: whatever is broken, the others are still told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from stateful_sglang.doctor import hardware, software
from stateful_sglang.doctor.finding import INSTALL, Finding
from stateful_sglang.doctor.screen import healthy, render

__all__ = ["Finding", "examine", "healthy", "render"]


def examine(port: int, cache_dir: Path | None = None) -> Iterator[Finding]:
    """Run every check, one by one. `port` is where a server would listen; 0 for any free one.

    What needs no import of torch comes first: a port in use is told at once.
    """
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("stateful_sglang", software.ourselves),
        ("python", software.python),
        ("sglang", software.sglang),
        ("settings", software.settings),
        ("port", lambda: hardware.port(port)),
        ("model", lambda: hardware.model(cache_dir)),
        ("cache folder", lambda: hardware.writable_cache(cache_dir)),
        ("memory", lambda: hardware.memory(cache_dir)),
        ("packages", software.packages),
        ("torch", software.torch),
        ("device", hardware.device),
        ("compiler", hardware.compiler),
        ("CPU kernels", hardware.kernels),
        ("attachments", software.attachments),
    ]
    for name, check in checks:
        yield _guarded(name, check)


def _guarded(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:  # Whatever is broken, the other rows must still be told.
        first = (str(error).strip().splitlines() or ["no message"])[0]
        return Finding(name, "fail", f"{type(error).__name__}: {first}", INSTALL)
