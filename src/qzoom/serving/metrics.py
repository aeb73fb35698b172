"""What /metrics shows, in Prometheus's format; names follow vLLM's, with our prefix.

Each server has a registry of its own, so that two of them in one process do not mix.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from qzoom.serving.convert import PictureCache
from qzoom.serving.scheduler import Scheduler
from qzoom.types import Answer, Perception

__all__ = ["Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TENTHS = tuple(i / 10 for i in range(1, 11))
_AREAS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class Metrics:
    """Counters and histograms of one server.

    Args:
        scheduler: its gauges and prefix cache are read when somebody looks.
        pictures: the same for the decoded pictures.
    """

    def __init__(self, scheduler: Scheduler, pictures: PictureCache) -> None:
        self._registry = registry = CollectorRegistry()
        registry.register(_Live(scheduler, pictures))
        self.first_token_s = Histogram(
            "qzoom:time_to_first_token_seconds",
            "From the request's arrival to the first piece of its answer.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.request_s = Histogram(
            "qzoom:e2e_request_latency_seconds",
            "From the request's arrival to the end of its answer.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._prompt = Counter("qzoom:prompt_tokens", "Prompt tokens, visual ones included.", registry=registry)
        self._reused = Counter(
            "qzoom:prefill_reused_tokens", "Prompt tokens that the prefix cache had.", registry=registry
        )
        self._generated = Counter("qzoom:generation_tokens", "Generated tokens.", registry=registry)
        self._score = Histogram("qzoom:gate_score", "What the gate said.", buckets=_TENTHS, registry=registry)
        self._zoom = Counter("qzoom:zoom", "Answers, by whether a region was read.", ["decision"], registry=registry)
        self._area = Histogram(
            "qzoom:region_area_ratio", "A region's part of its picture.", buckets=_AREAS, registry=registry
        )
        self._rejected = Counter("qzoom:media_rejected", "Refused pictures and bodies.", ["reason"], registry=registry)
        self._ended = Counter("qzoom:requests", "Requests to the model, by HTTP status.", ["status"], registry=registry)

    def answered(self, answer: Answer) -> None:
        """Count an answer's tokens and what was decided."""
        self._prompt.inc(answer.usage.prompt_tokens)
        self._reused.inc(answer.usage.reused_tokens)
        self._generated.inc(answer.usage.completion_tokens)
        self._zoom.labels("zoom" if answer.gate.zoomed else "coarse").inc()
        self._looked(answer)

    def perceived(self, seen: Perception) -> None:
        """Count a look without an answer."""
        self._prompt.inc(seen.usage.prompt_tokens)
        self._reused.inc(seen.usage.reused_tokens)
        self._looked(seen)

    def rejected(self, reason: str) -> None:
        """Count a refused picture or body.

        Args:
            reason: one of our own codes, never a client's text.
        """
        self._rejected.labels(reason).inc()

    def ended(self, status: int) -> None:
        """Count a request's end; 499 is a client that left."""
        self._ended.labels(str(status)).inc()

    def text(self) -> bytes:
        """All of it in Prometheus's text format."""
        return generate_latest(self._registry)

    def _looked(self, seen: Answer | Perception) -> None:
        if seen.gate.score is not None:
            self._score.observe(seen.gate.score)
        for region in seen.regions:
            x0, y0, x1, y1 = region.box
            width, height = seen.image_sizes_px[region.image]
            self._area.observe((x1 - x0) * (y1 - y0) / (width * height))


class _Live:
    """What the scheduler knows at the moment of the question."""

    def __init__(self, scheduler: Scheduler, pictures: PictureCache) -> None:
        self._scheduler = scheduler
        self._pictures = pictures

    def collect(self) -> Iterator[Metric]:
        """The gauges and the caches' counters."""
        now, cache, pictures = self._scheduler, self._scheduler.cache, self._pictures
        held = cache.nbytes + cache.regions.nbytes
        yield GaugeMetricFamily("qzoom:num_requests_running", "Answers being decoded.", value=now.running)
        yield GaugeMetricFamily("qzoom:num_requests_waiting", "Requests that wait for a slot.", value=now.waiting)
        yield GaugeMetricFamily("qzoom:worker_beat_age_seconds", "Since the worker's last step.", value=now.beat_age_s)
        yield GaugeMetricFamily("qzoom:prefix_cache_bytes", "Memory of the prefix cache.", value=held)
        yield GaugeMetricFamily("qzoom:prefix_cache_entries", "Prefixes kept.", value=cache.entries)
        yield CounterMetricFamily("qzoom:prefix_cache_hits", "Prompts that began with a kept prefix.", value=cache.hits)
        yield CounterMetricFamily("qzoom:prefix_cache_misses", "Prompts that did not.", value=cache.misses)
        yield GaugeMetricFamily("qzoom:picture_cache_bytes", "Memory of the decoded pictures.", value=pictures.nbytes)
        yield GaugeMetricFamily("qzoom:picture_cache_entries", "Decoded pictures kept.", value=pictures.entries)
        yield CounterMetricFamily("qzoom:picture_cache_hits", "Pictures that were kept decoded.", value=pictures.hits)
        yield CounterMetricFamily("qzoom:picture_cache_misses", "Pictures that were not.", value=pictures.misses)
        yield CounterMetricFamily("qzoom:region_cache_hits", "Regions kept encoded.", value=cache.regions.hits)
        yield CounterMetricFamily("qzoom:region_cache_misses", "Regions that were not.", value=cache.regions.misses)
