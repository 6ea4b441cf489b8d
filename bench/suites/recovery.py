"""What a kill costs: turns lost, done twice or answered otherwise afterwards, and time.

Three parts. A real server is killed (`kill -9`) at random moments, its API process, scheduler and
detokenizer in turn, while clients play sessions of twenty turns and ask again under their keys
whatever they got no answer to; the last kills are under ``--restart on-crash``, the supervisor's
own among them. In float32, where recomputing a transcript gives the tokens that decoding it gave,
each turn is held against that of a twin which nobody interrupted. The model is the embedded one's
first layers, so that starts are short. Then the service and the journal alone are killed at every
named point of a change, and their disk made to fail (`tests/unit/recovery_runs.py`). Last a session
of 20,000 tokens, with the whole model: from asking for its next turn after a restart to the first
token, the time to recompute the session.

    python -m bench.suites.recovery --kills 40 --in-process 2000 --json recovery.json
"""

from __future__ import annotations

import concurrent.futures
import json as jsonlib
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from bench import corpus
from bench.engines import package
from bench.engines.insisting import TURNS, Played, Player, Tally, script
from bench.engines.operations import Operations
from bench.harness import http
from bench.harness.command import run
from bench.harness.figures import Figure, report, write
from bench.harness.lives import Lives
from bench.harness.options import Json, Seed, ServerArguments
from bench.harness.rounds import Left, say
from bench.workloads.exported import Pieces, session

ROOT = Path(__file__).parents[2]
SCRIPTS, CLIENTS = 6, 2
LONG, LONG_CONTEXT = 20_000, 24_576
SERVERS = 2
"""At once: most of a start is one thread's work."""
_ARGUMENTS = (
    *("--context-length", "4096", "--max-total-tokens", "12000", "--keys", "off"),
    *("--dtype", "float32"),
)


def killed_servers(
    kills: int, minutes: float, seed: int, folder: Path, arguments: Sequence[str]
) -> tuple[dict[str, Figure], list[str]]:
    """Kill real servers so often while sessions are played, or for so long if that is shorter."""
    until = time.monotonic() + 60 * minutes
    shares = [len(range(number, kills, SERVERS)) for number in range(min(SERVERS, kills))]
    texts, left = corpus.excerpts(40), Left(kills)

    def one(number: int, share: int) -> Killed:
        journal = folder / f"killed-{number}.sqlite3"
        rng = random.Random(f"{seed} {number}")
        return killed_server(share, until, rng, texts, journal, left, arguments)

    with concurrent.futures.ThreadPoolExecutor(SERVERS) as pool:
        done = [each.result() for each in [pool.submit(one, *each) for each in enumerate(shares)]]
    figures: Counter[str] = Counter()
    for each in done:
        figures.update(each.figures)
    restarts = [seconds for each in done for seconds in each.restarts]
    names: dict[str, Figure] = {"kills": len(restarts), **figures}
    names["restart_s"] = round(statistics.median(restarts), 1)
    return names, [note for each in done for note in each.notes]


class Killed(NamedTuple):
    """What came of a server that was killed."""

    figures: Mapping[str, int]
    restarts: Sequence[float]
    """Seconds that each took."""
    notes: Sequence[str]


def killed_server(
    kills: int,
    until: float,
    rng: random.Random,
    texts: Sequence[str],
    journal: Path,
    left: Left,
    arguments: Sequence[str],
) -> Killed:
    """Kill a real server so often while sessions are played."""
    tally, played, restarts = Tally(), list[Played](), list[float]()
    over = threading.Event()
    seed = rng.randrange(1 << 30)
    # Threads of two servers on two cores would wait for each other.
    with Lives(journal, (*_ARGUMENTS, *arguments), OMP_NUM_THREADS="1") as server:
        server.start()

        def fresh(number: int, name: str) -> Played:
            return Played(number, script(texts, seed + number), name)

        def play_on(client: int) -> None:
            player = Player(server.url, tally, server.wait_healthy)
            count = 0
            while not over.is_set():
                number = (client + count) % SCRIPTS
                played.append(fresh(number, f"{client}-{count}"))
                player.play(played[-1], twins[number])
                count += 1
            player.close()

        twin_tally = Tally()
        player = Player(server.url, twin_tally, server.wait_healthy)
        twins = [player.play(fresh(number, f"twin-{number}")) for number in range(SCRIPTS)]
        assert not twin_tally.interrupted, "the twins were interrupted"
        say(f"{len(twins)} twins of {len(twins[0].answers)} turns")
        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
            playing = [pool.submit(play_on, client) for client in range(CLIENTS)]
            try:
                for number in range(kills):
                    moment = time.monotonic() + rng.uniform(0.2, 4)
                    while time.monotonic() < moment and not any(each.done() for each in playing):
                        time.sleep(0.05)
                    which = server.processes[number % len(server.processes)]
                    server.kill(which)
                    supervised = number + 1 >= kills - kills // 4
                    restarts.append(server.revive(supervised=supervised))
                    answered = sum(len(each.answers) for each in played)
                    say(
                        f"kill {left.one_more()}: {which}, back in {restarts[-1]:.0f} s; "
                        f"{answered} turns, {tally.interrupted} interrupted"
                    )
                    if any(each.done() for each in playing) or time.monotonic() > until:
                        break
            finally:
                over.set()
            for each in playing:
                each.result()
        for each in (*twins, *played):
            player.look(each)
        player.close()
    tally.lost |= twin_tally.lost
    figures = {
        "turns_published": sum(len(each.answers) for each in (*twins, *played)),
        "turns_interrupted": tally.interrupted,
        "turns_lost": len(tally.lost),
        "turns_duplicated": tally.duplicated,
        "wrong_after_recovery": tally.wrong_after_recovery,
        "wrong_uninterrupted": tally.wrong - tally.wrong_after_recovery,
        "failed_starts": len(server.failed_starts),
    }
    return Killed(figures, restarts, [*tally.notes, *twin_tally.notes, *server.failed_starts])


