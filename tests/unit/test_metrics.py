"""Figures of sessions in Prometheus' form: names as documented, labels from closed sets."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from stateful_sglang.server.metrics import METRICS, PREFIX, PrometheusObserver
from stateful_sglang.service.observe import ENDED, OUTCOMES, PLACES, NullObserver, Observer
from stateful_sglang.session.journal.base import JournalStats

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")


def use(observer: Observer) -> None:
    """A little of everything."""
    observer.sessions("memory", 3)
    observer.sessions("journal", 40)
    observer.session_opened()
    observer.session_ended("expired")
    observer.turn_ended("committed", 2.0, 0.2, 30)
    observer.turn_ended("aborted", 9.0, None, 4)
    observer.waited(0.5)
    observer.journal_committed(5, 0.002)
    observer.journal(JournalStats(43, 4096, 2, 1, 5, "the disk is full"))
    observer.prefixes(2, 640)
    observer.recovered(1.5)


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.mark.parametrize(
    ("name", "labels", "value"),
    [
        ("sessions", {"state": "memory"}, 3),
        ("sessions", {"state": "journal"}, 40),
        ("sessions_opened_total", {}, 1),
        ("sessions_ended_total", {"state": "expired"}, 1),
        ("sessions_ended_total", {"state": "closed"}, 0),
        ("turns_total", {"outcome": "committed"}, 1),
        ("turns_total", {"outcome": "aborted"}, 1),
        ("turns_total", {"outcome": "failed"}, 0),
        ("turn_seconds_sum", {}, 2.0),
        ("turn_ttft_seconds_count", {}, 1),
        ("generated_tokens_total", {}, 34),
        ("wait_seconds_sum", {}, 0.5),
        ("journal_lag_seconds_sum", {}, 0.002),
        ("journal_commits_total", {}, 1),
        ("journal_changes_total", {}, 5),
        ("journal_bytes", {}, 4096),
        ("journal_waiting", {}, 2),
        ("journal_broken", {}, 1),
        ("published_prefixes", {}, 2),
        ("published_tokens", {}, 640),
        ("recoveries_total", {}, 1),
        ("recovery_ttft_seconds_sum", {}, 1.5),
    ],
)
def test_what_is_told_is_found_under_its_name(
    name: str, labels: dict[str, str], value: float, registry: CollectorRegistry
) -> None:
    use(PrometheusObserver(registry))
    assert registry.get_sample_value(PREFIX + name, labels) == value


def test_labels_come_from_closed_sets(registry: CollectorRegistry) -> None:
    use(PrometheusObserver(registry))
    seen = {
        (name, value)
        for family in registry.collect()
        for sample in family.samples
        for name, value in sample.labels.items()
        if name != "le"
    }
    assert seen == {
        *(("state", value) for value in (*PLACES, *ENDED)),
        *(("outcome", value) for value in OUTCOMES),
    }


@pytest.mark.parametrize("make", [NullObserver, lambda: PrometheusObserver(CollectorRegistry())])
def test_both_observers_take_every_figure(make: Callable[[], Observer]) -> None:
    use(make())
    told = {name for name in vars(Observer) if not name.startswith("_")}
    assert told <= set(dir(make()))


def test_the_docs_list_every_metric_with_its_kind_labels_and_help() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith(f"| `{PREFIX}")]
    found = [[cell.strip() for cell in re.split(r"\|", row)[1:-1]] for row in rows]
    assert found == [
        [
            f"`{PREFIX}{each.name}`",
            each.kind,
            f"`{each.label}`: {', '.join(each.values)}" if each.label else "",
            each.help,
        ]
        for each in METRICS
    ]


def test_figures_reach_a_page_that_sums_up_several_processes(tmp_path: Path) -> None:
    """As SGLang serves it: the folder named before the client's first import."""
    code = """
from stateful_sglang.server.metrics import PrometheusObserver
import sys; sys.path.insert(0, sys.argv[1])
from test_metrics import use
use(PrometheusObserver())
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
page = CollectorRegistry()
multiprocess.MultiProcessCollector(page)
print(generate_latest(page).decode())
"""
    ran = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
    )
    assert ran.returncode == 0, ran.stderr
    families = list(text_string_to_metric_families(ran.stdout))
    names = {sample.name: sample for family in families for sample in family.samples}
    assert names[f"{PREFIX}journal_bytes"].value == 4096
    assert names[f"{PREFIX}journal_bytes"].labels == {}
    assert names[f"{PREFIX}recoveries_total"].value == 1
