"""The table of everything we attach to in SGLang, gathered from the rooms.

``python -m stateful_sglang.server.catalogue`` compares it with what is committed and exits with
1 where they differ; ``--write`` renews ``attachments/table.json`` and ``patches/README.md``.
Renew it only after reading what changed upstream: the fingerprint is a promise that somebody did.
"""

# ruff: noqa: E402 - SGLang imports only after prepare()

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from stateful_sglang import SGLANG_VERSION
from stateful_sglang.cpu.platform import prepare

prepare()

from stateful_sglang import cpu
from stateful_sglang.api.openai import chat
from stateful_sglang.attachments.check import TABLE, Attachment, fingerprint
from stateful_sglang.runtime import (
    admission,
    ending,
    grammar_cache,
    grammar_compile,
    isolation,
    min_tokens,
    stops,
)
from stateful_sglang.runtime.sessions import engine as client
from stateful_sglang.runtime.sessions import requests, scheduler
from stateful_sglang.runtime.speculation import algorithm as draft_spec
from stateful_sglang.runtime.speculation import worker as draft_worker
from stateful_sglang.runtime.tree import cache as tree
from stateful_sglang.server import own_requests, upstream

ATTACHMENTS: tuple[Attachment, ...] = tuple(
    sorted(
        {
            *admission.ATTACHMENTS,
            *chat.ATTACHMENTS,
            *client.ATTACHMENTS,
            *cpu.ATTACHMENTS,
            *draft_spec.ATTACHMENTS,
            *draft_worker.ATTACHMENTS,
            *grammar_compile.ATTACHMENTS,
            *ending.ATTACHMENTS,
            *grammar_cache.ATTACHMENTS,
            *isolation.ATTACHMENTS,
            *min_tokens.ATTACHMENTS,
            *requests.ATTACHMENTS,
            *scheduler.ATTACHMENTS,
            *stops.ATTACHMENTS,
            *tree.ATTACHMENTS,
            *own_requests.ATTACHMENTS,
            *upstream.ATTACHMENTS,
        },
        key=lambda row: (row.target, row.kind, row.reason),
    )
)

PATCHES_README = Path(__file__).parents[2] / "patches" / "README.md"

_PREAMBLE = f"""\
# Where we touch SGLang {SGLANG_VERSION}

Every attachment, its reason, and a fingerprint of the upstream source it relies on (the syntax tree
of the target: comments and formatting don't count). Each server process checks the fingerprints
before it attaches anything, and a mismatch stops it; `stateful-sglang doctor` shows the same check.

Kinds: *registry*, a plug-in point SGLang offers; *hook*, SGLang's hook registry; *subclass*,
source that a class of ours overrides; *patch*, source replaced at run time; *relies*, source that
we call or count on and leave as it is. There is no vendored or patched copy of SGLang.

This file is generated: `python -m stateful_sglang.server.catalogue --write`.

| target | kind | reason | fingerprint |
|---|---|---|---|
"""


def table() -> str:
    """The committed JSON: one row an attachment, with the installed SGLang's fingerprint.

    Raises:
        LookupError: A target does not exist in the installed SGLang.
    """
    rows = []
    for row in ATTACHMENTS:
        found = fingerprint(row.target)
        if found is None:
            raise LookupError(f"{row.target} does not exist in the installed SGLang")
        rows.append(
            {"target": row.target, "kind": row.kind, "reason": row.reason, "fingerprint": found}
        )
    return json.dumps(rows, indent=1) + "\n"


def readme() -> str:
    """The committed page: the same table for people."""
    lines = [
        f"| `{row.target.removeprefix('sglang.')}` | {row.kind} | {row.reason} "
        f"| `{fingerprint(row.target)}` |\n"
        for row in ATTACHMENTS
    ]
    return _PREAMBLE + "".join(lines)


def main() -> int:
    """Compare or renew the committed table; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="renew the committed files")
    write = parser.parse_args().write
    stale = []
    for path, text in ((TABLE, table()), (PATCHES_README, readme())):
        if write:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(path.name)
    if stale:
        print(f"out of date: {', '.join(stale)}; renew with --write", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
