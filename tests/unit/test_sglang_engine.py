"""The adapter between SGLang's reports and the engine port, with SGLang's manager scripted."""

from __future__ import annotations

from array import array
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from stateful_sglang.cpu.platform import prepare

prepare()

from sglang.srt.managers.io_struct import (  # noqa: E402 - SGLang comes after prepare()
    TokenizedGenerateReqInput,
)
from sglang.srt.managers.tokenizer_manager import TokenizerManager  # noqa: E402
from sglang.srt.sampling.sampling_params import SamplingParams  # noqa: E402

from stateful_sglang import tenants  # noqa: E402
from stateful_sglang.runtime.sessions.engine import SGLangEngine  # noqa: E402
from stateful_sglang.runtime.sessions.manager import StatefulTokenizerManager  # noqa: E402
from stateful_sglang.runtime.sessions.requests import SessionAppendReq  # noqa: E402
from stateful_sglang.service.engine import (  # noqa: E402
    EngineError,
    Finish,
    PublishAnswer,
    TurnProgress,
    TurnRequest,
)
from stateful_sglang.service.sampling import Constraint, Sampling  # noqa: E402

pytestmark = pytest.mark.anyio

TURN = TurnRequest("s", "rid", 3, array("q", [7]), Sampling(max_tokens=5, seed=1))


class Manager:
    """Reports what it is told to report, and notes what it was asked."""

    tokenizer = None
    model_config = SimpleNamespace(vocab_size=100, hf_eos_token_id=None)

    def __init__(self, *reports: dict[str, Any] | Exception, parser: str | None = None) -> None:
        self.reports = reports
        self.parser = parser
        self.requests: list[Any] = []
        self.rid_to_state: dict[str, Any] = {}
        self.read_to_its_end = False

    def config_value(self, name: str) -> str | None:
        return self.parser if name == "tool_call_parser" else None

    async def generate_request(self, request: Any, _: None) -> AsyncIterator[dict[str, Any]]:
        self.requests.append(request)
        for report in self.reports:
            if isinstance(report, Exception):
                raise report
            yield report
        self.read_to_its_end = True


def report(finish: dict[str, Any] | None = None, *output_ids: int) -> dict[str, Any]:
    meta = {"prompt_tokens": 4, "cached_tokens": 3, "finish_reason": finish}
    return {"text": "x" * len(output_ids), "output_ids": list(output_ids), "meta_info": meta}


async def run(manager: Any, turn: TurnRequest = TURN) -> list[TurnProgress]:
    return [progress async for progress in SGLangEngine(manager).run(turn)]


async def test_reports_become_progress_up_to_the_finish() -> None:
    manager = Manager(report(None, 5), report({"type": "stop", "matched": 2}, 5, 2))
    first, last = await run(manager)
    assert (first.finish, last.finish) == (None, Finish("stop", 2))
    assert (last.output_ids.tolist(), last.cached_tokens, last.decode_steps) == ([5, 2], 3, 1)
    (request,) = manager.requests
    assert request.sampling_params == {"max_new_tokens": 5, "sampling_seed": 1}
    assert (request.rid, request.input_ids) == ("rid", [7])


@pytest.mark.parametrize(
    ("reports", "kind"),
    [
        ([report(None, 5), report({"type": "abort", "status_code": 503})], "overloaded"),
        ([report(None, 5), {"error": {"message": "m", "code": 400}}], "invalid"),
        ([report({"type": "abort", "status_code": 409, "err_type": "stale_base"})], "stale_base"),
        ([report(None, 5)], "broken"),
        ([], "broken"),
        ([report(None, 5), RuntimeError("the scheduler died")], "broken"),
        ([ValueError("The input (9 tokens) is longer than the context")], "invalid"),
    ],
)
async def test_a_bad_end_is_raised_with_its_kind(reports: Any, kind: str) -> None:
    manager = Manager(*reports)
    with pytest.raises(EngineError) as ended:
        await run(manager)
    assert ended.value.kind == kind
    assert manager.read_to_its_end != any(isinstance(each, Exception) for each in reports)


async def test_a_refused_constraint_is_named_by_the_turns_field() -> None:
    message = "Failed to compile regex grammar: too much"
    manager = Manager(report({"type": "abort", "message": message, "status_code": 400}))
    turn = TurnRequest("s", "rid", 0, array("q", [7]), Sampling(), Constraint("regex", "x"))
    with pytest.raises(EngineError) as refused:
        await run(manager, turn)
    assert (refused.value.kind, refused.value.field) == ("invalid", "constraint")
    assert manager.requests[0].sampling_params == {"regex": "x"}


async def test_tool_calls_are_parsed_where_the_server_names_a_parser() -> None:
    tools = [{"type": "function", "function": {"name": "search"}}]
    text = '<tool_call>\n{"name": "search", "arguments": {"q": "a"}}\n</tool_call>'
    assert SGLangEngine(Manager()).parse_tool_calls(text, tools) is None
    parsed = SGLangEngine(Manager(parser="qwen25")).parse_tool_calls(text, tools)
    assert parsed is not None
    assert [(call.name, call.arguments) for call in parsed.calls] == [("search", {"q": "a"})]


