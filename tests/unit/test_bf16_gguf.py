"""The bf16 GGUF for llama.cpp holds the numbers of a quantised one, rounded to bf16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")

from bench.engines.bf16_gguf import write_bf16  # noqa: E402

QUANTISED = gguf.GGMLQuantizationType.Q4_1


@pytest.fixture
def written(tmp_path: Path) -> tuple[gguf.GGUFReader, dict[str, np.ndarray]]:
    """A small quantised file written again, and what its tensors were de-quantised."""
    random = np.random.default_rng(5)
    matrix = gguf.quants.quantize(random.normal(size=(4, 64)).astype(np.float32), QUANTISED)
    norm = random.normal(size=64).astype(np.float32)
    source = tmp_path / "small.Q4_1.gguf"
    writer = gguf.GGUFWriter(str(source), "llama")
    writer.add_file_type(3)
    writer.add_block_count(1)
    writer.add_token_list(["a", "ü", "c"])
    writer.add_tensor("blk.0.attn_q.weight", matrix, raw_dtype=QUANTISED)
    writer.add_tensor("blk.0.attn_norm.weight", norm)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    target = tmp_path / "small.bf16.gguf"
    write_bf16(source, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([source.name, target.name])
    values = {
        "blk.0.attn_q.weight": gguf.quants.dequantize(matrix, QUANTISED),
        "blk.0.attn_norm.weight": norm,
    }
    return gguf.GGUFReader(str(target)), values


def test_weights_are_those_of_torchs_rounding(written) -> None:
    reader, values = written
    assert {tensor.name for tensor in reader.tensors} == set(values)
    for tensor in reader.tensors:
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        expected = torch.from_numpy(values[tensor.name].copy()).bfloat16().float().numpy()
        np.testing.assert_array_equal(found, expected)


def test_matrices_are_bf16_and_vectors_float32(written) -> None:
    reader, _ = written
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds == {"blk.0.attn_q.weight": "BF16", "blk.0.attn_norm.weight": "F32"}


def test_settings_and_vocabulary_are_copied(written) -> None:
    reader, _ = written
    assert reader.fields["llama.block_count"].contents() == 1
    assert reader.fields["tokenizer.ggml.tokens"].contents() == ["a", "ü", "c"]
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_BF16
