"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

KIND = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """taken: how many requests are being served now."""

    def __init__(self, taken: Callable[[], int]) -> None:
        self.registry = own = CollectorRegistry()
        ProcessCollector(registry=own)
        self.requests = Counter(
            "codetr_requests", "Requests for detections, by status of HTTP", ["status"], registry=own
        )
        self.seconds = Histogram(
            "codetr_request_seconds", "From the head of a request to its answer", buckets=_SECONDS, registry=own
        )
        self.images = Histogram(
            "codetr_batch_images", "Images of a batch", buckets=(1, 2, 4, 8, 16, 32, 64), registry=own
        )
        self.model_seconds = Histogram("codetr_batch_seconds", "A batch in the model", buckets=_SECONDS, registry=own)
        Gauge("codetr_requests_served", "Requests that are read, wait or are computed", registry=own).set_function(
            taken
        )

    def text(self) -> bytes:
        return generate_latest(self.registry)
