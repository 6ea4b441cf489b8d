"""The embedded model converts to the weights and the tokenizer it always had."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from stateful_sglang.embedded import cache as model

pytestmark = pytest.mark.slow

DIGESTS = {
    "model.safetensors": "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b",
    "tokenizer.json": "4f190f7976aa03fcb4ae4d1c5876033e4aaab29b2756161db5a6e1807a104b29",
}
"""As written since the first release of this package, whichever transformers read the GGUF."""


def test_a_new_cache_gets_the_bytes_of_the_first(tmp_path: Path) -> None:
    converted = model.ensure_default_model(tmp_path, say=lambda text: None)
    found = {name: hashlib.sha256((converted / name).read_bytes()).hexdigest() for name in DIGESTS}
    assert found == DIGESTS
