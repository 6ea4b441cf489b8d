"""An answer as it is written. Leaving the stream early aborts the turn: nothing is committed."""

from __future__ import annotations

import asyncio
import sys

from stateful_sglang.client import AsyncClient


async def main(url: str) -> None:
    async with AsyncClient(url) as client, await client.open() as session:
        stream = await session.append(
            "Count from one to ten.", sampling={"temperature": 0, "max_tokens": 48}, stream=True
        )
        async for text in stream:
            print(text, end="", flush=True)
        print(f"\n{stream.turn.usage.generated_tokens} tokens, version {stream.turn.version}")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:30000"))
