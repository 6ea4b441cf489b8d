"""What is published stays so: over restarts, whatever the model server and the journal say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from engine_double import FORGETFUL, EngineDouble
from failing_journal import FailingJournal
from fastapi import FastAPI

from stateful_sglang.server.http import once_served
from stateful_sglang.service.commands import NewText, Publish
from stateful_sglang.service.engine import EngineError, PublishAnswer
from stateful_sglang.service.observe import NullObserver
from stateful_sglang.service.prefixes import PrefixView
from stateful_sglang.service.service import SessionService
from stateful_sglang.session import errors
from stateful_sglang.session.journal.sqlite import SqliteJournal

pytestmark = pytest.mark.anyio


class Counting(NullObserver):
    """Keeps the last figures."""

    def __init__(self) -> None:
        self.seen = (0, 0)

    def prefixes(self, count: int, tokens: int) -> None:
        self.seen = (count, tokens)


@asynccontextmanager
async def server(
    journal: Path, engine: EngineDouble | None = None, observer: NullObserver | None = None
) -> AsyncIterator[tuple[SessionService, EngineDouble]]:
    """A server from its start to its end."""
    engine = engine or EngineDouble()
    service = SessionService(engine, SqliteJournal.connect(journal), None, observer)
    try:
        yield service, engine
    finally:
        await service.shutdown()


def text(letter: str, length: int = 32) -> Publish:
    return Publish(NewText(letter * length), name=f"all {letter}")


async def states(service: SessionService) -> dict[str | None, str]:
    return {each.name: each.state for each in await service.prefixes.list()}


async def until_all_are(service: SessionService, state: str) -> tuple[PrefixView, ...]:
    while True:
        found = await service.prefixes.list()
        if all(each.state == state for each in found):
            return found
        await asyncio.sleep(0.005)


async def test_a_server_that_starts_again_publishes_again_before_anybody_asks_and_computes_nothing(
    tmp_path: Path,
) -> None:
    async with server(tmp_path / "j") as (service, first):
        made = [await service.prefixes.publish(text(letter)) for letter in "zab"]
        assert first.computed == [each.id for each in made]
        await service.prefixes.remove(made[1].id)
    observer = Counting()
    async with server(tmp_path / "j", observer=observer) as (service, engine):
        service.begin()
        assert await until_all_are(service, "published") == (made[0], made[2])
        assert engine.published == {each.id: first.published[each.id] for each in made[::2]}
        assert list(engine.published) == [made[0].id, made[2].id]
        assert engine.computed == []
        assert observer.seen == (2, 64)
        assert await service.prefixes.publish(text("z")) == made[0]
        assert engine.computed == []


async def test_a_server_without_a_file_forgets_them() -> None:
    for _ in range(2):
        engine = EngineDouble()
        service = SessionService(engine, SqliteJournal.connect(None))
        assert await service.prefixes.list() == ()
        await service.prefixes.publish(text("a"))
        await service.shutdown()


async def test_what_another_model_published_is_listed_never_shared_and_can_be_removed(
    tmp_path: Path,
) -> None:
    async with server(tmp_path / "j") as (service, _):
        made = await service.prefixes.publish(text("a"))
    async with server(tmp_path / "j", EngineDouble(template=FORGETFUL)) as (service, engine):
        await service.prefixes.restore()
        (found,) = await service.prefixes.list()
        assert found == made._replace(state="other_model", aligned_tokens=0)
        assert engine.published == {}
        own = await service.prefixes.publish(text("a"))
        assert own.id != made.id
        assert list(engine.published) == [own.id]
        await service.prefixes.remove(made.id)
    async with server(tmp_path / "j", EngineDouble(template=FORGETFUL)) as (service, _):
        assert [each.id for each in await service.prefixes.list()] == [own.id]


async def test_what_a_busy_model_server_did_not_take_is_published_later(tmp_path: Path) -> None:
    async with server(tmp_path / "j") as (service, _):
        for letter in "ab":
            await service.prefixes.publish(text(letter))
    async with server(tmp_path / "j") as (service, engine):
        engine.silent = True
        await service.prefixes.restore()
        assert await states(service) == {"all a": "waiting", "all b": "waiting"}
        assert {each.aligned_tokens for each in await service.prefixes.list()} == {0}
        engine.silent = False
        await service.prefixes.restore()
        assert await states(service) == {"all a": "published", "all b": "published"}


async def test_those_from_before_the_restart_have_the_first_claim_to_the_room(
    tmp_path: Path,
) -> None:
    async with server(tmp_path / "j") as (service, _):
        await service.prefixes.publish(text("a"))
    async with server(tmp_path / "j") as (service, engine):
        await service.prefixes.publish(text("b"))
        assert [tokens[0] for tokens in engine.published.values()] == [100, 101]


class Roomy(EngineDouble):
    """Has room for so many tokens."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    async def publish_prefix(self, prefix_id: str, tokens: Any, *, compute: bool) -> PublishAnswer:
        left = self.room - sum(map(len, self.published.values()))
        self.refuse_prefixes = None if len(tokens) <= left else f"{left} tokens are left"
        return await super().publish_prefix(prefix_id, tokens, compute=compute)


