"""The model cache holds whole models or none, whatever interrupts a conversion."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stateful_sglang import cache_folder
from stateful_sglang.embedded import cache as model
from stateful_sglang.embedded.cache import (
    CacheState,
    ModelError,
    check,
    ensure_default_model,
    model_path,
)

FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 40}


@pytest.fixture(autouse=True)
def _package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A package with a small file in the place of the real one."""
    gguf = tmp_path / "tiny.gguf"
    gguf.write_bytes(b"GGUF")
    monkeypatch.setattr(model, "find_gguf", lambda **_: gguf)
    monkeypatch.setattr(model.importlib.metadata, "version", lambda _: "0.0")


def write(gguf: Path, out: Path) -> None:
    for name, content in FILES.items():
        (out / name).write_bytes(content)


def refuse(gguf: Path, out: Path) -> None:
    raise AssertionError("converted again")


def quiet(text: str) -> None:
    pass


def test_is_converted_once(tmp_path: Path) -> None:
    path = ensure_default_model(tmp_path, convert=write, say=quiet)
    assert path == model_path(tmp_path)
    assert {f.name: f.read_bytes() for f in path.iterdir() if f.name in FILES} == FILES
    assert ensure_default_model(tmp_path, convert=refuse, say=quiet) == path
    assert check(tmp_path, hashes=True) == CacheState(path, None, True)


@pytest.mark.parametrize("error", [RuntimeError("no weights"), KeyboardInterrupt()])
def test_a_failing_conversion_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def fail(gguf: Path, out: Path) -> None:
        write(gguf, out)
        raise error

    with pytest.raises(type(error)):
        ensure_default_model(tmp_path, convert=fail, say=quiet)
    assert check(tmp_path).problem == "not converted yet"
    assert [path.name for path in (tmp_path / "models").iterdir() if path.is_dir()] == []


def _convert_slowly(cache: Path) -> None:
    def slow(gguf: Path, out: Path) -> None:
        (out / "config.json").write_bytes(FILES["config.json"])
        time.sleep(60)

    ensure_default_model(cache, convert=slow, say=quiet)


def test_a_killed_conversion_is_no_model_and_the_next_one_sweeps_it(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_convert_slowly, args=(tmp_path,))
    process.start()
    partial = _wait_for(lambda: list((tmp_path / "models").glob("*.part-*/config.json")))
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert check(tmp_path).problem == "not converted yet"
    path = ensure_default_model(tmp_path, convert=write, say=quiet)
    assert check(tmp_path, hashes=True).problem is None
    assert not partial[0].parent.exists()
    assert [entry for entry in path.parent.iterdir() if entry.is_dir()] == [path]


def _wait_for(look: Callable[[], list[Path]]) -> list[Path]:
    for _ in range(1000):
        if found := look():
            return found
        time.sleep(0.01)
    raise AssertionError("the conversion never began")


def _convert_and_count(cache: Path, log: Path) -> None:
    def counted(gguf: Path, out: Path) -> None:
        with log.open("a") as file:
            file.write("converted\n")
        time.sleep(0.3)
        write(gguf, out)

    ensure_default_model(cache, convert=counted, say=quiet)


def test_processes_that_ask_at_once_convert_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    log = tmp_path / "log"
    processes = [context.Process(target=_convert_and_count, args=(tmp_path, log)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert log.read_text() == "converted\n"


@pytest.mark.parametrize("name", [*FILES, model.MANIFEST])
@pytest.mark.parametrize("content", [None, b"", b"cut"])
def test_a_damaged_model_is_noticed_and_replaced(
    tmp_path: Path, name: str, content: bytes | None
) -> None:
    path = ensure_default_model(tmp_path, convert=write, say=quiet)
    if content is None:
        (path / name).unlink()
    else:
        (path / name).write_bytes(content)
    assert check(tmp_path).problem is not None
    said: list[str] = []
    ensure_default_model(tmp_path, convert=write, say=said.append)
    assert check(tmp_path, hashes=True).problem is None
    assert any("damaged" in line for line in said)


def test_hashes_notice_what_sizes_do_not(tmp_path: Path) -> None:
    path = ensure_default_model(tmp_path, convert=write, say=quiet)
    weights = path / "model.safetensors"
    weights.write_bytes(b"x" * weights.stat().st_size)
    assert check(tmp_path).problem is None
    assert check(tmp_path, hashes=True).problem == (
        "model.safetensors does not have its recorded SHA-256"
    )


def test_an_unwritable_cache_names_the_way_out(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(ModelError, match=cache_folder.ENV):
        ensure_default_model(blocked, convert=write, say=quiet)


def test_too_little_disk_is_said_before_converting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "NEEDED_BYTES", 1 << 62)
    with pytest.raises(ModelError, match=r"MB free, converting the default model needs"):
        ensure_default_model(tmp_path, convert=refuse, say=quiet)


@pytest.mark.parametrize(
    ("environment", "argument", "expected"),
    [
        ({"XDG_CACHE_HOME": "/x"}, None, "/x/stateful_sglang"),
        ({"XDG_CACHE_HOME": "/x", cache_folder.ENV: "/y"}, None, "/y"),
        ({cache_folder.ENV: "/y"}, Path("/z"), "/z"),
    ],
)
def test_the_folder_follows_flag_then_environment_then_xdg(
    environment: dict[str, str],
    argument: Path | None,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(cache_folder.ENV, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_folder.root(argument) == Path(expected)
