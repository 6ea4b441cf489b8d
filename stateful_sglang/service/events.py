"""What happens to sessions, told to whoever listens; nobody's slowness holds up a turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from stateful_sglang.service.results import SessionEvent

MAX_BEHIND = 256
"""Events that a listener may be behind; beyond, it gets one ``lagged`` in their place."""
MAX_LISTENERS = 64
"""Of one session."""
_LAST = frozenset({"closed", "expired"})


class Listener:
    """One reader of a session's events."""

    def __init__(self) -> None:
        self._events: asyncio.Queue[SessionEvent] = asyncio.Queue()

    def put(self, event: SessionEvent) -> None:
        """Hand an event over."""
        if self._events.qsize() >= MAX_BEHIND:
            lost = 0
            while not self._events.empty():
                self._events.get_nowait()
                lost += 1
            self._events.put_nowait(SessionEvent("lagged", {"lost": lost}))
        self._events.put_nowait(event)

    async def __aiter__(self) -> AsyncIterator[SessionEvent]:
        while True:
            event = await self._events.get()
            yield event
            if event.name in _LAST:
                return


class EventHub:
    """Listeners by session. Costs one lookup where there are none."""

    def __init__(self) -> None:
        self._listeners: dict[str, set[Listener]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._listeners.values()))

    def listeners(self, session_id: str) -> int:
        """How many listen to a session."""
        return len(self._listeners.get(session_id, ()))

    def tell(self, session_id: str, name: str, **data: object) -> None:
        """Something happened to a session."""
        for listener in self._listeners.get(session_id, ()):
            listener.put(SessionEvent(name, data))

    def listen(self, session_id: str) -> Listener:
        """Begin to listen: what happens from now on is kept for this listener."""
        listener = Listener()
        self._listeners.setdefault(session_id, set()).add(listener)
        return listener

    def leave(self, session_id: str, listener: Listener) -> None:
        """Stop listening."""
        listeners = self._listeners.get(session_id, set())
        listeners.discard(listener)
        if not listeners:
            self._listeners.pop(session_id, None)