async def test_what_a_smaller_budget_has_no_room_for_says_so_and_comes_back_when_there_is(
    tmp_path: Path,
) -> None:
    async with server(tmp_path / "j") as (service, _):
        made = [await service.prefixes.publish(text(letter)) for letter in "ab"]
    observer = Counting()
    async with server(tmp_path / "j", Roomy(40), observer) as (service, engine):
        await service.prefixes.restore()
        first, second = await service.prefixes.list()
        assert (first.state, second.state) == ("published", "refused")
        assert second.problem == "8 tokens are left"
        assert observer.seen == (1, 32)
        with pytest.raises(errors.PublishRefusedError, match="8 tokens are left"):
            await service.prefixes.publish(text("b"))
        await service.prefixes.remove(made[0].id)
        assert observer.seen == (0, 0)
        await service.prefixes.restore()
        assert await service.prefixes.list() == (made[1],)
        assert list(engine.published) == [made[1].id]


@pytest.fixture
def broken() -> tuple[SessionService, EngineDouble, FailingJournal]:
    engine, journal = EngineDouble(), FailingJournal()
    return SessionService(engine, journal), engine, journal


async def test_what_cannot_be_recorded_is_not_published(broken: Any) -> None:
    service, engine, journal = broken
    journal.broken = "the disk is full"
    with pytest.raises(errors.JournalFailedError, match="not published: the disk is full"):
        await service.prefixes.publish(text("a"))
    assert engine.published == {}
    assert await service.prefixes.list() == ()


async def test_a_removal_that_cannot_be_recorded_removes_nothing(broken: Any) -> None:
    service, engine, journal = broken
    made = await service.prefixes.publish(text("a"))
    journal.broken = "the disk is full"
    with pytest.raises(errors.JournalFailedError, match="published still"):
        await service.prefixes.remove(made.id)
    assert list(engine.published) == [made.id]
    assert await service.prefixes.list() == (made,)


async def test_a_journal_that_cannot_be_read_is_an_error_until_it_can(broken: Any) -> None:
    service, engine, journal = broken

    async def fails() -> None:
        raise errors.JournalFailedError("the disk is gone")

    journal.prefixes = fails
    for ask in (service.prefixes.list, service.prefixes.restore):
        with pytest.raises(errors.JournalFailedError, match="the disk is gone"):
            await ask()
    with pytest.raises(errors.JournalFailedError, match="the disk is gone"):
        await service.prefixes.publish(text("a"))
    assert engine.published == {}
    del journal.prefixes
    await service.prefixes.publish(text("a"))


async def test_it_begins_once_the_application_is_up_and_before_its_first_request() -> None:
    seen = []

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        seen.append("the application's own")
        yield

    app = FastAPI(lifespan=lifespan)
    once_served(app, lambda: seen.append("ours"))
    async with app.router.lifespan_context(app):
        assert seen == ["the application's own", "ours"]


class Slow(EngineDouble):
    """Computes a prefix when it is let to."""

    def __init__(self) -> None:
        super().__init__()
        self.began, self.computes = asyncio.Event(), asyncio.Event()

    async def publish_prefix(self, prefix_id: str, tokens: Any, *, compute: bool) -> PublishAnswer:
        self.began.set()
        await self.computes.wait()
        return await super().publish_prefix(prefix_id, tokens, compute=compute)


async def test_a_publication_goes_on_when_who_asked_for_it_leaves(tmp_path: Path) -> None:
    engine = Slow()
    async with server(tmp_path / "j", engine) as (service, _):
        asked = asyncio.create_task(service.prefixes.publish(text("a")))
        await engine.began.wait()
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        engine.computes.set()
        again = await service.prefixes.publish(text("a"))
        assert list(engine.published) == [again.id]
    async with server(tmp_path / "j") as (service, _):
        assert [each.id for each in await service.prefixes.list()] == [again.id]


async def test_two_who_publish_the_same_at_once_publish_it_once(tmp_path: Path) -> None:
    async with server(tmp_path / "j") as (service, engine):
        one, other = await asyncio.gather(*(service.prefixes.publish(text("a")) for _ in "ab"))
        assert one == other
        assert list(engine.published) == [one.id]


async def test_what_could_not_be_computed_is_not_recorded(tmp_path: Path) -> None:
    class Failing(EngineDouble):
        async def publish_prefix(self, prefix_id: str, tokens: Any, **_: Any) -> PublishAnswer:
            raise EngineError("out_of_memory", "no room now")

    async with server(tmp_path / "j", Failing()) as (service, _):
        with pytest.raises(errors.EngineFailedError, match="no room now"):
            await service.prefixes.publish(text("a"))
    async with server(tmp_path / "j") as (service, _):
        assert await service.prefixes.list() == ()
