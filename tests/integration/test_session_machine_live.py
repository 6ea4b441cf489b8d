"""Any order of all operations on a real server agrees with a pure model of sessions.

The server's model is random, of two layers, in float32; what it answers is held against the same
model in double precision, which knows no cache. Its KV pool is a fraction of what the sessions
hold, so that they evict each other all the time. `STATEFUL_SGLANG_MACHINE_OPERATIONS` says how many
operations are done, 2,000 by default, and `STATEFUL_SGLANG_MACHINE_SEED` which; `-s` shows figures.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule, run_state_machine_as_test
from session_reference import Said
from session_rules import Body, RefusedError, SessionRules
from tokenizers import Tokenizer

from bench.engines import tiny
from bench.harness import http
from bench.harness.rounds import say
from bench.harness.server import Server, serve
from stateful_sglang.cpu.platform import prepare

OPERATIONS = int(os.environ.get("STATEFUL_SGLANG_MACHINE_OPERATIONS", "2000"))
SEED = int(os.environ.get("STATEFUL_SGLANG_MACHINE_SEED", "0"))
STEPS = 50
CONTEXT, POOL = 1024, 1600
RESTART_AFTER = 500
"""Operations that a server lives for at least; then it is ended at random."""
TIE = 1e-3
"""Logits this near are equal: one order of adding up makes one the greater, another the other."""
PATHS = {"open": ("POST", "/v1/sessions"), "import": ("POST", "/v1/sessions/import")}
READS = ("get", "list", "messages", "export")

pytestmark = pytest.mark.server


class Oracle:
    """The model without a cache."""

    def __init__(self, folder: Path) -> None:
        prepare()
        import torch
        from transformers import LlamaForCausalLM

        torch.set_num_threads(1)  # two would wait for each other where the server has the cores
        self._torch = torch
        self._model = LlamaForCausalLM.from_pretrained(folder).double().eval()
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.end = self.tokenizer.token_to_id(tiny.END)

    def check(self, prompt: Sequence[int], output: Sequence[int]) -> None:
        """Fail unless each token of the output is the most likely one after those before it."""
        with self._torch.inference_mode():
            ids = self._torch.tensor([[*prompt, *output[:-1]]])
            logits = self._model(ids).logits[0, len(prompt) - 1 :]
            best = logits.max(-1).values
            taken = logits.gather(-1, self._torch.tensor(output)[:, None])[:, 0]
            worst = float((best - taken).max())
        assert worst <= TIE, (worst, logits.argmax(-1).tolist(), list(output))


class Live:
    """The server under test, which is ended and started again on the way."""

    def __init__(self, folder: Path) -> None:
        self.model = tiny.save(folder / "model", layers=2, context=CONTEXT)
        self.oracle = Oracle(self.model)
        self._journal = folder / "journal.sqlite3"
        self._stack = contextlib.ExitStack()
        self.server: Server
        self.operations: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.evicted: Counter[str] = Counter()
        self.answers = self.restarts = self.since_restart = self.quiet_points = 0

    def start(self) -> None:
        arguments = ["--model-path", str(self.model), "--dtype", "float32"]
        arguments += ["--context-length", str(CONTEXT), "--max-total-tokens", str(POOL)]
        arguments += ["--chunked-prefill-size", "256", "--journal", str(self._journal)]
        self.server = self._stack.enter_context(serve(*arguments))
        self.since_restart = 0

    def end(self, *, killed: bool) -> None:
        if killed:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.server.pid, signal.SIGKILL)
        self._stack.close()

    def restart(self, *, killed: bool) -> None:
        self.count_evictions()
        self.end(killed=killed)
        self.restarts += 1
        self.start()

    def count_evictions(self) -> None:
        with http.client(self.server.url) as client:
            tree = client.get("/v1/tree").json()
        self.evicted.update(tree["evicted_tokens"], pins_broken=tree["pins_broken"])

    @property
    def done(self) -> int:
        """Operations, those left out that only read."""
        return sum(n for name, n in self.operations.items() if name not in READS)

    def figures(self) -> dict[str, Any]:
        return {
            "seed": SEED,
            "operations": self.done,
            "reads": self.operations.total() - self.done,
            "answers_checked": self.answers,
            "restarts": self.restarts,
            "quiet_points": self.quiet_points,
            "by_operation": dict(self.operations),
            "refused": dict(self.refused),
            "evicted_tokens": dict(self.evicted),
        }


class HttpDoor:
    """A server over HTTP."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._client = http.async_client(live.server.url, timeout_s=120)
        self.context = 0

    async def measure(self) -> None:
        """Learn how long a prompt may be."""
        view = await self.call("open", None, {})
        self.context = view["tokens_left"] + 1
        await self.call("close", view["id"], {})

    async def restart(self, *, killed: bool) -> None:
        await self._client.aclose()
        self._live.restart(killed=killed)
        self._client = http.async_client(self._live.server.url, timeout_s=120)

    async def close(self) -> None:
        await self._client.aclose()

    def encode(self, text: str) -> list[int]:
        return list(self._live.oracle.tokenizer.encode(text).ids)

    def text_of(self, output: Sequence[int]) -> str:
        oracle = self._live.oracle
        output = output[:-1] if output and output[-1] == oracle.end else output
        return str(oracle.tokenizer.decode(list(output), skip_special_tokens=False))

    def check_answer(
        self, prompt: Sequence[int], output: Sequence[int], limit: int, finish: str | None
    ) -> None:
        end = self._live.oracle.end
        assert 0 < len(output) <= limit
        assert end not in output[:-1]
        assert len(output) == limit or output[-1] == end
        if finish is not None:
            assert finish == ("stop" if output[-1] == end else "length")
        self._live.oracle.check(prompt, output)
        self._live.answers += 1

    async def call(self, operation: str, session: str | None, body: Body) -> Body:
        self._live.operations[operation] += 1
        self._live.since_restart += operation not in READS
        try:
            return await self._call(operation, session, body)
        except RefusedError as refused:
            self._live.refused[refused.kind] += 1
            raise

    async def _call(self, operation: str, session: str | None, body: Body) -> Body:
        at = f"/v1/sessions/{session}"
        if operation == "close":
            reply = await self._client.delete(at, params=body)
        elif operation == "get":
            reply = await self._client.get(at)
        elif operation == "list":
            reply = await self._client.get("/v1/sessions", params=body)
        elif operation in READS:
            reply = await self._client.get(f"{at}/{operation}", params=body)
        elif body.get("stream"):
            return await self._streamed(f"{at}/{operation}", body)
        else:
            method, path = PATHS.get(operation, ("POST", f"{at}/{operation}"))
            reply = await self._client.request(method, path, json=body)
        return self._reply(reply)

    def _reply(self, reply: httpx.Response) -> Body:
        form: Body = reply.json()
        if reply.is_error:
            assert reply.status_code < 500, (reply.status_code, form)
            raise RefusedError(form["error"]["type"], form["error"])
        return form

    async def _streamed(self, path: str, body: Body) -> Body:
        text, name = "", ""
        async with self._client.stream("POST", path, json=body) as reply:
            if reply.is_error:
                await reply.aread()
                return self._reply(reply)
            async for line in reply.aiter_lines():
                field, _, value = line.partition(": ")
                if field == "event":
                    name = value
                elif field == "data":
                    data: Body = json.loads(value)
                    assert name != "error", data
                    if name == "done":
                        assert text == data["text"]
                        return data
                    text += data["text"]
        raise AssertionError("a stream ended without its turn")

    async def told(
        self, session: str, work: Callable[[], Awaitable[None]]
    ) -> list[tuple[str, int | None]]:
        heard: list[tuple[str, int | None]] = []
        name = ""
        async with self._client.stream("GET", f"/v1/sessions/{session}/events") as reply:
            async for line in reply.aiter_lines():
                field, _, value = line.partition(": ")
                if field == "event":
                    name = value
                elif field == "data":
                    heard.append((name, json.loads(value).get("version")))
                    if len(heard) == 1:
                        await work()
        return heard

    async def abandon(
        self, operation: str, session: str, body: Body, moments: int, *, streamed: bool
    ) -> None:
        self._live.operations[f"abandoned {operation}"] += 1
        path = f"/v1/sessions/{session}/{operation}"
        if streamed:
            async with self._client.stream("POST", path, json=body) as reply:
                chunks = reply.aiter_raw()
                for _ in range(moments):
                    if await anext(chunks, None) is None:
                        break
            return
        task = asyncio.create_task(self._client.post(path, json=body))
        await asyncio.sleep(moments * 0.003)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def arrived(self) -> None:
        await asyncio.sleep(0.03)

    async def compute(self, ids: list[int], tokens: int) -> list[int]:
        """A request without a session."""
        self._live.operations["plain"] += 1
        sampling = {"temperature": 0, "max_new_tokens": tokens}
        reply = await self._client.post(
            "/generate", json={"input_ids": ids, "sampling_params": sampling}
        )
        assert reply.is_success, reply.text
        output: list[int] = reply.json()["output_ids"]
        return output

    async def check_pool(self) -> None:
        """Once nothing runs, every token of the pool is free or in the tree, held by nobody."""
        deadline = time.monotonic() + 20
        while True:
            (load,) = (await self._client.get("/v1/loads")).json()["loads"]
            tree = (await self._client.get("/v1/tree")).json()
            counts = (load["num_running_reqs"], load["num_waiting_reqs"], load["num_used_tokens"])
            if counts == (0, 0, 0) or time.monotonic() > deadline:
                break
            await asyncio.sleep(0.02)
        assert counts == (0, 0, 0), load
        assert tree["protected_tokens"] == 0
        assert tree["tokens"] == tree["evictable_tokens"] <= POOL
        assert tree["pinned_tokens"] <= tree["pin_budget_tokens"]
        self._live.quiet_points += 1


