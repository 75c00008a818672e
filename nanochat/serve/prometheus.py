"""The server's metrics for Prometheus: requests, tokens, latencies, and the counters of the engines."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from nanochat.serve.worker import Pool

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
GAUGES = ("active", "waiting")  # counters of an engine that also fall


class Metrics:
    """With a registry of its own, so that several applications can live in one process."""

    def __init__(self, pool: Pool):
        self._registry = CollectorRegistry()
        self._registry.register(_Engines(pool))
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
        self.disconnects = Counter("disconnects", "Clients that disconnected before their answer was complete", **new)

    def observe_request(self, route: str, status: int, seconds: float) -> None:
        self.requests.labels(route, status).inc()
        self.request_seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


class _Engines:
    """Reads the engines' own counters at each scrape."""

    def __init__(self, pool: Pool):
        self._pool = pool

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("nanochat_worker_up", "1 if the engine accepts work", labels=["worker"])
        replies = GaugeMetricFamily("nanochat_engine_replies", "Replies in the engine", labels=["worker", "state"])
        counts = CounterMetricFamily("nanochat_engine", "Counters of the engine", labels=["worker", "count"])
        for number, worker in enumerate(self._pool.workers):
            up.add_metric([str(number)], float(worker.state == "ready"))
            for name, value in worker.stats.items():
                if name in GAUGES:
                    replies.add_metric([str(number), name], value)
                else:
                    counts.add_metric([str(number), name], value)
        return up, replies, counts
