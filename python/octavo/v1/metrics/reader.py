"""The values of ``LLM.get_metrics``, where vLLM has them."""

from octavo.metrics_reader import Counter, Gauge, Histogram, Metric, Vector

__all__ = ["Counter", "Gauge", "Histogram", "Metric", "Vector"]
