"""Whoever comes after a client that has left is never refused for it, however long that takes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import pytest
from engine_double import EngineDouble
from one_tenant import OneTenant

from stateful_sglang.service import core
from stateful_sglang.service.commands import Append, Ingest, NewMessages, OpenSession, Writing
from stateful_sglang.service.engine import TurnProgress, TurnRequest
from stateful_sglang.service.sampling import Sampling
from stateful_sglang.service.writers import WriterPlace
from stateful_sglang.session.errors import SessionBusyError
from stateful_sglang.session.messages import Message

pytestmark = pytest.mark.anyio

SAID = (Message("user", "say"),)
IMPATIENT = pytest.mark.parametrize(
    "writing", [Writing(on_busy="fail"), Writing(wait_s=0), Writing(wait_s=0.01)]
)


class SlowToLetGo(EngineDouble):
    """An engine that ends a turn only when it is let to."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = asyncio.Event()

    async def run(self, turn: TurnRequest) -> AsyncIterator[TurnProgress]:
        try:
            async for progress in super().run(turn):
                yield progress
        finally:
            await self.let_go.wait()


def say(writing: Writing | None = None) -> Append:
    return Append(NewMessages(SAID), Sampling(max_tokens=4), writing=writing or Writing())


async def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline, "it never came to that"
        await asyncio.sleep(0.001)


@IMPATIENT
async def test_an_append_after_a_turn_that_was_left_waits_until_the_engine_lets_go(
    writing: Writing,
) -> None:
    engine = SlowToLetGo()
    engine.pause_after = 1
    service = OneTenant(engine)
    session = (await service.open(OpenSession())).id
    left = await service.append(session, say())
    await engine.paused.wait()
    engine.pause_after = None
    left.leave()
    following = asyncio.create_task(service.append(session, say(writing)))
    await asyncio.sleep(3 * core._GRACE_S)
    assert not following.done()
    engine.let_go.set()
    assert (await (await following).result()).version == 1
    await service.shutdown()


@IMPATIENT
async def test_an_append_after_an_ingest_that_was_left_waits_until_it_is_done(
    writing: Writing,
) -> None:
    engine = EngineDouble()
    engine.pause_after = 1
    service = OneTenant(engine)
    session = (await service.open(OpenSession())).id
    left = asyncio.create_task(service.ingest(session, Ingest(SAID)))
    await engine.paused.wait()
    engine.pause_after = None
    left.cancel()
    following = asyncio.create_task(service.append(session, say(writing)))
    await asyncio.sleep(3 * core._GRACE_S)
    assert not following.done()
    engine.go.set()
    assert (await (await following).result()).version == 2
    await service.shutdown()


@IMPATIENT
async def test_an_append_beside_one_whose_client_is_there_is_refused(writing: Writing) -> None:
    engine = EngineDouble()
    engine.pause_after = 1
    service = OneTenant(engine)
    session = (await service.open(OpenSession())).id
    running = await service.append(session, say())
    await engine.paused.wait()
    engine.pause_after = None
    with pytest.raises(SessionBusyError):
        await service.append(session, say(writing))
    engine.go.set()
    assert (await running.result()).version == 1
    await service.shutdown()


async def test_a_loop_that_stalls_makes_no_conflict_of_a_client_that_leaves_meanwhile() -> None:
    engine = SlowToLetGo()
    engine.pause_after = 1
    service = OneTenant(engine)
    session = (await service.open(OpenSession())).id
    left = await service.append(session, say())
    await engine.paused.wait()
    engine.pause_after = None
    following = asyncio.create_task(service.append(session, say(Writing(on_busy="fail"))))
    await asyncio.sleep(0)

    async def notice() -> None:
        for _ in range(4):  # steps from the end of a connection to the turn's
            await asyncio.sleep(0)
        left.leave()

    noticing = asyncio.create_task(notice())
    time.sleep(2 * core._GRACE_S)  # the loop stalls: the timer fires before the end is read
    engine.let_go.set()
    assert (await (await following).result()).version == 1
    await noticing
    await service.shutdown()


async def test_who_waits_longer_keeps_its_place_in_line() -> None:
    place = WriterPlace()
    assert await place.take(0)
    asked = 0

    async def longer() -> bool:
        nonlocal asked
        asked += 1
        return True

    order: list[str] = []

    async def come(name: str, wait_s: float) -> None:
        assert await place.take(wait_s, longer)
        order.append(name)
        place.give_back()

    first = asyncio.create_task(come("first", 0))
    await until(lambda: asked > 0)
    second = asyncio.create_task(come("second", 60))
    await asyncio.sleep(0)
    place.give_back()
    await asyncio.gather(first, second)
    assert order == ["first", "second"]
    assert not place.held
