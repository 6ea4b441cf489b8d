"""The arms that benches choose from by name."""

from __future__ import annotations

from bench.engines import peers
from bench.engines.arms import Arm, Setting
from bench.engines.ours import alone
from bench.harness.limits import ModelCost


def _int8_cost(setting: Setting) -> ModelCost:
    return setting.cost()._replace(element_bytes=1.0)


ARMS = {
    arm.name: arm
    for arm in (
        Arm("ours", "this package, --stateful off, bf16", alone()),
        peers.STOCK,
        peers.VLLM,
        peers.LLAMA_BF16,
        Arm("ours-int8", "likewise, int8 weights", alone("--cpu-quant", "int8"), cost=_int8_cost),
        peers.LLAMA_Q4,
    )
}


def chosen(names: str) -> list[Arm]:
    """Arms of a list of names with commas between.

    Raises:
        ValueError: One is unknown.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in ARMS]:
        raise ValueError(f"unknown arm {', '.join(unknown)}; known are {', '.join(ARMS)}")
    return [ARMS[name] for name in dict.fromkeys(wanted)]
