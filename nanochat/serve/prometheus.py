"""The server's figures for Prometheus: requests, tokens, waiting times, and what the engines count."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
GAUGES = ("active", "waiting")  # counters of an engine that go down again

WorkerStats = Callable[[], list[tuple[str, dict[str, int]]]]  # state and engine counters of each worker


class Metrics:
    """A registry of its own, so that several applications can live in one process."""

    def __init__(self, workers: WorkerStats):
        self._registry = CollectorRegistry()
        self._registry.register(_Engines(workers))
        new = {"registry": self._registry, "namespace": "nanochat"}
        self.requests = Counter("requests", "Requests answered", ["route", "status"], **new)
        self.request_seconds = Histogram(
            "request_seconds", "From a request to the end of its answer", ["route"], buckets=_SECONDS, **new
        )
        self.first_token_seconds = Histogram(
            "first_token_seconds", "From a request to its first token", buckets=_SECONDS, **new
        )
        self.token_seconds = Histogram(
            "token_seconds", "Mean time between the tokens of a reply", buckets=_TOKEN_SECONDS, **new
        )
        self.tokens = Counter("tokens", "Tokens by kind; cached ones are part of the prompts", ["kind"], **new)
        self.disconnects = Counter("disconnects", "Clients that left before their answer was complete", **new)

    def observe_request(self, route: str, status: int, seconds: float) -> None:
        self.requests.labels(route, status).inc()
        self.request_seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


class _Engines:
    """Reads the engines' own counters when it is asked."""

    def __init__(self, workers: WorkerStats):
        self._workers = workers

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("nanochat_worker_up", "1 where the engine can take work", labels=["worker"])
        replies = GaugeMetricFamily("nanochat_engine_replies", "Replies in the engine", labels=["worker", "state"])
        counts = CounterMetricFamily("nanochat_engine", "What the engine counts", labels=["worker", "count"])
        for number, (state, stats) in enumerate(self._workers()):
            up.add_metric([str(number)], float(state == "ready"))
            for name, value in stats.items():
                if name in GAUGES:
                    replies.add_metric([str(number), name], value)
                else:
                    counts.add_metric([str(number), name], value)
        return up, replies, counts
