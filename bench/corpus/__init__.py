"""Frozen text for prompts: moving our own source changes none. README.md says what it is."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).with_name("repository")
"""A small source repository, which tools may list, search and read."""


def code() -> str:
    """All Python files of the repository, one after the other: some 150,000 characters."""
    return "".join(file.read_text(encoding="utf-8") for file in sorted(REPOSITORY.rglob("*.py")))


def excerpts(count: int, characters: int = 400) -> list[str]:
    """Different pieces of one file, each overlapping the one before by half.

    Raises:
        ValueError: The file is too short for so many.
    """
    text = (REPOSITORY / "stateful_sglang/api/service.py").read_text(encoding="utf-8")
    step = characters // 2
    if (count + 1) * step > len(text):
        raise ValueError(f"{count} excerpts wanted; the file has room for {len(text) // step - 1}")
    return [text[step * number : step * number + characters] for number in range(count)]
