"""Constraints as a service takes them: prepared off the event loop, and remembered."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from stateful_sglang.grammar.errors import ConstraintError
from stateful_sglang.grammar.prepare import Kind, prepare
from stateful_sglang.grammar.worker import Worker

Compile = Callable[[str, str], Awaitable[None]]
"""Raises `ConstraintError` where the compiler refuses a prepared constraint.

Takes ``json_schema``, ``regex`` or ``ebnf``, and the text."""

SMALL_CHARS = 2048
"""Up to here a thread does it: a few milliseconds, in slices that let the event loop run."""
_REMEMBERED = 512
_REMEMBERED_CHARS = 16 << 20


class Constraints:
    """Prepares and checks constraints; what was asked before costs a digest."""

    def __init__(self, compile_check: Compile) -> None:
        self._compile_check = compile_check
        self._worker = Worker("stateful_sglang.grammar.prepare:prepare")
        self._known: OrderedDict[bytes, str | ConstraintError] = OrderedDict()
        self._chars = 0

    async def prepared(self, kind: Kind, text: str) -> str:
        """What the compiler is given for a constraint, proven to be taken ("" for ``tools``).

        Raises:
            ConstraintError: The constraint can't be used.
            WorkerUnavailableError: The constraint can't be checked now.
        """
        key = hashlib.sha256(f"{kind} {text}".encode("utf-8", "surrogatepass")).digest()
        known = self._known.get(key)
        if known is None:
            try:
                known = await self._made(kind, text)
            except ConstraintError as error:
                known = error
            self._remember(key, known)
        else:
            self._known.move_to_end(key)
        if isinstance(known, ConstraintError):
            raise known.again()
        return known

    async def _made(self, kind: Kind, text: str) -> str:
        # Matching a client's pattern may take for ever, and would hold the GIL meanwhile.
        quick = kind in ("regex", "ebnf") or (len(text) <= SMALL_CHARS and '"pattern' not in text)
        if quick:
            made = await asyncio.to_thread(prepare, kind, text)
        else:
            made = await self._worker.run(kind, text)
        if kind != "tools":
            await self._compile_check("json_schema" if kind == "tool_call" else kind, made)
        return made

    def _remember(self, key: bytes, value: str | ConstraintError) -> None:
        self._known[key] = value
        self._chars += len(str(value))
        while len(self._known) > _REMEMBERED or self._chars > _REMEMBERED_CHARS:
            self._chars -= len(str(self._known.popitem(last=False)[1]))
