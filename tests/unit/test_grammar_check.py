"""What the real grammar compiler takes and refuses."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest
import xgrammar
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_grammar_schemas import SCHEMAS, valid

from stateful_sglang.grammar.bounds import check_text
from stateful_sglang.grammar.errors import ConstraintError
from stateful_sglang.grammar.prepare import grammar_schema
from stateful_sglang.runtime.grammar_check import KNOWN_FORM, check

RULES = ("root", "x", "y")
ALTERNATIVES = st.lists(
    st.lists(st.sampled_from([*RULES, "a", "b", "a", "b"]), max_size=3), min_size=1, max_size=3
)
LONGEST = 4


@pytest.mark.parametrize(
    "text",
    [
        'root ::= root "a"',
        'root ::= x\nx ::= y "a"\ny ::= x "b"',
        'root ::= e root "a"\ne ::= "" | "" e',
        'root ::= "a" x\nx ::= x "b"',
        'root ::= "a" | "b" x\nx ::= x',
        "root ::= nowhere",
        'start ::= "a"',
        "root ::= (",
    ],
)
def test_a_grammar_that_leads_nowhere_is_refused(text: str) -> None:
    with pytest.raises(ConstraintError):
        check("ebnf", text)


@pytest.mark.parametrize(
    "text",
    [
        'root ::= root "a" | "b"',
        'root ::= x\nx ::= root "a" | "b"',
        'root ::= e root "a" | "b"\ne ::= "" | "c"',
        'root ::= "a" root',
        'root ::= "a"{0,5} | [a-z]+ "é"',
    ],
)
def test_recursion_that_reads_or_ends_is_taken(text: str) -> None:
    check("ebnf", text)


@given(st.fixed_dictionaries(dict.fromkeys(RULES, ALTERNATIVES)))
@settings(max_examples=300, deadline=None)
def test_a_grammar_that_is_taken_allows_exactly_its_language(rules: dict[str, Any]) -> None:
    """Left recursion, direct and through empty rules, included."""
    text = "\n".join(f"{name} ::= " + " | ".join(map(sequence, rules[name])) for name in RULES)
    words = language(rules)
    assume(words)
    try:
        check("ebnf", text)
    except ConstraintError:
        # Some rule never ends; what is reachable of it would be a dead end.
        assert not all(endings(rules).values())
        return
    info = xgrammar.TokenizerInfo(["a", "b", "<end>"], stop_token_ids=[2])
    matcher = xgrammar.GrammarMatcher(xgrammar.GrammarCompiler(info).compile_grammar(text))
    for length in range(LONGEST + 1):
        for letters in itertools.product("ab", repeat=length):
            word = "".join(letters)
            matcher.reset()
            taken = (not word or matcher.accept_string(word)) and matcher.is_completed()
            assert taken == (word in words), word


def sequence(symbols: list[str]) -> str:
    return " ".join(s if s in RULES else f'"{s}"' for s in symbols) or '""'


def language(rules: dict[str, Any]) -> set[str]:
    """Words of the root up to `LONGEST`, by deriving until nothing new comes."""
    words: dict[str, set[str]] = {name: set() for name in RULES}
    while True:
        before = {name: set(found) for name, found in words.items()}
        for name, alternatives in rules.items():
            for symbols in alternatives:
                parts = [words[s] if s in RULES else {s} for s in symbols]
                joined = map("".join, itertools.product(*parts))
                words[name] |= {word for word in joined if len(word) <= LONGEST}
        if words == before:
            return words["root"]


def endings(rules: dict[str, Any]) -> dict[str, bool]:
    ends = dict.fromkeys(RULES, False)
    for _ in RULES:
        for name, alternatives in rules.items():
            ends[name] = any(all(ends.get(s, True) for s in each) for each in alternatives)
    return ends


@pytest.mark.parametrize("text", ["(a", "(?<=a)b", r"\1"])
def test_a_regular_expression_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConstraintError, match="regular expression can't be compiled"):
        check("regex", text)


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"allOf": [{"type": "string"}, {"minLength": 3}]}, '"ab"'),
        ({"type": "object", "required": ["z"], "properties": {"a": {}}}, '{"a": 1}'),
        ({"$ref": "#/$defs/s", "minLength": 3, "$defs": {"s": {"type": "string"}}}, '"ab"'),
        ({"enum": [1, "a"], "minimum": 3}, "1"),
        ({"type": "string", "anyOf": [{"minLength": 3}, {"maxLength": 1}]}, '"ab"'),
        ({"minLength": 3}, '"ab"'),
        ({"type": "string", "pattern": "b$"}, '"abc"'),
    ],
)
def test_the_compiler_follows_what_it_would_have_dropped(schema: Any, value: str) -> None:
    schema = {**schema, "enum": ["x", *schema["enum"], 5]} if "enum" in schema else schema
    text = json.dumps(grammar_schema(schema))
    check("json_schema", text)
    assert not accepts(text, value)


def test_a_pattern_is_found_anywhere_in_the_string() -> None:
    text = json.dumps(grammar_schema({"type": "string", "pattern": "^https?://"}))
    assert accepts(text, '"https://example.com/a?b=c"')
    assert not accepts(text, '"ftp://example.com"')


def accepts(schema: str, text: str) -> bool:
    info = xgrammar.TokenizerInfo(
        [bytes([i]) for i in range(256)] + ["<end>"], stop_token_ids=[256]
    )
    matcher = xgrammar.GrammarMatcher(xgrammar.GrammarCompiler(info).compile_json_schema(schema))
    return bool(matcher.accept_string(text) and matcher.is_completed())


def test_the_compilers_grammars_have_the_form_that_is_read() -> None:
    serialised = json.loads(xgrammar.Grammar.from_ebnf('root ::= "a"').serialize_json())
    assert serialised["__VERSION__"] == KNOWN_FORM


LIKELY = frozenset(b'ab01"{}[],:nulltruefalsitem$rf.')
END = 128


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:60])
def test_whatever_the_grammar_lets_a_model_write_is_valid(schema: Any) -> None:
    """A model that writes at random, under the mask that SGLang's sampler would apply."""
    info = xgrammar.TokenizerInfo([*map(bytes, zip(range(END))), "<end>"], stop_token_ids=[END])
    compiler = xgrammar.GrammarCompiler(info, max_threads=1)
    compiled = compiler.compile_json_schema(json.dumps(grammar_schema(schema)))
    rng = random.Random(0)
    texts = [text for _ in range(60) if (text := written(compiled, rng)) is not None]
    assert texts
    for text in texts:
        assert valid(schema, json.loads(text)), text


