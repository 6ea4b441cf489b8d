"""A stand-in for Triton on machines that have neither Triton nor a device it could compile for.

SGLang decorates kernels with `triton.jit` all over its modules, so it cannot be imported without a
`triton`, though none of those kernels runs on a CPU. The real package is 1 GB. This one lets the
decorated modules be imported; whoever launches a kernel of it gets an error that says so, never a
silent no-op. Host-side helpers (`cdiv`, `next_power_of_2`) compute what Triton's do.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

VERSION = "0.0.0"
"""Below every release that a caller could ask for, so that version checks choose their fallback."""


class TritonMissingError(RuntimeError):
    """A Triton kernel was launched where there is no Triton."""


class Kernel:
    """What `triton.jit` makes of a function: an object that can be named but not launched."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self.__name__ = getattr(fn, "__name__", repr(fn))
        self.__doc__ = fn.__doc__

    def __getitem__(self, grid: object) -> Callable[..., Any]:
        return self

    def __call__(self, *args: object, **kwargs: object) -> Any:
        raise TritonMissingError(
            f"the Triton kernel {self.__name__} was launched, but Triton is not installed: this "
            "machine was set up for the CPU, where SGLang should not come here. "
            "`pip install triton` brings the real one for a supported device."
        )

    run = warmup = __call__


class Config:
    """`triton.Config`, read by nobody without an autotuner."""

    def __init__(self, kwargs: dict[str, Any] | None = None, **options: Any) -> None:
        self.kwargs = kwargs or {}
        self.__dict__.update(options)


def jit(fn: Callable[..., Any] | None = None, **_: Any) -> Any:
    """`@triton.jit` and `@triton.jit(...)`."""
    return Kernel if fn is None else Kernel(fn)


def _keep(*_: Any, **__: Any) -> Callable[[Any], Any]:
    """`@triton.autotune(...)` and `@triton.heuristics(...)`: the kernel below stays as it is."""
    return lambda kernel: kernel


def cdiv(x: int, y: int) -> int:
    """Quotient rounded up."""
    return (x + y - 1) // y


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()


class _Module(types.ModuleType):
    """A module whose unknown names are placeholders: classes where capitalised, else submodules."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"the stand-in {self.__name__} has no {name}")
        value: Any
        if name[0].isupper():
            value = type(name, (), {"__module__": self.__name__})
        else:
            value = importlib.import_module(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value

    def __call__(self, fn: Any = None, *_: Any, **__: Any) -> Any:
        """A name that was used as a decorator after all, such as `triton.language.core.builtin`."""
        return Kernel(fn) if callable(fn) else Kernel


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name == "triton" or name.startswith("triton."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__name__ == "triton":
            module.__dict__.update(
                __version__=VERSION,
                IS_STANDIN=True,
                jit=jit,
                autotune=_keep,
                heuristics=_keep,
                Config=Config,
                cdiv=cdiv,
                next_power_of_2=next_power_of_2,
            )
        elif module.__name__ == "triton.backends":
            module.__dict__.update(backends={})  # torch asks which devices Triton compiles for


def install() -> None:
    """Answer `import triton` in this process. The caller knows that there is no real one."""
    sys.meta_path.append(_Finder())


def find(name: str) -> importlib.machinery.ModuleSpec | None:
    """The stand-in's module of this name, None for other packages'."""
    return _Finder().find_spec(name)


def answers(spec: importlib.machinery.ModuleSpec) -> bool:
    """Whether what was found is the stand-in."""
    return isinstance(spec.loader, _Finder)
