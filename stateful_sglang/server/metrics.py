"""Figures of sessions on SGLang's ``/metrics``, in Prometheus' form; docs/metrics.md lists them.

SGLang uses prometheus-client in its multiprocess mode: each process writes its figures to files of
one folder, and the API process sums them up when it is asked. The client chooses that mode when it
is first imported, by a variable that SGLang sets in its launcher, so it is imported here only when
a `PrometheusObserver` is made.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from stateful_sglang.service.observe import ENDED, OUTCOMES, PLACES, Ended, Outcome, Place
from stateful_sglang.session.journal.base import JournalStats

PREFIX = "stateful_sglang_"
_TURN_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TTFT_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_WAIT_S = (0.001, 0.01, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 600)
_LAG_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 5)


class Metric(NamedTuple):
    """One figure. Its name on the page has `PREFIX` in front."""

    name: str
    kind: str
    """``counter``, ``gauge`` or ``histogram``."""
    help: str
    label: str | None = None
    values: tuple[str, ...] = ()
    """All that the label can be: none is made of a request."""
    buckets: tuple[float, ...] = ()
    """Seconds."""


METRICS = (
    Metric("sessions", "gauge", "open sessions, by where their tokens are", "state", PLACES),
    Metric("sessions_opened_total", "counter", "sessions opened: new, forked, imported"),
    Metric("sessions_ended_total", "counter", "sessions that are no more", "state", ENDED),
    Metric("turns_total", "counter", "turns, by how they ended", "outcome", OUTCOMES),
    Metric(
        "turn_seconds",
        "histogram",
        "time of committed and ephemeral turns, from their request to their end",
        buckets=_TURN_S,
    ),
    Metric("turn_ttft_seconds", "histogram", "time to a turn's first token", buckets=_TTFT_S),
    Metric("generated_tokens_total", "counter", "tokens that turns generated"),
    Metric("wait_seconds", "histogram", "waits for other turns of a session", buckets=_WAIT_S),
    Metric(
        "journal_lag_seconds",
        "histogram",
        "from a change's arrival at the journal to its record on the disk",
        buckets=_LAG_S,
    ),
    Metric("journal_commits_total", "counter", "transactions of the journal"),
    Metric("journal_changes_total", "counter", "changes in those transactions"),
    Metric("journal_bytes", "gauge", "size of the journal's files"),
    Metric("journal_waiting", "gauge", "changes handed in and not recorded yet"),
    Metric("journal_broken", "gauge", "1 where nothing can be recorded now, else 0"),
    Metric("published_prefixes", "gauge", "prefixes that all tenants share"),
    Metric("published_tokens", "gauge", "tokens of those prefixes that are shared"),
    Metric("recoveries_total", "counter", "sessions brought back from the journal by a turn"),
    Metric(
        "recovery_ttft_seconds",
        "histogram",
        "time to the first token of such a turn",
        buckets=_TTFT_S,
    ),
)


class PrometheusObserver:
    """`stateful_sglang.service.observe.Observer` on the page. One for each process."""

    def __init__(self, registry: Any = None) -> None:
        """
        Args:
            registry: None: the process's own, which multiprocess mode reads.
        """
        import prometheus_client

        registry = registry or prometheus_client.REGISTRY
        made: dict[str, Any] = {}
        for each in METRICS:
            more: dict[str, Any] = {}
            if each.kind == "histogram":
                more["buckets"] = each.buckets
            elif each.kind == "gauge":
                # One process tells these; without a mode each value would carry a process id.
                more["multiprocess_mode"] = "mostrecent"
            factory = getattr(prometheus_client, each.kind.capitalize())
            labels = () if each.label is None else (each.label,)
            made[each.name] = factory(
                PREFIX + each.name, each.help, labels, registry=registry, **more
            )
        # Every value of a label is there from the start, at 0, and costs no look-up later.
        by_label = {
            each.name: {value: made[each.name].labels(value) for value in each.values}
            for each in METRICS
            if each.label is not None
        }
        self._made = made
        self._sessions = by_label["sessions"]
        self._ended = by_label["sessions_ended_total"]
        self._turns = by_label["turns_total"]

    def sessions(self, place: Place, count: int) -> None:
        """See `Observer`, as for all of these."""
        self._sessions[place].set(count)

    def session_opened(self) -> None:
        self._made["sessions_opened_total"].inc()

    def session_ended(self, how: Ended) -> None:
        self._ended[how].inc()

    def turn_ended(
        self, outcome: Outcome, seconds: float, ttft_s: float | None, generated_tokens: int
    ) -> None:
        self._turns[outcome].inc()
        self._made["generated_tokens_total"].inc(generated_tokens)
        if outcome in ("committed", "ephemeral"):
            self._made["turn_seconds"].observe(seconds)
        if ttft_s is not None:
            self._made["turn_ttft_seconds"].observe(ttft_s)

    def waited(self, seconds: float) -> None:
        self._made["wait_seconds"].observe(seconds)

    def journal_committed(self, changes: int, lag_s: float) -> None:
        self._made["journal_lag_seconds"].observe(lag_s)
        self._made["journal_commits_total"].inc()
        self._made["journal_changes_total"].inc(changes)

    def journal(self, stats: JournalStats) -> None:
        self._made["journal_bytes"].set(stats.bytes)
        self._made["journal_waiting"].set(stats.waiting)
        self._made["journal_broken"].set(stats.broken is not None)

    def prefixes(self, count: int, tokens: int) -> None:
        self._made["published_prefixes"].set(count)
        self._made["published_tokens"].set(tokens)

    def recovered(self, ttft_s: float) -> None:
        self._made["recoveries_total"].inc()
        self._made["recovery_ttft_seconds"].observe(ttft_s)
