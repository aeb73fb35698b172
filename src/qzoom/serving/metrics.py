"""What /metrics shows, in Prometheus's format; names follow vLLM's, with our prefix.

Each server has a registry of its own, so that two of them in one process do not mix.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from qzoom.images.geometry import box_area_px
from qzoom.serving.engines.base import ServingEngine
from qzoom.serving.pictures import PictureCache
from qzoom.types import Answer, Perception

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TENTHS = tuple(i / 10 for i in range(1, 11))
_AREAS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class ServerMetrics:
    """Counters and histograms of one server."""

    def __init__(self, engine: ServingEngine, pictures: PictureCache) -> None:
        self._engine = engine
        self._pictures = pictures
        self._registry = CollectorRegistry()
        self._registry.register(self)  # for what `collect` reads at each scrape
        self.first_token_s = self._histogram(
            "time_to_first_token_seconds", "From the request's arrival to the first piece of its answer.", _SECONDS
        )
        self.request_s = self._histogram(
            "e2e_request_latency_seconds", "From the request's arrival to the end of its answer.", _SECONDS
        )
        self._prompt = self._counter("prompt_tokens", "Prompt tokens, visual ones included.")
        self._reused = self._counter("prefill_reused_tokens", "Prompt tokens that the prefix cache had.")
        self._generated = self._counter("generation_tokens", "Generated tokens.")
        self._score = self._histogram("gate_score", "The gate's scores.", _TENTHS)
        self._zoom = self._counter("zoom", "Answers, by whether a region was read.", "decision")
        self._area = self._histogram("region_area_ratio", "A region's part of its picture.", _AREAS)
        self._rejected = self._counter("media_rejected", "Refused pictures and bodies.", "reason")
        self._ended = self._counter("requests", "Requests to the model, by HTTP status.", "status")

    def answered(self, answer: Answer) -> None:
        """Count an answer's tokens and whether it zoomed."""
        self._generated.inc(answer.usage.completion_tokens)
        self._zoom.labels("zoom" if answer.gate.zoomed else "coarse").inc()
        self.perceived(answer)

    def perceived(self, result: Answer | Perception) -> None:
        """Count the prompt, the gate's score and the regions of an answer or of a perception."""
        self._prompt.inc(result.usage.prompt_tokens)
        self._reused.inc(result.usage.reused_tokens)
        if result.gate.score is not None:
            self._score.observe(result.gate.score)
        for region in result.regions:
            width, height = result.image_sizes_px[region.image]
            self._area.observe(box_area_px(region.box) / (width * height))

    def rejected(self, reason: str) -> None:
        """Count a refused picture or body."""
        self._rejected.labels(reason).inc()

    def ended(self, status: int) -> None:
        """Count a request's end; 499 is a client that left."""
        self._ended.labels(str(status)).inc()

    def text(self) -> bytes:
        """All of it in Prometheus's text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """The engine's measures and the picture cache's; called at each scrape."""
        engine, pictures = self._engine, self._pictures
        for name, text, value in (
            ("num_requests_running", "Answers being decoded.", engine.running),
            ("num_requests_waiting", "Requests that wait for a slot.", engine.waiting),
            *engine.gauges(),
            ("picture_cache_bytes", "Memory of the decoded pictures.", pictures.nbytes),
            ("picture_cache_entries", "Decoded pictures kept.", pictures.entries),
        ):
            yield GaugeMetricFamily(f"qzoom:{name}", text, value=value)
        for name, text, count in (
            *engine.counters(),
            ("picture_cache_hits", "Pictures that were kept decoded.", pictures.hits),
            ("picture_cache_misses", "Pictures that were not.", pictures.misses),
        ):
            yield CounterMetricFamily(f"qzoom:{name}", text, value=count)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"qzoom:{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"qzoom:{name}", text, buckets=buckets, registry=self._registry)