async def test_a_tree_that_is_not_described_in_time_is_overload() -> None:
    async def silent(session_id: str | None, limit: int) -> dict[str, Any]:
        raise TimeoutError

    manager: Any = Manager()
    manager.tree_summary = silent
    with pytest.raises(EngineError, match="did not describe its tree in time") as late:
        await SGLangEngine(manager).tree_summary(None, 5)
    assert late.value.kind == "overloaded"


async def test_a_prefill_samples_nothing_and_reports_its_end_alone() -> None:
    manager = Manager(report(None, 5), report({"type": "stop", "matched": 2}, 5))
    sampling = Sampling(max_tokens=5, temperature=1.0, stop=("x",))
    turn = TurnRequest("s", "rid", 3, array("q", [7]), sampling, kind="prefill")
    (progress,) = await run(manager, turn)
    assert progress == TurnProgress("", array("q"), Finish("length"), 4, 3, 0)
    (request,) = manager.requests
    assert request.sampling_params == {"max_new_tokens": 0, "temperature": 0.0}
    assert request.turn.kind == "prefill"


async def test_a_salt_reaches_the_scheduler_and_no_log_of_the_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manager = Manager(report({"type": "length"}, 5))
    turn = TurnRequest("s", "rid", 3, array("q", [7]), Sampling(), kind="ephemeral", salt="hush")
    await run(manager, turn)
    (request,) = manager.requests
    assert "hush" not in repr(request)
    tokenized = TokenizedGenerateReqInput(
        input_text=None,
        input_ids=array("q", [7]),
        input_embeds=None,
        mm_inputs=None,
        token_type_ids=None,
        sampling_params=SamplingParams(),
        return_logprob=False,
        logprob_start_len=-1,
        top_logprobs_num=0,
        token_ids_logprob=None,
        stream=True,
    )
    monkeypatch.setattr(
        TokenizerManager, "_create_tokenized_object", lambda *_args, **_kwargs: tokenized
    )
    made = object.__new__(StatefulTokenizerManager)._create_tokenized_object(request)
    assert isinstance(made, SessionAppendReq)
    assert (made.cache_salt, made.kind, made.base_len) == ("hush", "ephemeral", 3)


async def test_forks_rollbacks_and_closes_leave_as_messages() -> None:
    manager = object.__new__(StatefulTokenizerManager)
    sent: list[Any] = []
    manager._dispatch_to_scheduler = sent.append  # type: ignore[method-assign]
    engine = object.__new__(SGLangEngine)
    engine._manager = manager
    await engine.fork_session("s", "f", 7)
    await engine.rollback_session("s", 5)
    await engine.close_session("s")
    fork, rollback, close = sent
    assert (fork.source_session, fork.stateful_session, fork.length) == ("s", "f", 7)
    assert (rollback.stateful_session, rollback.length) == ("s", 5)
    assert close.stateful_session == "s"


class PublishingManager(Manager):
    """A manager whose ranks publish, or say why not."""

    def __init__(self, *reports: Any, problem: str | None = None, late: bool = False) -> None:
        super().__init__(*reports)
        self.problem, self.late = problem, late
        self.salts: list[str | None] = []
        self.unpublished: list[str] = []

    async def publish(self, _prefix_id: str, _tokens: list[int]) -> Any:
        if self.late:
            raise TimeoutError
        return SimpleNamespace(aligned_tokens=2, problem=self.problem)

    def send_unpublish(self, prefix_id: str) -> None:
        self.unpublished.append(prefix_id)

    async def generate_request(self, request: Any, _: None) -> AsyncIterator[dict[str, Any]]:
        self.salts.append(tenants.current().salt)
        async for each in super().generate_request(request, None):
            yield each


async def publish(manager: PublishingManager, *, compute: bool = True) -> PublishAnswer:
    with tenants.acting_as(tenants.Identity("ops", admin=True, salt="its own")):
        engine = SGLangEngine(cast("Any", manager))
        return await engine.publish_prefix("p", array("q", [7, 8, 9]), compute=compute)


async def test_a_published_prefix_is_computed_under_no_salt_whoever_publishes_it() -> None:
    manager = PublishingManager(report({"type": "length"}))
    assert await publish(manager) == PublishAnswer(2, None)
    (request,) = manager.requests
    assert (request.input_ids, request.sampling_params["max_new_tokens"]) == ([7, 8, 9], 0)
    assert manager.salts == [None]
    assert manager.unpublished == []


async def test_a_prefix_is_published_without_its_kv_where_nobody_asks_for_it() -> None:
    manager = PublishingManager()
    assert await publish(manager, compute=False) == PublishAnswer(2, None)
    assert (manager.requests, manager.unpublished) == ([], [])


async def test_what_the_ranks_refuse_is_not_computed() -> None:
    manager = PublishingManager(problem="no room")
    assert await publish(manager) == PublishAnswer(2, "no room")
    assert manager.requests == []


@pytest.mark.parametrize(
    ("manager", "kind"),
    [
        (PublishingManager(report({"type": "abort", "status_code": 503})), "overloaded"),
        (PublishingManager(ValueError("too long")), "invalid"),
        (PublishingManager(), "broken"),
        (PublishingManager(late=True), "overloaded"),
    ],
)
async def test_a_prefix_that_is_not_computed_is_not_published(
    manager: PublishingManager, kind: str
) -> None:
    with pytest.raises(EngineError) as failed:
        await publish(manager)
    assert failed.value.kind == kind
    assert manager.unpublished == ["p"]
