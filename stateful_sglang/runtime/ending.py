"""How SGLang's part of a server ends, for whoever decides when."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from sglang.srt.managers.tokenizer_manager import SignalHandler
from sglang.srt.utils.common import kill_process_tree

from stateful_sglang.attachments.check import Attachment

_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
ATTACHMENTS = (
    Attachment(
        "sglang.srt.managers.tokenizer_manager.SignalHandler",
        "subclass",
        "SIGTERM begins our drain, which is bounded and refuses new requests; SIGQUIT stays "
        "SGLang's, by which a dead scheduler ends the server",
    ),
    Attachment(
        f"{_MANAGER}.auto_create_handle_loop",
        "relies",
        "makes the signal handler of the manager's `signal_handler_class` with the first request",
    ),
    Attachment(
        f"{_MANAGER}.sigterm_watchdog",
        "relies",
        "run by us once no request is left: tells the schedulers to end, waits for them, kills "
        "the other processes and has the HTTP server return",
    ),
    Attachment(
        f"{_MANAGER}.set_server_stop_hook",
        "relies",
        "how that watchdog reaches the HTTP server",
    ),
)
_KILL_WAIT_S = 5.0


class SGLangEnding:
    """SGLang's processes, as `stateful_sglang.server.drain` asks them to end."""

    def __init__(self, manager: Any, on_sigterm: Callable[[], None]) -> None:
        """
        Args:
            manager: SGLang's tokenizer manager, before its first request.
            on_sigterm: Called on the event loop at SIGTERM, in place of SGLang's own handler.
        """
        self._manager = manager

        class Handler(SignalHandler):  # type: ignore[misc]
            def sigterm_handler(self, signum: Any = None, frame: Any = None) -> None:
                on_sigterm()

        manager.signal_handler_class = Handler

    def busy(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._manager.rid_to_state)

    def abort_all(self) -> None:
        """Have every request end soon."""
        self._manager.abort_request(abort_all=True)

    async def stop(self) -> None:
        """End SGLang's processes, schedulers in their orderly way, and the HTTP server."""
        if self._manager.rid_to_state:
            # Its watchdog would wait for these without a bound: the scheduler doesn't answer.
            raise RuntimeError(f"{len(self._manager.rid_to_state)} requests did not let go")
        self._manager.gracefully_exit = True
        await self._manager.sigterm_watchdog()

    def kill(self) -> None:
        """End SGLang's processes now."""
        kill_process_tree(os.getpid(), include_parent=False, wait_timeout=_KILL_WAIT_S)
