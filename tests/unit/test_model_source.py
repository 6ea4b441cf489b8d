"""The package with the default model, and the tokenizer made from it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stateful_sglang.embedded import cache as model
from stateful_sglang.embedded.conversion import save_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    from stateful_sglang.cpu.platform import prepare

    prepare()
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(model.find_gguf(), folder, max_length=8192)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return AutoTokenizer.from_pretrained(folder)


def test_a_missing_package_is_an_error_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "PACKAGE", "no-such-package-of-ours")
    with pytest.raises(model.ModelError, match="scripts/install"):
        model.find_gguf()


def test_a_changed_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_record_hash", lambda path: "another")
    with pytest.raises(model.ModelError, match="differs from what"):
        model.find_gguf()
    assert model.find_gguf(hashes=False).suffix == ".gguf"


def test_the_end_token_ends_a_chat_turn(tokenizer) -> None:
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer.encode("a<|im_end|>")[-1] == 2
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, tokenize=False
    )
    assert rendered.endswith("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")


def test_digits_are_tokens_of_their_own(tokenizer) -> None:
    assert tokenizer.tokenize("1234 x12") == ["1", "2", "3", "4", "Ġx", "1", "2"]


# The model's vocabulary lacks the bytes of some control characters and of planes 4 and up.
WRITTEN = st.characters(max_codepoint=0x3FFFF, exclude_categories=("Cs", "Cc")) | st.sampled_from(
    "\n\t"
)


@settings(max_examples=300)
@given(st.text(alphabet=WRITTEN))
def test_decoding_gives_back_what_was_encoded(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_another_kind_of_tokenizer_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"ggml.model": "llama", "ggml.pre": "default"}
    monkeypatch.setattr("stateful_sglang.embedded.conversion._fields", lambda gguf: fields)
    with pytest.raises(ValueError, match=r"expected \('gpt2', 'smollm'\)"):
        save_tokenizer(tmp_path / "other.gguf", tmp_path, max_length=1)
