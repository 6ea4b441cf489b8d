"""What the unit tests share: the default model's real tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the default model's tokenizer, from the model cache or fresh from its GGUF."""
    from stateful_sglang.cpu.platform import prepare
    from stateful_sglang.embedded import cache as model

    prepare()
    if model.check().problem is None:
        return model.model_path()
    from stateful_sglang.embedded.conversion import save_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(model.find_gguf(), folder, 8192)
    return folder


@pytest.fixture(scope="session")
def smollm_tokenizer(tokenizer_dir: Path) -> Any:
    """SmolLM2's tokenizer with its own chat template."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)


@pytest.fixture(scope="module", params=["avx512", "avx2", "portable"])
def kernel_path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each path of the CPU kernels in turn, where this processor has it."""
    from stateful_sglang.cpu import extension

    kernels = extension.load()
    if kernels is None:
        pytest.skip("no C++ compiler")
    if kernels.lib.sg_select(request.param.encode()) is None:
        pytest.skip(f"this processor does not have {request.param}")
    yield request.param
    kernels.lib.sg_select(kernels.isa.encode())


@pytest.fixture
def anyio_backend() -> str:
    """Tests marked `anyio` run on asyncio, as the server does."""
    return "asyncio"
