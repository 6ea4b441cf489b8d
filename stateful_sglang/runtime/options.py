"""Our options, each declared once: parser, help, checks, settings of processes and docs follow.

SGLang spawns its processes and parses its own arguments only, so ours travel in one environment
variable as JSON: made by the launcher, read in every server process.

A new option is one field of `Options` here, and its row in ``docs/options.md``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from stateful_sglang import cache_folder
from stateful_sglang.draft import sources
from stateful_sglang.prefix import policies
from stateful_sglang.rendering.content import ContentTokens
from stateful_sglang.runtime.declarations import Bounds, Declared, OptionError, about, declarations
from stateful_sglang.session.records import MAX_TTL_S

PREFIX = "STATEFUL_SGLANG_"
ENV = f"{PREFIX}CONFIG"
VARIABLES: Mapping[str, str] = {
    ENV: "settings of a server's processes, as the launcher wrote them; not for people",
    cache_folder.ENV: "what --cache-dir is, for every command",
    f"{PREFIX}CPU_ISA": "avx512, avx2 or portable force a path of the CPU kernels, off means none",
    f"{PREFIX}CPU_LIBRARY": "a library of CPU kernels to load in place of building one",
    f"{PREFIX}API_KEY": "the key that the command sessions asks a server with",
    f"{PREFIX}READY_FD": "where a server tells its supervisor that it answers; not for people",
}
"""Every environment variable of ours, and what it says."""


Dropin = Literal["stateful", "exact", "off"]
JournalSync = Literal["full", "normal"]


def _share(example: str) -> Bounds:
    return Bounds(0, 1, f"it is a share of the KV pool between 0 and 1, for example {example}")


@dataclass(frozen=True)
class Options:
    """What was chosen for one server.

    Raises:
        OptionError: From the constructor, for a value that its option does not take.
    """

    stateful: bool = field(
        default=True,
        metadata=about("off: plain SGLang, with the same CPU support"),
    )
    pin_budget: float = field(
        default=0.5,
        metadata=about(
            "largest share of the KV pool, 0 to 1, that sessions pin",
            metavar="SHARE",
            bounds=_share("--pin-budget 0.5"),
        ),
    )
    publish_budget: float = field(
        default=0.1,
        metadata=about(
            "largest share of the KV pool, 0 to 1, that prefixes published to all tenants may have",
            metavar="SHARE",
            bounds=_share("--publish-budget 0.1"),
        ),
    )
    eviction_policy: str = field(
        default=policies.DEFAULT,
        metadata=about(
            lambda: f"what leaves the KV pool first. {policies.POLICIES.summaries()}",
            choices=lambda: tuple(policies.POLICIES),
        ),
    )
    draft: str = field(
        default=sources.AUTO,
        metadata=about(
            lambda: f"where drafts come from. {sources.SOURCES.summaries()}; off: no drafts",
            choices=lambda: sources.CHOICES,
            default_note=f", which is {sources.DEFAULT}",
        ),
    )
    max_draft: int = field(
        default=8,
        metadata=about(
            "most tokens drafted for a request in one step",
            metavar="TOKENS",
            bounds=Bounds(1, 64, "expected 1 to 64 tokens. To draft nothing, use --draft off"),
        ),
    )
    content_tokens: ContentTokens = field(
        default="text",
        metadata=about(
            "what a special token that is spelled in a message or a tool's result becomes: text, "
            "or that token, so that whoever wrote it can open and close turns",
            choices=lambda: get_args(ContentTokens),
        ),
    )
    cpu_quant: str = field(
        default="off",
        metadata=about(
            "without a GPU: round weights to int8, half the memory to read and no longer exact",
            choices=lambda: ("off", "int8"),
        ),
    )
    restart: str = field(
        default="never",
        metadata=about(
            "on-crash: start the server again when one of its processes has died, with growing "
            "delays; clients that repeat their requests notice a delay only",
            choices=lambda: ("never", "on-crash"),
        ),
    )
    drain_s: int = field(
        default=30,
        metadata=about(
            "longest time that running turns have to end after SIGTERM or Ctrl-C, while new ones "
            "are refused; a second signal ends the server at once",
            metavar="SECONDS",
            bounds=Bounds(0, 3600, "expected 0 to 3600 seconds, for example --drain-s 30"),
        ),
    )
    metrics: bool = field(
        default=True,
        metadata=about("off: no /metrics, unless SGLang's --enable-metrics asks for it"),
    )
    cache_dir: Path | None = field(
        default=None,
        metadata=about(
            "where converted models and compiled kernels are kept",
            metavar="DIR",
            kind=Path,
            travels=False,  # as the cache's own variable, which other commands read too
        ),
    )
    keys: Path | None = field(
        default=None,
        metadata=about(
            "the file of API keys, as stateful-sglang keys makes it; off: no keys; without the "
            "option, keys.json in the cache folder, where that is there",
            metavar="FILE",
            kind=Path,
            travels=False,  # requests are judged where they come in
        ),
    )
    allow_host: tuple[str, ...] = field(
        default=(),
        metadata=about(
            "a further name that the server answers under, beside loopback and the address that it "
            "listens on; commas between several; *: any",
            metavar="NAME",
            travels=False,
        ),
    )
    allow_origin: tuple[str, ...] = field(
        default=(),
        metadata=about(
            "pages of another origin that may use the server, as https://host:port; commas between "
            "several; null: pages without one; *: any page",
            metavar="ORIGIN",
            travels=False,
        ),
    )
    insecure: bool = field(
        default=False,
        metadata=about(
            "on: listen beyond this machine without keys, for whoever can reach it",
            travels=False,
        ),
    )
    dropin: Dropin = field(
        default="stateful",
        metadata=about(
            "requests that send the whole conversation, on the routes in OpenAI's and Anthropic's "
            "form. stateful: each continues the session that it names by what it says again; "
            "exact: likewise, from the tokens that SGLang's own rendering of all of it shares with "
            "the session's; off: as SGLang has it",
            choices=lambda: get_args(Dropin),
        ),
    )
    session_ttl_s: int = field(
        default=24 * 3600,
        metadata=about(
            "seconds without a use after which a session expires that names no ttl_s of its own; "
            "0: none does",
            metavar="SECONDS",
            bounds=Bounds(
                0, MAX_TTL_S, f"expected 1 to {MAX_TTL_S} seconds, or 0 to keep what names no ttl_s"
            ),
        ),
    )
    journal: str | None = field(
        default=None,
        metadata=about(
            "file that sessions are recorded in, by default journal.sqlite3 in the cache folder; "
            "off: they are lost with the server",
            metavar="PATH",
            kind=str,
        ),
    )
    journal_sync: JournalSync = field(
        default="full",
        metadata=about(
            "full: a turn is on the disk before it is answered; normal: it survives the server's "
            "end, and may be lost with the machine's power",
            choices=lambda: get_args(JournalSync),
        ),
    )
    journal_max_gb: float = field(
        default=16.0,
        metadata=about(
            "GiB that the journal's files may take, beyond which nothing new is recorded",
            metavar="GIB",
            bounds=Bounds(
                0.01, 1e6, "expected GiB of disk, 0.01 or more, for example --journal-max-gb 16"
            ),
        ),
    )
    quiet: bool = field(
        default=False,
        metadata=about(
            "the user chose no log level: leave out what every start repeats",
            settable=False,
        ),
    )

    def __post_init__(self) -> None:
        for each in declared():
            problem = each.problem(getattr(self, each.name))
            if problem is not None:
                raise OptionError(problem)

    def to_env(self) -> None:
        """Publish these settings to this process and to those it will spawn."""
        values = {each.name: getattr(self, each.name) for each in declared() if each.option.travels}
        os.environ[ENV] = json.dumps(values)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Options | None:
        """Settings of this server, or None where our launcher did not start it.

        Raises:
            OptionError: The variable holds what no launcher of this release writes.
        """
        raw = environ.get(ENV)
        if not raw:
            return None
        try:
            values = json.loads(raw)
        except ValueError:
            values = None
        known = {each.name for each in declared() if each.option.travels}
        if not isinstance(values, dict) or not known >= values.keys():
            raise OptionError(
                f"{ENV} is {raw!r}; expected a JSON object of {', '.join(sorted(known))}, as our "
                "launcher writes it. Unset it, and start with stateful-sglang serve"
            )
        try:
            return cls(**values)
        except OptionError as error:
            raise OptionError(f"{ENV}: {error}") from error


def declared() -> tuple[Declared, ...]:
    """Every option, in the order in which help and docs list them."""
    return _DECLARED


_DECLARED = declarations(Options)