class LiveSessions(SessionRules):
    """The rules over a server, with what only a server has: a pool that is too small."""

    live: Live
    door: HttpDoor

    def make_door(self) -> HttpDoor:
        return self.do(self._door())

    async def _door(self) -> HttpDoor:
        door = HttpDoor(self.live)
        await door.measure()
        return door

    def teardown(self) -> None:
        try:
            # Every other session stays, in the way of those to come.
            for session in [*self.reference][::2]:
                self.call("close", session)
            self.do(self.door.check_pool())
        finally:
            self.do(self.door.close())
            self.runner.close()

    @rule()
    def be_quiet(self) -> None:
        self.do(self.door.check_pool())

    @rule(killed=st.booleans())
    def restart(self, killed: bool) -> None:
        if self.live.since_restart < RESTART_AFTER:
            return
        self.do(self.door.restart(killed=killed))
        self.all_are_the_same()

    @rule(plain=st.integers(0, 3), repeats=st.integers(1, 30), seed=st.integers(0, 1 << 20))
    def crowd(self, plain: int, repeats: int, seed: int) -> None:
        """All sessions at once, beside requests without a session."""
        limit, rng = 8, random.Random(seed)
        said = [Said("user", "crowd " * repeats)]
        sessions = [*self.reference]
        prompts = [[rng.randrange(256) for _ in range(rng.randint(1, 600))] for _ in range(plain)]

        async def turn(session: str) -> Body | str:
            operation, body = self.turn_body(said, limit)
            try:
                return await self.door.call(operation, session, body)
            except RefusedError as refused:
                return refused.kind

        async def everything() -> tuple[list[Any], list[Any]]:
            turns = asyncio.gather(*map(turn, sessions))
            others = asyncio.gather(*(self.door.compute(each, limit) for each in prompts))
            return await turns, await others

        replies, others = self.do(everything())
        for session, got in zip(sessions, replies, strict=True):
            prompt = self.expected(lambda at=session: self.prompt_of(at, said), got)
            if prompt is not None:
                self.settle_turn(session, said, limit, got, prompt)
        for prompt, output in zip(prompts, others, strict=True):
            self.live.oracle.check(prompt, output)

    def leave_detached(self, session: str, said: list[Said]) -> None:
        operation, body = self.turn_body(said, 9, detach=True, stream=True)
        self.do(self.door.abandon(operation, session, body, 1, streamed=True))


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    made = Live(tmp_path_factory.mktemp("machine"))
    made.start()
    try:
        yield made
    finally:
        made.end(killed=False)


def test_sessions_on_a_real_server_are_what_a_pure_model_says(live: Live) -> None:
    LiveSessions.live = live
    # Not shrunk, nor kept: a server that has lived plays no example the same way again.
    played = settings(
        max_examples=5,
        stateful_step_count=STEPS,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    began = time.monotonic()
    try:
        for number in itertools.count():
            seed(SEED * 1_000_000 + number)(LiveSessions)
            run_state_machine_as_test(LiveSessions, settings=played)
            took = time.monotonic() - began
            say(f"seed {SEED}: {live.done} of {OPERATIONS} operations, {live.done / took:.1f}/s")
            if live.done >= OPERATIONS:
                break
    finally:
        with contextlib.suppress(httpx.TransportError):
            live.count_evictions()
        print(json.dumps(live.figures()))
