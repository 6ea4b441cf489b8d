"""Prefixes that all tenants share: which there are, made and removed one at a time.

Who may do so is decided in front of the routes.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable
from typing import NamedTuple

from stateful_sglang.service.commands import Publish
from stateful_sglang.service.engine import EngineError, TurnEngine
from stateful_sglang.service.failures import not_done
from stateful_sglang.service.plan import Planner
from stateful_sglang.session.errors import PrefixNotFoundError, PublishRefusedError
from stateful_sglang.session.ids import new_rid


class PrefixView(NamedTuple):
    """A published prefix."""

    id: str
    tokens: int
    aligned_tokens: int
    """How many of them are shared: whole pages of the KV pool."""


class Prefixes:
    """What is published now. In memory only: a server that starts again has published nothing."""

    def __init__(
        self, engine: TurnEngine, planner: Planner, check_accepting: Callable[[], None]
    ) -> None:
        """
        Args:
            engine: Shares the KV, and computes it.
            planner: Makes tokens of what is to be published.
            check_accepting: Raises where the server starts nothing more.
        """
        self._engine = engine
        self._planner = planner
        self._check_accepting = check_accepting
        self._published: dict[str, tuple[PrefixView, array[int]]] = {}
        self._changing = asyncio.Lock()

    async def publish(self, command: Publish) -> PrefixView:
        """Publish a prefix and compute its KV; what is published already is answered as it is.

        Raises:
            InvalidInputError: It can't be rendered, or comes to nothing.
            ContextOverflowError: It doesn't fit.
            PublishRefusedError: There is no room for it beside the others.
            EngineFailedError: It could not be computed; nothing is published.
        """
        self._check_accepting()
        tokens = await self._planner.prefix(command.content)
        async with self._changing:
            for view, same in self._published.values():
                if same == tokens:
                    return view
            prefix_id = new_rid()
            try:
                aligned, problem = await self._engine.publish_prefix(prefix_id, tokens)
            except EngineError as error:
                raise not_done(error) from error
            if problem is not None:
                raise PublishRefusedError(problem)
            view = PrefixView(prefix_id, len(tokens), aligned)
            self._published[prefix_id] = view, tokens
            return view

    def list(self) -> tuple[PrefixView, ...]:
        """All of them, the oldest first."""
        return tuple(view for view, _ in self._published.values())

    async def remove(self, prefix_id: str) -> PrefixView:
        """Publish a prefix no longer.

        Raises:
            PrefixNotFoundError: There is none of this id.
        """
        async with self._changing:
            if prefix_id not in self._published:
                raise PrefixNotFoundError(prefix_id)
            await self._engine.unpublish_prefix(prefix_id)
            return self._published.pop(prefix_id)[0]
