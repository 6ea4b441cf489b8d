"""What a step costs a machine at least: bytes that must be read, operations that must be done.

Counted are the weights (once a step), the keys and values read and written, and the multiplications
and additions of all matrix products, attention's included. Activations, norms and sampling are not:
a limit is a lower bound of the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from bench.workloads.cells import Cell


class ModelCost(NamedTuple):
    """A dense decoder, as far as its steps' cost goes."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    linear_parameters: int
    """Of all layers' projections: each is multiplied with every token."""
    head_parameters: int
    """Of the output layer: multiplied with every token whose logits are asked for."""
    element_bytes: float
    """Of a weight. May be a fraction for quantised weights."""
    kv_element_bytes: int = 2

    @property
    def weight_bytes(self) -> float:
        """Read once a step."""
        return (self.linear_parameters + self.head_parameters) * self.element_bytes

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.kv_element_bytes


class Rates(NamedTuple):
    """What a machine was measured to do."""

    read_bytes_per_s: float
    bf16_ops_per_s: float
    f32_ops_per_s: float

    @property
    def ops_per_s(self) -> float:
        """Of bf16 products by the faster way: as they are, or widened to float32, which is exact
        and the faster one on a processor without instructions for bf16."""
        return max(self.bf16_ops_per_s, self.f32_ops_per_s)


class Work(NamedTuple):
    """What a step needs at least."""

    bytes: float
    operations: float


def model_cost(config: Mapping[str, Any], element_bytes: float = 2.0) -> ModelCost:
    """Read a Hugging Face configuration of a dense decoder with a gated MLP.

    Raises:
        KeyError: A field is missing that every decoder has.
    """
    hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or hidden // heads)
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    mlp = 3 * hidden * int(config["intermediate_size"])
    return ModelCost(
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        linear_parameters=layers * (attention + mlp),
        head_parameters=hidden * int(config["vocab_size"]),
        element_bytes=element_bytes,
    )


def work(model: ModelCost, cell: Cell) -> Work:
    """What one step of a cell needs.

    A prefill asks for the logits of its last token, the others for all. New token `i` of a request
    attends ``context + i + 1`` keys; a key costs a product with the query and one with the weights,
    two operations an element each.
    """
    rows = cell.batch if cell.kind == "prefill" else cell.tokens
    linear = 2.0 * model.linear_parameters * cell.tokens + 2.0 * model.head_parameters * rows
    pairs = cell.batch * (cell.width * cell.context + cell.width * (cell.width + 1) // 2)
    attention = 4.0 * model.layers * model.heads * model.head_dim * pairs
    cached = cell.batch * cell.context + cell.tokens
    return Work(bytes=model.weight_bytes + model.kv_bytes * cached, operations=linear + attention)


def limit_s(model: ModelCost, cell: Cell, rates: Rates) -> float:
    """Seconds below which this machine cannot do a step: the slower of reading and computing."""
    needed = work(model, cell)
    return max(needed.bytes / rates.read_bytes_per_s, needed.operations / rates.ops_per_s)
