"""Medians and spreads of repeated measurements."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Summary(NamedTuple):
    """Some measurements of one thing."""

    median: float
    low: float
    high: float
    count: int  # type: ignore[assignment]  # shadows the method of tuples


def summarise(values: Sequence[float]) -> Summary:
    """Median, extremes and number.

    Raises:
        ValueError: There are none.
    """
    if not values:
        raise ValueError("no measurements to summarise; expected at least one")
    return Summary(statistics.median(values), min(values), max(values), len(values))


def paired_ratio(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Summary | None:
    """Ours over theirs in the rounds that have both; None where no round has.

    Ratios are taken within a round, because the machine's speed drifts between rounds.
    """
    ratios = [value / theirs[number] for number, value in ours.items() if number in theirs]
    return summarise(ratios) if ratios else None


class Interval(NamedTuple):
    """A ratio that was measured in several rounds, and where the true one probably lies."""

    ratio: float
    """Geometric mean of the rounds' ratios."""
    low: float
    high: float
    count: int  # type: ignore[assignment]  # shadows the method of tuples
    """Rounds."""


def paired_interval(
    ours: Mapping[int, float], theirs: Mapping[int, float], confidence: float = 0.95
) -> Interval | None:
    """Ours over theirs in the rounds that have both, with Student's interval of the logarithms.

    Of one round the interval is everything; None where no round has both.
    """
    # Here, because only this needs it: most benches run in an environment without the bench extra.
    from scipy.stats import t as student  # type: ignore[import-untyped]

    logs = [math.log(value / theirs[number]) for number, value in ours.items() if number in theirs]
    if not logs:
        return None
    mean = statistics.mean(logs)
    if len(logs) == 1:
        return Interval(math.exp(mean), 0.0, math.inf, 1)
    half = student.ppf((1 + confidence) / 2, len(logs) - 1) * statistics.stdev(logs)
    half = float(half) / math.sqrt(len(logs))
    return Interval(math.exp(mean), math.exp(mean - half), math.exp(mean + half), len(logs))


class Arrival(NamedTuple):
    """Something a stream sent."""

    at: float
    """Seconds on a monotonic clock."""
    tokens: int
    """Tokens generated so far."""


class Joint(NamedTuple):
    """The time in which some streams all decoded."""

    tokens_per_s: float
    """Of all streams together."""
    tokens: float
    """Decoded meanwhile by the stream that decoded fewest."""
    begin: float
    """On the arrivals' clock."""
    end: float


def joint(streams: Sequence[Sequence[Arrival]]) -> Joint:
    """Measure streams in the window in which all of them decode.

    The window is from the last stream's first token to the first stream's end; where a stream ended
    before the last one began it is empty, with no tokens. Counts at its ends are interpolated
    between arrivals: a step's tokens arrive one stream after another.
    """
    begin = max(stream[0].at for stream in streams)
    end = min(stream[-1].at for stream in streams)
    if end <= begin:
        return Joint(0.0, 0.0, begin, begin)
    decoded = [_count(s, end) - _count(s, begin) for s in streams]
    return Joint(sum(decoded) / (end - begin), min(decoded), begin, end)


def _count(stream: Sequence[Arrival], at: float) -> float:
    for before, after in itertools.pairwise(stream):
        if before.at <= at <= after.at and after.at > before.at:
            share = (at - before.at) / (after.at - before.at)
            return before.tokens + share * (after.tokens - before.tokens)
    return stream[0].tokens if at <= stream[0].at else stream[-1].tokens
