"""A policy, a draft source or a model family is a file and a line; all else follows the line."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from stateful_sglang.cpu import families
from stateful_sglang.cpu.families.base import Family
from stateful_sglang.draft import sources
from stateful_sglang.draft.sources.base import DraftSource
from stateful_sglang.prefix import policies
from stateful_sglang.prefix.policies.base import EvictionPolicy
from stateful_sglang.registry import Entry, Registry
from stateful_sglang.server.errors import LaunchError
from stateful_sglang.server.parser import parse

ROOT = Path(__file__).parents[2]


class Kind(NamedTuple):
    registry: Registry[Any]
    folder: str
    heading: str
    """Of the table in docs/choices.md."""


KINDS = {
    "policy": Kind(policies.POLICIES, "prefix/policies", "Eviction policies"),
    "source": Kind(sources.SOURCES, "draft/sources", "Draft sources"),
    "family": Kind(families.FAMILIES, "cpu/families", "Model families"),
}
ENTRIES = [
    pytest.param(kind, name, id=f"{kind}-{name}")
    for kind, each in KINDS.items()
    for name in each.registry
]


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_a_line_leads_to_what_it_says(kind: str, name: str) -> None:
    loaded = KINDS[kind].registry.load(name)
    if kind == "family":
        assert isinstance(loaded, Family)
    else:
        assert issubclass(loaded, {"policy": EvictionPolicy, "source": DraftSource}[kind])
        assert loaded().__class__ is loaded, "it can be made without arguments"


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_a_line_says_what_it_is_in_words_that_fit_a_help_text(kind: str, name: str) -> None:
    summary = KINDS[kind].registry[name].summary
    assert 3 <= len(summary) <= 80
    assert not set(summary) & set("%;\n")
    assert re.fullmatch(r"[a-z][a-z0-9-]*", name)


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_of_the_folder_has_its_line(kind: str) -> None:
    registry, folder, _ = KINDS[kind]
    files = {path.stem for path in (ROOT / "stateful_sglang" / folder).glob("*.py")}
    assert {registry[name].place.split(".")[0] for name in registry} == files - {"__init__", "base"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_docs_list_what_there_is(kind: str) -> None:
    text = (ROOT / "docs" / "choices.md").read_text(encoding="utf-8")
    section = text.split(f"## {KINDS[kind].heading}\n")[1].split("\n## ")[0]
    assert re.findall(r"^\| `([^`]+)` \|", section, flags=re.MULTILINE) == list(
        KINDS[kind].registry
    )


@pytest.mark.parametrize(
    ("option", "names"),
    [
        ("--eviction-policy", tuple(policies.POLICIES)),
        ("--draft", (sources.AUTO, sources.OFF, *sources.SOURCES)),
    ],
)
def test_the_command_line_takes_what_is_registered(option: str, names: tuple[str, ...]) -> None:
    for name in names:
        ours, _ = parse([option, name])
        assert getattr(ours, option[2:].replace("-", "_")) == name
    with pytest.raises(LaunchError, match=f"{option}: invalid choice: 'nothing'") as refusal:
        parse([option, "nothing"])
    offered = str(refusal.value).split("choose from ")[1].split(")")[0]
    assert re.findall(r"[a-z0-9-]+", offered) == list(names)


def test_what_stands_for_a_choice_by_default_is_one() -> None:
    assert policies.DEFAULT in policies.POLICIES
    assert sources.DEFAULT in sources.SOURCES
    assert not {sources.AUTO, sources.OFF} & set(sources.SOURCES)


def test_listing_the_choices_loads_nothing_heavy() -> None:
    code = (
        "import sys, stateful_sglang.launch; "
        "heavy = {'sglang', 'torch', 'transformers', 'numpy'} & set(sys.modules); "
        "sys.exit(f'imports {sorted(heavy)}' if heavy else 0)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_nothing_is_imported_before_it_is_chosen_and_then_what_the_line_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "grown"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "fruit.py").write_text("class Pear:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry: Registry[type] = Registry("fruit", "grown", {"pear": Entry("fruit.Pear", "sweet")})
    assert registry.summaries() == "pear: sweet"
    assert "grown" not in sys.modules
    assert registry.load("pear").__name__ == "Pear"


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"no eviction policy is called 'fifo'; there are: card"):
        policies.POLICIES.load("fifo")


@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_family_names_classes_that_sglang_has(name: str) -> None:
    family = families.FAMILIES.load(name)
    own = {family.model, f"{family.prefix}DecoderLayer", f"{family.prefix}Attention"}
    if family.mlp_module is None:
        own.add(f"{family.prefix}MLP")
    else:
        assert "Qwen2MLP" in classes(family.mlp_module)
    assert own <= classes(family.module)


def classes(module: str) -> set[str]:
    """Classes that a module of SGLang defines, read from its source."""
    package = importlib.util.find_spec("sglang")
    assert package is not None
    assert package.submodule_search_locations is not None
    path = Path(*package.submodule_search_locations, *module.split(".")[1:]).with_suffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def test_a_model_of_no_family_has_none() -> None:
    assert families.family_of("sglang.srt.models.llama.LlamaModel") is families.FAMILIES.load(
        "llama"
    )
    assert families.family_of("sglang.srt.models.llama_eagle.LlamaModel") is None
