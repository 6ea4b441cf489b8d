"""An arm: an engine in one setting, as a bench compares it with others.

What cannot be started says why; a bench reports it and leaves it in.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from bench.engines.dialects import Dialect, SGLangDialect
from bench.engines.load import Load
from bench.harness.limits import ModelCost, model_cost
from bench.harness.server import START_TIMEOUT_S, Server, serve_command

POOL_TOKENS = 131_072
"""KV that every arm gets: 16 requests of 8,192 tokens."""
CONTEXT = 8192
REQUESTS = 16


class ArmUnavailableError(RuntimeError):
    """An arm cannot run here; the message says why and what to do."""


@dataclass(frozen=True)
class Setting:
    """What all arms of a run share."""

    model: Path
    """Checkpoint folder."""
    peers: Path
    """Folder that scripts/peers filled."""
    threads: int
    """Compute threads of every arm."""

    def peer(self, name: str) -> dict[str, str]:
        """What scripts/peers says of a peer.

        Raises:
            ArmUnavailableError: It was not set up.
        """
        listing = self.peers / "peers.json"
        found = json.loads(listing.read_text()) if listing.exists() else {}
        if name not in found:
            raise ArmUnavailableError(
                f"{name} is not in {self.peers}: run scripts/peers {name}, or name the folder that "
                "holds it with --peers"
            )
        peer: dict[str, str] = found[name]
        return peer

    def cost(self) -> ModelCost:
        """Of the checkpoint, in bf16."""
        return model_cost(json.loads((self.model / "config.json").read_text()))


@dataclass(frozen=True)
class Command:
    """How a server is started; its port is added."""

    words: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None
    timeout_s: float = START_TIMEOUT_S


class Running(NamedTuple):
    """A started arm."""

    server: Server
    load: Load


@dataclass(frozen=True)
class Arm:
    """An engine in one setting."""

    name: str
    what: str
    """For people: engine, version where it is not ours, format of the weights."""
    command: Callable[[Setting], Command]
    """Raises `ArmUnavailableError` where it cannot run."""
    dialect: Callable[[Setting], Dialect] = lambda _: SGLangDialect()
    cost: Callable[[Setting], ModelCost] = Setting.cost
    """What its model costs: quantised weights are fewer bytes."""

    @contextlib.contextmanager
    def start(self, setting: Setting) -> Iterator[Running]:
        """Run its server while the context lasts.

        Raises:
            ArmUnavailableError: It cannot run here.
            ServerDiedError: It did not become healthy.
        """
        how = self.command(setting)
        started = serve_command(*how.words, env=how.env, folder=how.folder, timeout_s=how.timeout_s)
        with started as server:
            yield Running(server, Load(server.url, self.dialect(setting)))


def words(arguments: Mapping[str, str]) -> tuple[str, ...]:
    """Options and their values, as on a command line."""
    return tuple(word for pair in arguments.items() for word in pair)
