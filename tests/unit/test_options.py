"""An option is one field: the command line, the processes' settings, doctor and docs follow it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stateful_sglang.doctor import software
from stateful_sglang.prefix import policies
from stateful_sglang.registry import Entry, Registry
from stateful_sglang.runtime import plugin
from stateful_sglang.runtime.declarations import Declared, OptionError
from stateful_sglang.runtime.options import ENV, PREFIX, VARIABLES, Options, declared
from stateful_sglang.server import parser
from stateful_sglang.server.errors import LaunchError

ROOT = Path(__file__).parents[2]
SETTABLE = [each for each in declared() if each.option.settable]
BY_NAME = {each.name: each for each in declared()}


def values(option: Declared) -> st.SearchStrategy[Any]:
    """What an option takes."""
    bounds = option.option.bounds
    if option.kind is bool:
        return st.booleans()
    if option.choices is not None:
        return st.sampled_from(option.choices)
    if bounds is not None and option.kind is int:
        return st.integers(int(bounds.low), int(bounds.high))
    if bounds is not None:
        return st.floats(bounds.low, bounds.high)
    if option.kind is tuple:
        word = st.text("ab.:/*", min_size=1, max_size=5)
        return st.lists(word, max_size=3).map(tuple)
    return st.just(option.default)


VALID = st.fixed_dictionaries({each.name: values(each) for each in declared()}).map(
    lambda chosen: Options(**chosen)
)


def words(options: Options) -> list[str]:
    """The command line that says this."""
    line = []
    for each in SETTABLE:
        value = getattr(options, each.name)
        if value not in (None, ()):
            shown = ("on" if value else "off") if each.kind is bool else str(value)
            shown = ",".join(value) if each.kind is tuple else shown
            line += [each.flag, shown]
    return line


@given(VALID)
def test_what_is_written_on_the_command_line_reaches_the_processes(options: Options) -> None:
    given_here, theirs = parser.parse([*words(options), "--tp", "2"])
    assert theirs == ["--tp", "2"]
    assert replace(given_here, quiet=options.quiet) == options
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENV, "")
        options.to_env()
        left = {each.name: each.default for each in declared() if not each.option.travels}
        assert Options.from_env() == replace(options, **left)


def test_an_option_of_words_takes_commas_and_is_taken_several_times() -> None:
    words = ["--allow-host", "a,b", "--allow-host=c", "--allow-origin", "https://x, null"]
    ours, _ = parser.parse([*words, "--insecure", "--port", "1"])
    assert ours.allow_host == ("a", "b", "c")
    assert ours.allow_origin == ("https://x", "null")
    assert ours.insecure


def test_nothing_given_is_every_default() -> None:
    assert parser.parse([])[0] == Options()


@pytest.mark.parametrize("option", SETTABLE, ids=lambda option: option.name)
def test_help_lists_each_option_with_its_default(
    option: Declared, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        parser.parse(["--help"])
    (line,) = re.findall(rf"^  {option.flag} .*(?:\n {{6,}}.*)*", capsys.readouterr().out, re.M)
    assert option.help in " ".join(line.split())
    assert (
        f"(default: {option.shown_default}{option.option.default_note})" in line
        or option.default in (None, ())
    )


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("pin_budget", 1.5, "--pin-budget is 1.5; it is a share of the KV pool between 0 and 1"),
        ("pin_budget", float("nan"), "--pin-budget is nan"),
        ("max_draft", 65, "--max-draft is 65; expected 1 to 64 tokens"),
        ("max_draft", True, "--max-draft is True; expected a value of type int"),
        ("max_draft", "8", "--max-draft is '8'; expected a value of type int"),
        ("stateful", 1, "--stateful is 1; expected a value of type bool"),
        ("draft", "nothing", "--draft is 'nothing'; expected one of auto, off, suffix"),
        ("draft", None, "--draft is None; expected a value of type str"),
    ],
)
def test_a_value_that_an_option_does_not_take_is_refused_wherever_it_comes_from(
    name: str, value: Any, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OptionError, match=re.escape(expected)):
        Options(**{name: value})
    monkeypatch.setenv(ENV, json.dumps({name: value}))
    with pytest.raises(OptionError, match=re.escape(f"{ENV}: {expected}")):
        Options.from_env()


@pytest.mark.parametrize("raw", ["{", "[]", '{"pin_budgets": 0.5}', '{"cache_dir": "/x"}'])
def test_settings_that_no_launcher_wrote_end_the_process(
    raw: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENV, raw)
    with pytest.raises(SystemExit, match=f"{ENV} is .*Unset it"):
        plugin.activate()
    finding = software.settings()
    assert (finding.verdict, finding.remedy) == ("fail", f"unset {ENV}")


def test_a_line_in_a_registry_is_a_choice_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    grown: Registry[Any] = Registry(
        "eviction policy", "x", {**policies.POLICIES, "fifo": Entry("fifo.Fifo", "the oldest")}
    )
    monkeypatch.setattr(policies, "POLICIES", grown)
    assert parser.parse(["--eviction-policy", "fifo"])[0].eviction_policy == "fifo"
    assert "fifo: the oldest" in BY_NAME["eviction_policy"].help


def test_a_bad_option_on_the_command_line_names_where_to_look() -> None:
    with pytest.raises(LaunchError, match=r"--draft: invalid choice: 'x'.*--help"):
        parser.parse(["--draft", "x"])


def rows(heading: str) -> list[list[str]]:
    text = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_the_docs_list_every_option_with_its_values_default_and_help() -> None:
    assert rows("Options") == [
        [
            f"`{each.flag}`",
            ", ".join(f"`{word}`" for word in each.choices or ()) or f"{each.option.metavar}",
            f"`{each.shown_default}`{each.option.default_note}" if each.shown_default else "",
            each.help,
        ]
        for each in SETTABLE
    ]


def test_the_docs_list_every_environment_variable() -> None:
    assert rows("Environment variables") == [
        [f"`{name}`", what] for name, what in VARIABLES.items()
    ]


def test_the_variables_that_the_package_reads_are_those_declared() -> None:
    found: set[str] = set()
    for path in (ROOT / "stateful_sglang").rglob("*.py"):
        found |= set(re.findall(rf"{PREFIX}[A-Z_]*[A-Z]", path.read_text(encoding="utf-8")))
    assert found | {ENV} == set(VARIABLES)


def test_the_doctor_names_settings_that_are_left_over_or_misspelt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(ENV, raising=False)
    monkeypatch.setenv(f"{PREFIX}CPU_ISO", "avx2")
    assert software.settings().remedy == f"did you mean {PREFIX}CPU_ISA?"
    monkeypatch.delenv(f"{PREFIX}CPU_ISO")
    assert software.settings().verdict == "ok"
    monkeypatch.setenv(ENV, "{}")
    finding = software.settings()
    assert (finding.verdict, finding.remedy) == ("note", f"unset {ENV}")
