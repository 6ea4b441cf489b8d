"""SGLang's source, read and never imported: the installed release, a wheel file, or a folder.

Reading needs neither torch nor a working SGLang, so the doctor can tell what is broken, and a
release that is not installed can be compared with the one that is.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import zipfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path


class ReleaseError(Exception):
    """What was named as a release of SGLang is none; the message is for a person."""


class Sources:
    """The modules of one release of SGLang."""

    def __init__(self, name: str, read: Callable[[str], str | None]) -> None:
        """`read` gives a file's text by its path in the package's parent (`sglang/srt/x.py`), or
        None if there is no such file."""
        self.name = name
        self._read = read
        self._trees: dict[str, ast.Module | None] = {}

    def find(self, target: str) -> ast.AST | None:
        """The syntax tree of a module, class, function, method or module-level name.

        Args:
            target: Dotted path, for example `sglang.srt.managers.scheduler.Scheduler.run_batch`.

        Returns:
            None where nothing of that name is defined there (an import is no definition).

        Raises:
            ReleaseError: The module is not Python as this interpreter reads it.
        """
        parts = target.split(".")
        for cut in range(len(parts), 0, -1):
            tree = self._module(".".join(parts[:cut]))
            if tree is not None:
                return _within(tree, parts[cut:])
        return None

    def definition(self, target: str) -> str:
        """Where a name is defined that modules hand on to each other by importing it.

        Returns:
            `target` itself where it is defined there, or nowhere to be found.
        """
        module, _, name = target.rpartition(".")
        tree = self._module(module)
        if tree is None or _within(tree, [name]) is not None:
            return target
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self.definition(f"{node.module}.{alias.name}")
        return target

    def _module(self, module: str) -> ast.Module | None:
        if module not in self._trees:
            self._trees[module] = self._parse(module)
        return self._trees[module]

    def _parse(self, module: str) -> ast.Module | None:
        path = module.replace(".", "/")
        for candidate in (f"{path}.py", f"{path}/__init__.py"):
            text = self._read(candidate)
            if text is not None:
                try:
                    return ast.parse(text)
                except SyntaxError as error:
                    raise ReleaseError(
                        f"{self.name}: {candidate} cannot be read as Python: {error}"
                    ) from error
        return None


@cache
def installed() -> Sources:
    """What `import sglang` would find; a release without modules where it is missing."""

    def read(path: str) -> str | None:
        package, _, rest = path.partition("/")
        folder = _package_folder(package) if rest else None
        return None if folder is None else _text(folder / rest)

    return Sources("the installed SGLang", read)


def open_release(path: Path) -> Sources:
    """A release that is not installed: a wheel, a folder with `sglang/` in it, or that package.

    Raises:
        ReleaseError: There is no SGLang at `path`; the message says what was expected.
    """
    expected = "a wheel file of SGLang, a folder that holds sglang/, or that package's folder"
    if not path.exists():
        raise ReleaseError(f"{path} does not exist; expected {expected}")
    if path.is_file():
        return _wheel(path, expected)
    for parent in (path, path / "python", path.parent if path.name == "sglang" else path):
        if (parent / "sglang" / "srt").is_dir():
            return _named(path, partial(_beneath, parent))
    raise ReleaseError(f"{path} holds no sglang/srt; expected {expected}")


def _wheel(path: Path, expected: str) -> Sources:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise ReleaseError(
            f"{path} cannot be opened as a wheel ({error}); expected {expected}"
        ) from error
    names = frozenset(archive.namelist())
    if not any(name.startswith("sglang/srt/") for name in names):
        raise ReleaseError(f"{path} holds no sglang/srt; expected {expected}")
    return _named(path, lambda file: archive.read(file).decode() if file in names else None)


def _named(path: Path, read: Callable[[str], str | None]) -> Sources:
    """A release named by the version it states, else by where it lies."""
    stated = re.search(r"^__version__ .*= '([^']+)'$", read("sglang/_version.py") or "", re.M)
    return Sources(f"SGLang {stated[1]}" if stated else str(path), read)


@cache
def _package_folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _beneath(folder: Path, file: str) -> str | None:
    return _text(folder / file)


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _within(node: ast.AST, names: list[str]) -> ast.AST | None:
    for name in names:
        body: list[ast.stmt] = getattr(node, "body", [])
        found = next((child for child in body if _defines(child, name)), None)
        if found is None:
            return None
        node = found
    return node


def _defines(statement: ast.stmt, name: str) -> bool:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return statement.name == name
    if isinstance(statement, ast.Assign):
        return any(isinstance(t, ast.Name) and t.id == name for t in statement.targets)
    return (
        isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and statement.target.id == name
    )
