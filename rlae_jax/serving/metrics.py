"""What a server tells Prometheus: what it counts itself, and at each look what the engine says of its slots."""

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rlae_jax.serving.engine import Engine

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """A registry of its own, so that several servers may live in one process."""

    def __init__(self, engine: Engine, members: Sequence[str]):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "rlae_requests", "Answered HTTP requests.", ["endpoint", "status"], registry=self.registry
        )
        self.first_token = Histogram(
            "rlae_time_to_first_token_seconds",
            "From a request's body to its first token.",
            buckets=_FIRST,
            registry=self.registry,
        )
        self.per_token = Histogram(
            "rlae_time_per_token_seconds",
            "Between a sample's tokens, as a mean over those that came after its first ones.",
            buckets=_PER_TOKEN,
            registry=self.registry,
        )
        self.registry.register(_OfEngine(engine, members))

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)


class _OfEngine(Collector):
    """The engine's own figures, read when they are asked for."""

    def __init__(self, engine: Engine, members: Sequence[str]):
        self.engine, self.members = engine, members

    def describe(self) -> list[Metric]:
        return []  # otherwise registering would collect

    def collect(self) -> Iterator[Metric]:
        stats = self.engine.stats()
        yield GaugeMetricFamily("rlae_slots", "Slots that there are.", self.engine.slots)
        yield GaugeMetricFamily("rlae_slots_in_use", "Slots in which an answer is written.", stats.slots_in_use)
        yield GaugeMetricFamily("rlae_queue", "Requests that wait for a slot.", stats.waiting)
        yield CounterMetricFamily("rlae_tokens_written", "Tokens written.", stats.tokens)
        yield CounterMetricFamily(
            "rlae_prompt_tokens", "Prompt tokens, those that were cached included.", stats.prompt_tokens
        )
        yield CounterMetricFamily(
            "rlae_prompt_tokens_cached", "Prompt tokens that need not be read.", stats.cached_tokens
        )
        yield CounterMetricFamily("rlae_prefix_hits", "Prompts whose beginning was cached.", stats.prefix_hits)
        yield CounterMetricFamily("rlae_prefix_misses", "Prompts of which nothing was cached.", stats.prefix_misses)
        yield CounterMetricFamily("rlae_compiles", "Programs compiled after warm-up.", stats.compiles)
        finished = CounterMetricFamily("rlae_finished", "Answers by the reason of their end.", labels=["reason"])
        for reason, count in stats.finished.items():
            finished.add_metric([reason], count)
        yield finished
        weights = GaugeMetricFamily("rlae_weight_mean", "Mean weight over all written tokens.", labels=["member"])
        for name, weight in zip(self.members, stats.weights, strict=True):
            weights.add_metric([name], float(weight))
        yield weights
