"""Sessions of twenty turns, asked under keys whatever becomes of the server, and held to a twin."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httpx

from bench.harness import http

TURNS = 20
_RETRY_S = 0.2
_GIVE_UP_S = 600.0


class CutError(Exception):
    """A stream ended before its last event."""


class RefusedError(Exception):
    """The server refused what it has to do."""


class Said(NamedTuple):
    """What a turn says, and how it is asked."""

    text: str
    tokens: int
    stream: bool


class Answer(NamedTuple):
    """A turn as it was answered."""

    version: int
    text: str
    ids: tuple[int, ...]
    history: int
    """Tokens that it continued."""


def script(texts: Sequence[str], seed: int) -> list[Said]:
    """The turns of a session."""
    rng = random.Random(seed)
    return [
        Said(rng.choice(texts)[: rng.randrange(20, 160)], rng.randrange(2, 20), rng.random() < 0.5)
        for _ in range(TURNS)
    ]


@dataclass
class Played:
    """A session, and its turns as they were answered."""

    script: int
    said: Sequence[Said]
    name: str
    """Of its keys."""
    id: str = ""
    answers: list[Answer] = field(default_factory=list)
    interrupted: int = 0


@dataclass
class Tally:
    """What was found."""

    lost: set[tuple[str, int]] = field(default_factory=set)
    """Sessions and versions that were answered and are not there."""
    duplicated: int = 0
    wrong: int = 0
    wrong_after_recovery: int = 0
    """Turns whose session was interrupted before, and whose answer is not the twin's."""
    interrupted: int = 0
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Keep an example of what was found."""
        self.notes.append(text[:400])


class Player:
    """A client that asks again whatever it got no answer to."""

    def __init__(self, url: str, tally: Tally, alive: Callable[[], None]) -> None:
        """
        Args:
            url: Of the server.
            tally: Told what is found.
            alive: Returns when the server answers.
        """
        self._client = http.client(url, timeout_s=300)
        self._tally = tally
        self._alive = alive

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    def play(self, session: Played, twin: Played | None = None) -> Played:
        """All turns of a session; held against its twin's, if there is one."""
        body = {"system": "Answer in few words.", "idempotency_key": session.name}
        session.id = self._insisting(session, lambda: self._post("/v1/sessions", body))["id"]
        for number in range(len(session.said)):
            before = session.interrupted
            answer = self._insisting(session, lambda number=number: self._ask(session, number))
            if session.interrupted > before:
                self._tally.interrupted += 1
                self._hold_to_one(session, number, answer)
            session.answers.append(answer)
            if twin is not None and answer != twin.answers[number]:
                self._tally.wrong += 1
                self._tally.wrong_after_recovery += session.interrupted > 0
                self._tally.note(
                    f"wrong: {session.name}, turn {number}, after {session.interrupted} "
                    f"interruptions: {answer}, not {twin.answers[number]}"
                )
        return session

    def look(self, session: Played) -> None:
        """Whether all that was answered is there."""
        for number, answer in enumerate(session.answers):
            path = f"/v1/sessions/{session.id}/messages"
            reply = self._client.get(path, params={"version": answer.version})
            if reply.status_code == httpx.codes.SERVICE_UNAVAILABLE:
                raise RefusedError(reply.text)
            messages = reply.json()["messages"] if reply.is_success else []
            texts = [message["content"] for message in messages]
            expected = [
                text
                for said, its in zip(
                    session.said[: number + 1], session.answers[: number + 1], strict=True
                )
                for text in (said.text, its.text)
            ]
            if texts != expected:
                self._tally.lost.add((session.id, answer.version))
                self._tally.note(f"lost: {session.name}, version {answer.version}: {reply.text}")

    def _hold_to_one(self, session: Played, number: int, answer: Answer) -> None:
        """The turn's key gives that one result, and the session has one version more."""
        again = self._insisting(session, lambda: self._ask(session, number))
        view = self._insisting(session, lambda: self._get(f"/v1/sessions/{session.id}"))
        if again != answer or not answer.version == view["version"] == number + 1:
            self._tally.duplicated += 1
            self._tally.note(
                f"duplicated: {session.name}, turn {number}: {answer}, then {again}, at version "
                f"{view['version']}"
            )

    def _insisting(self, session: Played, ask: Callable[[], Any]) -> Any:
        """Ask until there is an answer; where the server was gone, look at what it knows."""
        until = time.monotonic() + _GIVE_UP_S
        while True:
            try:
                return ask()
            except (httpx.TransportError, CutError):
                session.interrupted += 1
                self._alive()
                if session.answers:
                    self._insisting(session, lambda: self.look(session))
            except RefusedError as error:
                if time.monotonic() > until:
                    raise
                self._tally.note(f"refused, asked again: {error}")
                time.sleep(_RETRY_S)

    def _ask(self, session: Played, number: int) -> Answer:
        said = session.said[number]
        body = {
            "messages": [{"role": "user", "content": said.text}],
            "sampling": {"temperature": 0, "max_tokens": said.tokens},
            "return_output_ids": True,
            "idempotency_key": f"{session.name}-{number}",
            "stream": said.stream,
        }
        path = f"/v1/sessions/{session.id}/append"
        turn = self._stream(path, body) if said.stream else self._post(path, body)
        return Answer(
            turn["version"],
            turn["message"]["content"],
            tuple(turn["output_ids"]),
            turn["usage"]["history_tokens"],
        )

    def _post(self, path: str, body: Any) -> Any:
        return _told(self._client.post(path, json=body))

    def _get(self, path: str) -> Any:
        return _told(self._client.get(path))

    def _stream(self, path: str, body: Any) -> Any:
        with self._client.stream("POST", path, json=body) as reply:
            if not reply.is_success:
                reply.read()
                return _told(reply)
            name = ""
            for line in reply.iter_lines():
                field_, _, value = line.partition(": ")
                if field_ == "event":
                    name = value
                elif field_ == "data" and name == "done":
                    return json.loads(value)
                elif field_ == "data" and name == "error":
                    _refuse(json.loads(value)["error"]["status"], value)
        raise CutError


def _told(reply: httpx.Response) -> Any:
    if not reply.is_success:
        _refuse(reply.status_code, reply.text)
    return reply.json()


def _refuse(status: int, text: str) -> None:
    """What a client tries again is raised as such; anything else should not have come."""
    if status == httpx.codes.SERVICE_UNAVAILABLE:
        raise RefusedError(text)
    raise AssertionError(f"the server answered {status}: {text}")
