"""How SGLang's tokenizer manager is asked to end."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from stateful_sglang.cpu.platform import prepare

prepare()

from sglang.srt.managers.tokenizer_manager import SignalHandler  # noqa: E402

from stateful_sglang.runtime.ending import SGLangEnding  # noqa: E402


class StandInManager(SimpleNamespace):
    """What an end asks of SGLang's tokenizer manager."""

    def __init__(self, *rids: str) -> None:
        super().__init__(
            rid_to_state=dict.fromkeys(rids), gracefully_exit=False, signal_handler_class=None
        )
        self.calls: list[Any] = []

    def abort_request(self, rid: str = "", abort_all: bool = False) -> None:
        self.calls.append(("abort", rid, abort_all))

    async def sigterm_watchdog(self) -> None:
        self.calls.append(("end", self.gracefully_exit))


def test_sigterm_is_ours_and_a_dead_child_stays_sglangs() -> None:
    manager, told = StandInManager(), []
    SGLangEnding(manager, lambda: told.append("SIGTERM"))
    handler = manager.signal_handler_class(manager)
    handler.sigterm_handler()
    assert told == ["SIGTERM"]
    assert not manager.gracefully_exit
    sigquit = type(handler).running_phase_sigquit_handler
    assert sigquit is SignalHandler.running_phase_sigquit_handler


def test_sglangs_own_end_is_run_without_its_wait_for_the_flag() -> None:
    manager = StandInManager()
    asyncio.run(SGLangEnding(manager, lambda: None).stop())
    assert manager.calls == [("end", True)]


def test_requests_that_run_are_aborted_all_at_once_and_never_waited_for() -> None:
    manager = StandInManager("a", "b")
    ending = SGLangEnding(manager, lambda: None)
    assert ending.busy()
    ending.abort_all()
    assert manager.calls == [("abort", "", True)]
    with pytest.raises(RuntimeError, match="2 requests did not let go"):
        asyncio.run(ending.stop())
    manager.rid_to_state.clear()
    assert not ending.busy()