def long_session(rounds: int, folder: Path, arguments: Sequence[str]) -> list[float]:
    """Seconds to the first token of the next turn of a long session, after each of some kills."""
    sizes = ("--context-length", str(LONG_CONTEXT), "--max-total-tokens", "40000", "--keys", "off")
    # The embedded model is made for 8,192: what it says beyond is of no matter here.
    env = {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}
    pieces = Pieces(package.default_model() / "tokenizer.json", LONG // TURNS)
    times = []
    with Lives(folder / "long.sqlite3", (*sizes, *arguments), **env) as server:
        server.start()
        with http.client(server.url, timeout_s=1200) as client:
            sessions = Operations(client)
            empty = sessions.export(sessions.open().reply["id"]).reply
            # Taken in, so that only what comes after a kill is computed.
            long = sessions.take_in(session(empty, pieces, 0, TURNS, {})).reply["id"]
            for _ in range(rounds):
                server.kill("api")
                server.revive()
                turn = sessions.append(long, 1, messages=[{"role": "user", "content": "And now?"}])
                if turn.computed < LONG:
                    raise RuntimeError(f"only {turn.computed} tokens were computed after a restart")
                times.append(turn.ttft_s)
                say(f"a session of {LONG} tokens: first token after {times[-1]:.2f} s")
    return times


def points(kills: int, disk_runs: int, seed: int, folder: Path) -> dict[str, Any]:
    """What `tests/unit/recovery_runs.py` finds: its figures, points and notes."""
    program = ROOT / "tests" / "unit" / "recovery_runs.py"
    file = folder / "points.json"
    wanted = ("--kills", str(kills), "--disk-runs", str(disk_runs), "--seed", str(seed))
    path = os.pathsep.join([str(ROOT), str(program.parent)])
    subprocess.run(
        [sys.executable, str(program), *wanted, "--json", str(file)],
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    told: dict[str, Any] = jsonlib.loads(file.read_text())
    return told


def main(
    kills: Annotated[int, typer.Option(min=0, help="Of the real server.")] = 40,
    minutes: Annotated[
        float, typer.Option(help="Longest time for these; figures tell how many there were.")
    ] = 60.0,
    layers: Annotated[
        int, typer.Option(min=1, max=30, help="Of the embedded model's, while it is killed.")
    ] = 4,
    in_process: Annotated[
        int, typer.Option(min=0, help="Kills of service and journal at named points.")
    ] = 2000,
    disk_runs: Annotated[int, typer.Option(min=0, help="Runs with a disk that fails.")] = 50,
    long_rounds: Annotated[int, typer.Option(min=0, help="Kills with a long session.")] = 3,
    seed: Seed = 1,
    json: Json = None,
    server_arguments: ServerArguments = None,
) -> int:
    """Run all parts; exit status 1 where anything was lost, doubled or wrong."""
    seed, more = seed or 1, server_arguments or ()
    figures: dict[str, Figure] = {}
    details: dict[str, Any] = {"notes": []}
    cut = ("--json-model-override-args", jsonlib.dumps({"num_hidden_layers": layers}))
    with (
        tempfile.TemporaryDirectory() as place,
        concurrent.futures.ThreadPoolExecutor(1) as beside,
    ):
        folder = Path(place)
        # Nothing of these two is compared with anything else: they may run at the same time.
        pointed = beside.submit(points, in_process, disk_runs, seed, folder)
        if kills:
            found, notes = killed_servers(kills, minutes, seed, folder, (*cut, *more))
            figures |= found
            details["notes"] += notes
            write(figures, json, **details)
        told = pointed.result()
        figures |= told["figures"]
        details["points"] = told["points"]
        details["notes"] += told["notes"]
        write(figures, json, **details)
        if long_rounds:
            times = long_session(long_rounds, folder, more)
            figures["recover_ttft_s_20k"] = round(statistics.median(times), 3)
            details["recover_ttft_s"] = times
    report(figures, json, **details)
    for note in details["notes"][:20]:
        print(note)
    bad = ("lost", "duplicated", "wrong", "refused_found", "unserved")
    return int(any(figures[name] for name in figures if name.endswith(bad) or "wrong" in name))


if __name__ == "__main__":
    run(main)
