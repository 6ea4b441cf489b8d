"""A model server without its HTTP side: turns of every kind, driven through the engine port.

Run in a process of its own, with the launcher's arguments; prints what it saw as one line of JSON.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import secrets
import sys
from array import array
from typing import Any

from stateful_sglang.server import arguments, parser, preflight, processes

PROMPT = "The quick brown fox jumps over the lazy dog. " * 12
MORE = " And then the same fox jumps over the same dog again. "


def start(argv: list[str]) -> Any:
    """SGLang's engine with our plugin, tokenizer manager and processes, and our port over it."""
    options, theirs = parser.parse(argv)
    preflight.check(options, theirs)
    server_args, _ = arguments.settle(dataclasses.replace(options, quiet=False), theirs)
    from sglang.srt.entrypoints.engine import Engine

    from stateful_sglang.runtime.sessions.engine import SGLangEngine
    from stateful_sglang.runtime.sessions.manager import stateful_tokenizer_manager

    class Ours(Engine):
        init_tokenizer_manager_func = staticmethod(stateful_tokenizer_manager(lambda _: None))
        run_scheduler_process_func = staticmethod(processes.run_scheduler_process)
        run_detokenizer_process_func = staticmethod(processes.run_detokenizer_process)

    whole = Ours(server_args=server_args)
    return whole, SGLangEngine(whole.tokenizer_manager)


class Driver:
    """Sessions as a service would keep them: by committed length."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.tokens: dict[str, list[int]] = {}

    async def turn(self, name: str, delta: list[int], kind: str = "turn", **more: Any) -> Any:
        from stateful_sglang.service.engine import TurnRequest
        from stateful_sglang.service.sampling import Sampling

        base = self.tokens.setdefault(name, [])
        base = base[: more.pop("base", len(base))]
        sampling = Sampling(temperature=0.0, max_tokens=more.pop("max_tokens", 8), ignore_eos=True)
        request = TurnRequest(
            name,
            secrets.token_hex(16),
            len(base),
            array("q", delta),
            sampling,
            kind=kind,  # type: ignore[arg-type]
            **more,
        )
        last = None
        async for progress in self.engine.run(request):
            last = progress
        assert last is not None
        if kind == "turn":
            self.tokens[name] = [*base, *delta, *last.output_ids]
        return last

    async def path(self, name: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (await self.engine.tree_summary(name, 100))["path"]
        return found

    async def covered(self, name: str) -> int:
        return sum(node["tokens"] for node in await self.path(name))


async def play(engine: Any) -> dict[str, Any]:
    """Every operation once; what was seen of it."""
    driver = Driver(engine)
    encode = engine.tokenizer.encode
    prompt, more = encode(PROMPT), encode(MORE)
    seen: dict[str, Any] = {"digest": engine.model_digest}

    await driver.turn("s", prompt)
    committed = len(driver.tokens["s"])
    before = await driver.covered("s")
    reply = await driver.turn("s", more, "ephemeral")
    seen["ephemeral"] = {
        "kept": await driver.covered("s") - before,
        "cached": reply.cached_tokens == committed - 1,
        "generated": len(reply.output_ids),
    }
    writer, *readers = await asyncio.gather(
        driver.turn("s", more, max_tokens=24),
        *(driver.turn("s", [*more, token], "ephemeral", base=committed) for token in (5, 6)),
    )
    seen["beside"] = [len(each.output_ids) for each in (writer, *readers)]
    await driver.turn("twin", driver.tokens["s"][:committed])
    driver.tokens["twin"] = driver.tokens["s"][:committed]
    twin = await driver.turn("twin", more, max_tokens=24, base=committed)
    seen["same_as_alone"] = list(twin.output_ids) == list(writer.output_ids)

    base = len(driver.tokens["s"])
    filled = await driver.turn("s", more, "prefill")
    seen["prefill"] = {
        "finish": filled.finish.reason,
        "output": [*filled.output_ids],
        "text": filled.text,
        "covered": await driver.covered("s") - base - len(more),
        "pinned": all(node["pinned"] for node in await driver.path("s")),
    }
    found = await driver.turn("s", [*more, 5], base=base)
    seen["prefill"]["left_to_compute"] = found.prompt_tokens - found.cached_tokens

    length = base - 3
    await engine.fork_session("s", "f", length)
    driver.tokens["f"] = driver.tokens["s"][:length]
    seen["fork"] = {"covered": await driver.covered("f") - length}
    forked = await driver.turn("f", [7, 8])
    seen["fork"]["left_to_compute"] = forked.prompt_tokens - forked.cached_tokens
    await engine.fork_session("nobody", "g", 5)

    await engine.rollback_session("s", committed)
    seen["rollback"] = await driver.covered("s") - committed
    driver.tokens["s"] = driver.tokens["s"][:committed]
    back = await driver.turn("s", [9])
    seen["after_rollback"] = back.prompt_tokens - back.cached_tokens

    salted = [
        await driver.turn(f"salted-{number}", prompt, salt=salt)
        for number, salt in enumerate(("a", "b", "a"))
    ]
    seen["salts"] = [each.cached_tokens for each in salted]
    seen["prompt"] = len(prompt)

    from stateful_sglang.service.engine import EngineError

    driver.tokens["g"] = list(range(5))
    try:
        await driver.turn("g", [1])
    except EngineError as error:
        seen["unforked"] = error.kind
    for name in driver.tokens:
        await engine.close_session(name)
    seen["sessions_left"] = (await engine.tree_summary(None, 1))["sessions"]
    return seen


def main() -> None:
    whole, engine = start(sys.argv[1:])
    seen = whole.loop.run_until_complete(play(engine))
    print("SEEN " + json.dumps(seen), flush=True)
    whole.shutdown()


if __name__ == "__main__":
    main()
