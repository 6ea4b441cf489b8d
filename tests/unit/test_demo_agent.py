"""The demo's tools run on real files, and give errors back as a tool would."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from jsonschema import validate

from bench.corpus import REPOSITORY
from bench.workloads import agent, tools
from stateful_sglang.grammar.calls import tool_call_schema


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    (root / "src/__pycache__").mkdir(parents=True)
    (root / "src/a.py").write_text("import os\nNEEDLE = 1\n")
    (root / "src/long.py").write_text("".join(f"line {n}\n" for n in range(1, 400)))
    (root / "src/__pycache__/a.pyc").write_bytes(b"\xff NEEDLE")
    (root / "src/picture").write_bytes(b"\xff\xfe\x00")
    (root / ".hidden.py").write_text("NEEDLE\n")
    (tmp_path / "secret.py").write_text("NEEDLE\n")
    (root / "src/link.py").symlink_to(tmp_path / "secret.py")
    return root


def run(repository: Path, name: str, **arguments: object) -> tools.Outcome:
    return tools.run_tool(repository, json.dumps({"name": name, "arguments": arguments}))


def test_search_names_file_and_line_and_skips_what_is_hidden(repository: Path) -> None:
    assert run(repository, "search", text="NEEDLE", path=".") == ("src/a.py:2: NEEDLE = 1", False)
    assert run(repository, "search", text="NEEDLE", path="src/a.py").text.startswith("src/a.py:2")
    assert run(repository, "search", text="absent", path=".").text == "no line contains absent"


def test_read_gives_the_lines_asked_for(repository: Path) -> None:
    outcome = run(repository, "read", path="src/long.py", first_line=10, last_line=12)
    assert outcome == ("10 line 10\n11 line 11\n12 line 12", False)


def test_count_and_list_look_at_the_disk(repository: Path) -> None:
    assert run(repository, "count_lines", path="src/a.py").text == "src/a.py has 2 lines"
    listed = run(repository, "list", path="src").text.splitlines()
    assert "a.py (21 bytes)" in listed
    assert not any("pycache" in line for line in listed)


def test_a_long_result_is_cut_and_says_so(repository: Path) -> None:
    outcome = run(repository, "read", path="src/long.py", first_line=1, last_line=399)
    assert outcome.text.splitlines()[-1] == "... (399 lines in all)"
    assert len(outcome.text.splitlines()) == tools.RESULT_LINES + 1


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("read", {"path": "../secret.py", "first_line": 1, "last_line": 1}, "outside"),
        ("read", {"path": "src/link.py", "first_line": 1, "last_line": 1}, "outside"),
        ("read", {"path": "/etc/hostname", "first_line": 1, "last_line": 1}, "outside"),
        ("read", {"path": "src/none.py", "first_line": 1, "last_line": 1}, "does not exist"),
        ("read", {"path": "src/a.py", "first_line": 3, "last_line": 4}, "has lines 1 to 2"),
        ("read", {"path": "src/a.py", "first_line": 2, "last_line": 1}, "has lines 1 to 2"),
        ("read", {"path": "src/picture", "first_line": 1, "last_line": 1}, "is not text"),
        ("count_lines", {"path": "src"}, "is not a file"),
        ("list", {"path": "src/a.py"}, "is not a folder"),
        ("search", {"text": "", "path": "src"}, "no text to look for"),
        ("delete", {"path": "src"}, "not a call of a known function"),
        ("read", {"path": "src/a.py"}, "not a call of a known function"),
    ],
)
def test_a_call_that_cannot_be_carried_out_is_a_result(
    repository: Path, name: str, arguments: dict[str, object], message: str
) -> None:
    outcome = run(repository, name, **arguments)
    assert outcome.failed
    assert outcome.text.startswith("error: ")
    assert message in outcome.text


@pytest.mark.parametrize("text", ["", "{", "[]", '{"name": "read"}', '{"name": "read", "arg'])
def test_nonsense_is_a_result_too(repository: Path, text: str) -> None:
    assert tools.run_tool(repository, text).failed


def test_examples_are_calls_that_the_schema_allows() -> None:
    schema = tool_call_schema(agent.TOOLS)
    calls = [json.loads(call) for _, call in agent.examples()]
    for call in calls:
        validate(call, schema)
    assert {call["name"] for call in calls} == {tool["function"]["name"] for tool in agent.TOOLS}


@pytest.mark.parametrize("turns", [1, 6, agent.MAX_TURNS])
def test_there_are_as_many_tasks_as_turns(turns: int) -> None:
    for name in agent.TASKS:
        asked = agent.tasks(name, turns)
        assert len(asked) == len(set(asked)) == turns


def test_every_task_can_be_carried_out_in_the_corpus() -> None:
    place = '"(?P<path>.+)"'
    calls = {
        "Search": ("search", f'Search for "(?P<text>.+)" in {place}.'),
        "Read": ("read", rf"Read lines (?P<first_line>\d+) to (?P<last_line>\d+) of {place}."),
        "List": ("list", f"List the files in {place}."),
        "Count": ("count_lines", f"Count the lines of {place}."),
    }
    for name in agent.TASKS:
        for task in agent.tasks(name, agent.MAX_TURNS):
            tool, pattern = calls[task.split()[0]]
            found = re.fullmatch(pattern, task)
            arguments = {k: int(v) if v.isdigit() else v for k, v in found.groupdict().items()}
            outcome = run(REPOSITORY, tool, **arguments)
            assert not outcome.failed, (task, outcome.text)
            assert "no line contains" not in outcome.text, task
