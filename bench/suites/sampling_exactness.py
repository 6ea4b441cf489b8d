"""Sampled text has the same distribution with drafts as without, end to end.

Many short continuations of a few prompts are sampled at temperature 1 from two servers, one that
drafts and one that does not, and compared by a two-sample chi-square test for each prompt. With
``--biased`` a third server, whose verifier is wrong on purpose, must fail the same test.

    python -m bench sampling_exactness --biased --json sampling.json
"""

from __future__ import annotations

import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.table import Table
from scipy import stats

from bench.engines import package
from bench.engines.arms import Arm, Setting
from bench.engines.ours import BIASED, launched
from bench.harness import http
from bench.harness.figures import report
from bench.harness.options import PEERS, Json, ServerArguments
from bench.harness.rounds import progress
from bench.harness.server import Server
from bench.workloads.prompts import SAMPLED

NEW_TOKENS = 4
"""The first comes from prefill; up to two of the others are drafted in one step."""
GROUP = 125
"""Samples asked for in one request."""
PARALLEL = 2
EQUAL_P, BIASED_P = 1e-3, 1e-6
CELL = 10
"""Continuations seen less often than this in both samples together are counted as one."""

Text = tuple[int, ...]


class Sample(NamedTuple):
    """Continuations from one server."""

    texts: list[Counter[Text]]
    """One counter a prompt."""
    steps: int
    """Decode steps taken."""
    tokens: int
    """Tokens that decode steps emitted."""


class Comparison(NamedTuple):
    """Two-sample chi-square tests of all prompts, joined."""

    chi2: float
    dof: int
    p: float


def draw(server: Server, samples: int, name: str) -> Sample:
    """Sample at least `samples` continuations, the same number of each prompt."""
    each = -(-samples // (len(SAMPLED) * GROUP))
    texts: list[Counter[Text]] = [Counter() for _ in SAMPLED]
    steps = tokens = 0

    def request(number: int) -> tuple[int, list[dict[str, object]]]:
        prompt = number % len(SAMPLED)
        body = {
            "text": SAMPLED[prompt],
            "sampling_params": {
                "n": GROUP,
                "temperature": 1.0,
                "max_new_tokens": NEW_TOKENS,
                "ignore_eos": True,
            },
        }
        reply = client.post("/generate", json=body).raise_for_status()
        return prompt, reply.json()

    with (
        http.client(server.url) as client,
        ThreadPoolExecutor(PARALLEL) as pool,
    ):
        requests = range(each * len(SAMPLED))
        replies = pool.map(request, requests)
        for _ in progress(requests, name):
            prompt, outputs = next(replies)
            for output in outputs:
                ids: list[int] = output["output_ids"]  # type: ignore[assignment]
                meta: dict[str, int] = output["meta_info"]  # type: ignore[assignment]
                texts[prompt][tuple(ids)] += 1
                tokens += len(ids) - 1
                steps += meta.get("spec_verify_ct", len(ids) - 1)
    return Sample(texts, steps, tokens)


def compare(a: Sample, b: Sample) -> Comparison:
    """Test that two samples come from one distribution, prompt by prompt."""
    chi2, dof = 0.0, 0
    for left, right in zip(a.texts, b.texts, strict=True):
        cells: list[list[int]] = [[], []]
        rest = [0, 0]
        for text in left.keys() | right.keys():
            if left[text] + right[text] < CELL:
                rest = [rest[0] + left[text], rest[1] + right[text]]
            else:
                cells[0].append(left[text])
                cells[1].append(right[text])
        if sum(rest):
            cells[0].append(rest[0])
            cells[1].append(rest[1])
        result = stats.chi2_contingency(cells, correction=False)
        chi2 += float(result.statistic)
        dof += int(result.dof)
    return Comparison(chi2, dof, float(stats.chi2.sf(chi2, dof)))


def arms(biased: bool, more: list[str]) -> list[Arm]:
    """The servers to sample from, each of this build."""
    found = [
        Arm("plain", "without drafts", launched("--draft", "off", *more)),
        Arm("drafts", "with drafts", launched(*more)),
    ]
    if biased:
        wrong = launched(*more, module=BIASED)
        found.append(Arm("biased", "a verifier that is wrong on purpose", wrong))
    return found


def main(
    samples: Annotated[int, typer.Option(min=1, help="From each server.")] = 20_000,
    biased: Annotated[bool, typer.Option("--biased", help="Also run the wrong verifier.")] = False,
    json: Json = None,
    server_arguments: ServerArguments = None,
) -> int:
    """Sample, compare, print; exit status 1 where a comparison came out as it must not."""
    setting = Setting(package.default_model(), PEERS, package.usable_cores())
    drawn: dict[str, Sample] = {}
    for arm in arms(biased, list(server_arguments or ())):
        with arm.start(setting) as running:
            # A bias this large shows in fewer samples.
            share = 4 if arm.name == "biased" else 1
            drawn[arm.name] = draw(running.server, samples // share, arm.name)

    table = Table("server", "samples", "tokens a step", "chi-square", "degrees", "p", "verdict")
    figures: dict[str, float] = {"samples": samples}
    right = True
    for name, sample in drawn.items():
        row = [name, str(sum(c.total() for c in sample.texts))]
        figures[f"{name}_tokens_a_step"] = sample.tokens / max(sample.steps, 1)
        row.append(f"{figures[f'{name}_tokens_a_step']:.2f}")
        if name != "plain":
            found = compare(drawn["plain"], sample)
            holds = found.p < BIASED_P if name == "biased" else found.p > EQUAL_P
            right &= holds
            figures |= {f"{name}_chi2": found.chi2, f"{name}_dof": found.dof, f"{name}_p": found.p}
            verdict = "differs from plain" if found.p <= EQUAL_P else "equals plain"
            row += [f"{found.chi2:.1f}", str(found.dof), f"{found.p:.3g}", verdict]
        table.add_row(*row)
    Console().print(table)
    report(figures, json)
    if drawn["drafts"].tokens <= drawn["drafts"].steps:
        print("no draft was accepted: the comparison says nothing", file=sys.stderr)
        return 1
    return 0 if right else 1
