//! Metrics. See `_core.pyi`.

use std::sync::Arc;

use octavo_core::engine::metrics::Metrics;
use octavo_core::scheduler::request::FinishReason;
use pyo3::prelude::*;
use pyo3::types::PyDict;

#[pyclass(frozen, name = "Metrics", module = "octavo._core")]
pub(crate) struct PyMetrics {
    pub(crate) inner: Arc<Metrics>,
}

#[pymethods]
impl PyMetrics {
    fn snapshot<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let data = self.inner.snapshot();
        let dict = PyDict::new(py);
        for (name, value) in data.counters() {
            dict.set_item(name, value)?;
        }
        for (name, value) in data.gauges() {
            dict.set_item(name, value)?;
        }
        let by_reason = PyDict::new(py);
        for (reason, count) in FinishReason::ALL.iter().zip(data.request_success) {
            by_reason.set_item(reason.as_str(), count)?;
        }
        dict.set_item("request_success", by_reason)?;
        for (name, histogram) in data.histograms() {
            let entry = PyDict::new(py);
            entry.set_item("buckets", histogram.cumulative().collect::<Vec<_>>())?;
            entry.set_item("sum", histogram.sum())?;
            entry.set_item("count", histogram.count())?;
            dict.set_item(name, entry)?;
        }
        Ok(dict)
    }

    fn settled(&self) -> (u64, u64) {
        self.inner.settled()
    }
}
