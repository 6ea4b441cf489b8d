"""The examples of docs/sessions.md as programs."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "sessions.md"
ADDRESS = "http://127.0.0.1:30000"


def examples(language: str, url: str) -> str:
    """All examples of the page in a language, from top to bottom, for a server at `url`."""
    text = PAGE.read_text(encoding="utf-8")
    found = re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    whole = "\n".join(found)
    assert ADDRESS in whole
    return whole.replace(ADDRESS, url)
