"""Requests of token ids to any engine's HTTP server, and when their tokens came back."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence

import httpx

from bench.engines.dialects import Dialect
from bench.harness import http
from bench.harness.stats import Arrival, Joint, joint

ENOUGH = 0.5
"""Share of the wanted tokens that every stream must decode while all streams do."""
TOGETHER_S, TOGETHER_SHARE = 1.0, 0.8
"""A measured window lasts this long, or this share of the time from the first request on. In less,
the rate would be that of a delivery: a process that waits for a core hands on many tokens at once.
"""
MOST_TOKENS = 1024
"""Longest that a stream may get so that all overlap: as much fits behind the longest context."""


class NeverTogetherError(RuntimeError):
    """Streams did not decode at the same time for long enough, however long they were."""


class RequestError(RuntimeError):
    """An engine refused a request or broke it off."""


class Stream:
    """One finished request."""

    def __init__(self, began: float, arrivals: list[Arrival]) -> None:
        self.began = began
        self.arrivals = arrivals

    @property
    def first_s(self) -> float:
        """Seconds from sending the request to its first token."""
        return self.arrivals[0].at - self.began


class Load:
    """A client of one server."""

    def __init__(self, url: str, dialect: Dialect, lengths: dict[int, int] | None = None) -> None:
        """
        Args:
            url: Of the server.
            dialect: What it understands.
            lengths: Tokens a stream that were enough last time, by number of streams; loads that
                are compared share them, so that their streams are equally long.
        """
        self._url = url
        self._dialect = dialect
        self._lengths = {} if lengths is None else lengths

    def first_token_s(self, prompt: Sequence[int], slot: int = 0) -> float:
        """Seconds to the first token of a prompt; it is in the prefix cache afterwards."""
        return self._run([(prompt, slot)], 1)[0].first_s

    def decode_rate(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        """Tokens a second of one stream a prompt, while all streams decode.

        Requests start one after the other, and what a fast engine makes arrives in bursts: the
        first stream could be over before the last has begun, or all of them be told in an instant.
        So streams are made longer until the window that all share says something of decoding.

        Raises:
            NeverTogetherError: It did not at `MOST_TOKENS`.
        """
        asked = max(tokens, self._lengths.get(len(prompts), 0))
        while True:
            streams = self._run([(prompt, slot) for slot, prompt in enumerate(prompts)], asked)
            found = joint([stream.arrivals for stream in streams])
            if _says_enough(found, min(stream.began for stream in streams), tokens):
                self._lengths[len(prompts)] = asked
                return found.tokens_per_s
            if asked >= MOST_TOKENS:
                raise NeverTogetherError(
                    f"{len(prompts)} streams of {asked} tokens decoded {found.tokens:.0f} of them "
                    f"all at once, in {found.end - found.begin:.3f} s; expected at least "
                    f"{ENOUGH * tokens:.0f} and most of the time: does the server take that many "
                    "requests at a time?"
                )
            asked = min(2 * asked, MOST_TOKENS)

    def _run(self, requests: Sequence[tuple[Sequence[int], int]], tokens: int) -> list[Stream]:
        async def gather() -> list[Stream]:
            async with http.async_client(self._url) as client:
                # Written before the first is sent, so that little lies between the starts.
                bodies = [
                    json.dumps(self._dialect.body(prompt, tokens, slot)).encode()
                    for prompt, slot in requests
                ]
                return await asyncio.gather(*(self._stream(client, body) for body in bodies))

        return asyncio.run(gather())

    async def _stream(self, client: httpx.AsyncClient, content: bytes) -> Stream:
        headers = {"content-type": "application/json"}
        arrivals: list[Arrival] = []
        count = 0
        began = time.perf_counter()
        async with client.stream(
            "POST", self._dialect.path, content=content, headers=headers
        ) as reply:
            if reply.status_code != httpx.codes.OK:
                text = (await reply.aread()).decode(errors="replace")
                raise RequestError(f"{reply.status_code} from {self._dialect.path}: {text[:500]}")
            async for line in reply.aiter_lines():
                if not line.startswith("data:") or line.endswith("[DONE]"):
                    continue
                at = time.perf_counter()
                event = json.loads(line.removeprefix("data:"))
                if "error" in event:
                    raise RequestError(f"{self._dialect.path}: {event['error']}")
                now = self._dialect.tokens(event, count)
                if now > count:
                    arrivals.append(Arrival(at, now))
                    count = now
        if not arrivals:
            raise RequestError(f"{self._dialect.path} sent no token")
        return Stream(began, arrivals)


def _says_enough(found: Joint, began: float, tokens: int) -> bool:
    seconds = found.end - found.begin
    lasted = seconds >= TOGETHER_S or seconds >= TOGETHER_SHARE * (found.end - began)
    return lasted and found.tokens >= ENOUGH * tokens
