"""Agents at once on one system prompt: it is computed for the first, and found by all others."""

from __future__ import annotations

import asyncio
import sys

from stateful_sglang.client import AsyncClient, Turn

SYSTEM = " ".join(f"Rule {n}: items of kind {n} go on shelf {3 * n}." for n in range(1, 60))


async def agent(client: AsyncClient, number: int) -> Turn:
    """One agent's only turn."""
    async with await client.open(system=SYSTEM) as session:
        return await session.append(
            f"Where do items of kind {number} go?", sampling={"temperature": 0, "max_tokens": 16}
        )


async def main(url: str) -> None:
    async with AsyncClient(url) as client:
        turns = [await agent(client, 1)]
        turns += await asyncio.gather(*(agent(client, number) for number in range(2, 6)))
    for number, turn in enumerate(turns, 1):
        usage = turn.usage
        print(f"agent {number}: {usage.delta_tokens} tokens, {usage.computed_tokens} computed")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:30000"))
