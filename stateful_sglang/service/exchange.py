"""Sessions as files: everything that another server needs to continue one token-exactly.

JSON, because a file from elsewhere must not be able to run anything: what is read is checked field
by field, and nothing but data comes of it.
"""

from __future__ import annotations

import base64
import binascii
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from stateful_sglang.session.errors import InvalidInputError, OtherModelError
from stateful_sglang.session.history import Commit, History
from stateful_sglang.session.ids import new_session_id
from stateful_sglang.session.journal.codec import message_form, message_of
from stateful_sglang.session.messages import Head, Message
from stateful_sglang.session.records import SessionOptions
from stateful_sglang.session.session import Session

FORMAT = "stateful-sglang-session/1"
_MAX_VERSIONS = 1_000_000


class Snapshot(NamedTuple):
    """A session as it was at one moment, to be written out while it goes on."""

    form: Mapping[str, Any]
    """All but its commits."""
    commits: Sequence[Commit]
    """Every version that it can go back to, those of its source included, oldest first."""


def snapshot(session: Session, model: str) -> Snapshot:
    """Take hold of a session; nothing of it is copied."""
    history = session.history
    commits: dict[int, Commit] = {}
    for commit in (history.tip, history.origin, *history.published):
        way: Commit | None = commit
        while way is not None and way.version not in commits:
            commits[way.version] = way
            way = way.parent
    form = {
        "format": FORMAT,
        "model": model,
        "options": asdict(session.options),
        "created_at": session.created_at,
        "version": session.version,
        "newest": history.newest,
    }
    return Snapshot(form, [commits[version] for version in sorted(commits)])


def exported(taken: Snapshot) -> dict[str, Any]:
    """A session as JSON; a long one takes long, and any thread may do it."""
    return {**taken.form, "commits": [_commit_form(commit) for commit in taken.commits]}


def imported(
    form: Mapping[str, Any],
    tenant: str,
    *,
    model: str,
    vocab_size: int,
    accept_other_model: bool = False,
) -> Session:
    """The session that `exported` wrote, under a new id; any thread may make it.

    Raises:
        InvalidInputError: It is something else, or damaged; names the field.
        OtherModelError: It is another model's. With `accept_other_model` its messages alone are
            taken, as pending ones that the next turn renders.
    """
    if form.get("format") != FORMAT:
        raise InvalidInputError(
            "format", f"{form.get('format')!r} is not {FORMAT!r}: not an exported session"
        )
    other = str(form.get("model"))
    if other != model and not accept_other_model:
        raise OtherModelError(other, model)
    session_id = new_session_id()
    try:
        options = SessionOptions(**form["options"])
        history = _history(session_id, form, vocab_size)
    except (KeyError, TypeError, AttributeError) as error:
        raise InvalidInputError("commits", f"no exported session: {error!r}") from error
    if other != model:
        head = history.tip.conversation.head
        said = history.messages(history.tip.version)
        history = History.opened(session_id, head, [_without_raw(each) for each in said])
    return Session(session_id, tenant, history, options)


def _history(session_id: str, form: Mapping[str, Any], vocab_size: int) -> History:
    forms: Sequence[Mapping[str, Any]] = form["commits"]
    if not 0 < len(forms) <= _MAX_VERSIONS:
        raise InvalidInputError("commits", f"{len(forms)} of them; expected 1 to {_MAX_VERSIONS}")
    commits: dict[int, Commit] = {}
    for at, each in enumerate(forms):
        commit = _commit(session_id, at, each, commits, vocab_size)
        if commit.version in commits or (commits and commit.parent is None):
            raise InvalidInputError(f"commits[{at}].version", "not a version after its parent's")
        commits[commit.version] = commit
    origin = next(iter(commits.values()))
    published = [commit for commit in commits.values() if commit is not origin]
    tip, newest = form["version"], form["newest"]
    if tip not in commits or not isinstance(newest, int) or newest < max(commits):
        raise InvalidInputError("version", f"{tip!r} is none of the versions of commits")
    return History.restored(session_id, origin, published, tip, newest)