def written(compiled: xgrammar.CompiledGrammar, rng: random.Random) -> str | None:
    """A text up to the end, or None where it grew too long."""
    matcher = xgrammar.GrammarMatcher(compiled)
    mask = xgrammar.allocate_token_bitmask(1, END + 1)
    text = ""
    while len(text) < 120:
        matcher.fill_next_token_bitmask(mask)
        words = mask[0].tolist()
        allowed = [token for token in range(END + 1) if (words[token >> 5] >> (token & 31)) & 1]
        assert allowed, f"nothing is allowed after {text!r}"
        if END in allowed and (len(allowed) == 1 or rng.random() < 0.6):
            return text
        letters = [token for token in allowed if token != END]
        likely = [token for token in letters if token in LIKELY] or letters
        closing = [token for token in likely if token in b'"}]']
        token = rng.choice(closing if closing and rng.random() < 0.3 else likely)
        matcher.accept_token(token)
        text += chr(token)
    return None


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        (r"([a-z]{1,63}\.){1,10}[a-z]{2,63}", True),
        ("a{9999}b{9999}", True),
        ("((a{1,1000}){1,1000}|b){2}", False),
        ("(" * 8 + "a" + "){1,1000}" * 8, False),
        ("a{1000}{1000}", False),
        (r"\(a{1000}\){1000}", True),
    ],
)
def test_repetitions_within_each_other_are_bounded_together(text: str, taken: bool) -> None:
    if taken:
        check_text(text, "regular expression")
        return
    with pytest.raises(ConstraintError, match="multiply to more than 100000"):
        check_text(text, "regular expression")
