"""Makes the bf16 GGUF that llama.cpp is measured with: our checkpoint's numbers in its format.

The Q4_1 file of the embedded model is de-quantised and rounded to bf16, just as our checkpoint was
made, so that both engines multiply with the same numbers; tokenizer and settings are copied.

    python -m bench.engines.bf16_gguf OUT.gguf
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType, GGUFValueType, LlamaFileType

_WRITTEN_BY_GGUF = ("GGUF.", "general.architecture", "general.file_type")


def _rounded(values: np.ndarray) -> np.ndarray:
    """The bf16 numbers nearest to float32 values, as float32."""
    halves = gguf.quants.quantize(values, GGMLQuantizationType.BF16)
    return gguf.quants.dequantize(halves, GGMLQuantizationType.BF16)


def write_bf16(source: Path, target: Path) -> None:
    """Write `source` again with bf16 weights; vectors stay float32, rounded to bf16.

    llama.cpp wants norms in float32. The file appears under its name only when it is whole.
    """
    reader = gguf.GGUFReader(str(source))
    architecture = reader.fields["general.architecture"].contents()
    part = target.with_suffix(".part")
    writer = gguf.GGUFWriter(str(part), architecture)
    writer.add_file_type(LlamaFileType.MOSTLY_BF16)
    for name, field in reader.fields.items():
        if name.startswith(_WRITTEN_BY_GGUF):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, inner)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, _rounded(values))
        else:
            halves = gguf.quants.quantize(values, GGMLQuantizationType.BF16)
            writer.add_tensor(tensor.name, halves, raw_dtype=GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(part, target)


def ensure(folder: Path) -> Path:
    """The bf16 GGUF of the embedded model in `folder`, written there if it is missing."""
    from bench.engines import package

    source = package.default_gguf()
    target = folder / f"{source.stem}.bf16.gguf"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_bf16(source, target)
    return target


if __name__ == "__main__":
    from bench.engines import package

    write_bf16(package.default_gguf(), Path(sys.argv[1]))