def _commit_form(commit: Commit) -> dict[str, Any]:
    head = commit.conversation.head
    parent = commit.parent
    form: dict[str, Any] = {
        "version": commit.version,
        "parent": None if parent is None else parent.version,
        "base_len": commit.base_len,
        "tokens": _tokens_form(commit.tokens),
        "messages": [message_form(each) for each in commit.messages],
        "pending": [message_form(each) for each in commit.pending],
        "raw": commit.conversation.raw,
        "finish_reason": commit.finish_reason,
        "created_at": commit.created_at,
    }
    if parent is None or parent.conversation.head is not head:
        form["head"] = {
            "system": head.system,
            "tools": list(head.tools),
            "template_kwargs": dict(head.template_kwargs),
            "verbatim": head.verbatim,
        }
    return form


def _commit(
    session_id: str,
    at: int,
    form: Mapping[str, Any],
    commits: Mapping[int, Commit],
    vocab_size: int,
) -> Commit:
    named = form["parent"]
    if named is not None and named not in commits:
        raise InvalidInputError(f"commits[{at}].parent", f"there is no version {named!r} before it")
    parent = None if named is None else commits[named]
    if "head" in form:
        given = form["head"]
        head = Head(
            given["system"],
            tuple(given["tools"]),
            given["template_kwargs"],
            bool(given.get("verbatim")),
        )
    elif parent is not None:
        head = parent.conversation.head
    else:
        raise InvalidInputError(f"commits[{at}].head", "missing in the first commit")
    start = parent or History.opened(session_id, head).tip
    messages = [_message(each) for each in form["messages"]]
    raw = bool(form["raw"])
    conversation = start.conversation.extended(head, messages)
    if raw and not conversation.raw:
        conversation = conversation.extended(head, None)
    base_len, tokens = form["base_len"], _tokens(at, form["tokens"], vocab_size)
    if not isinstance(base_len, int) or not 0 <= base_len <= len(start.transcript):
        raise InvalidInputError(f"commits[{at}].base_len", f"{base_len!r} is not in its parent")
    version = form["version"]
    if not isinstance(version, int) or version < 0 or (parent and version <= parent.version):
        raise InvalidInputError(f"commits[{at}].version", f"{version!r} is not after its parent's")
    return Commit(
        owner=session_id,
        version=version,
        parent=parent,
        base_len=base_len,
        transcript=start.transcript.cut(base_len).extended(tokens),
        conversation=conversation,
        pending=tuple(_message(each) for each in form["pending"]),
        finish_reason=form["finish_reason"],
        created_at=float(form["created_at"]),
    )


def _tokens_form(tokens: array[int]) -> str:
    """Tokens as base64 of 32-bit integers, the lowest byte first."""
    if sys.byteorder == "big":
        tokens = array("i", tokens)
        tokens.byteswap()
    return base64.b64encode(tokens.tobytes()).decode()


def _tokens(at: int, form: str, vocab_size: int) -> array[int]:
    tokens = array("i")
    try:
        tokens.frombytes(base64.b64decode(form, validate=True))
    except (binascii.Error, ValueError, TypeError) as error:
        raise InvalidInputError(
            f"commits[{at}].tokens", f"not base64 of tokens: {error}"
        ) from error
    if sys.byteorder == "big":
        tokens.byteswap()
    if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
        raise InvalidInputError(
            f"commits[{at}].tokens", f"not all are token ids of this model, 0 to {vocab_size - 1}"
        )
    return tokens


def _message(form: Mapping[str, Any]) -> Message:
    message = message_of(form)
    for value in (message.role, message.content, message.raw or ""):
        if not isinstance(value, str):
            raise InvalidInputError("commits", f"a message has {value!r} where text is expected")
    return message


def _without_raw(message: Message) -> Message:
    """A message as a client would send it: what another model generated is text here."""
    return Message(
        message.role, message.content, message.tool_calls, message.tool_call_id, message.name
    )
