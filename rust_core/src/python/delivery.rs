//! SseTemplate, Delta, SseWriter, Outbox. See `_core.pyi`.
//!
//! No Python code runs while the outbox is locked: it could hand the GIL to a thread that waits for
//! the same lock.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::outbox::{Delta, Logprob, Outbox};
use crate::request::{FinishReason, StopReason};
use crate::stream::SseTemplate;

pub(super) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<PySseTemplate>()?;
    m.add_class::<PyDelta>()?;
    m.add_class::<PySseWriter>()?;
    m.add_class::<PyOutbox>()
}

#[pyclass(frozen, name = "SseTemplate", module = "octavo._core")]
pub(super) struct PySseTemplate {
    pub(super) inner: Arc<SseTemplate>,
}

#[pymethods]
impl PySseTemplate {
    #[new]
    #[pyo3(
        signature = (parts, first=Vec::new(), last=Vec::new()),
        text_signature = "(parts, first=b'', last=b'')"
    )]
    fn new(parts: (Vec<u8>, Vec<u8>, Vec<u8>, Vec<u8>), first: Vec<u8>, last: Vec<u8>) -> Self {
        let (a, b, c, d) = parts;
        let inner = SseTemplate {
            parts: [a, b, c, d].map(Vec::into_boxed_slice),
            first: first.into(),
            last: last.into(),
        };
        Self {
            inner: Arc::new(inner),
        }
    }
}

#[pyclass(frozen, name = "Delta", module = "octavo._core")]
pub(super) struct PyDelta {
    inner: Delta,
}

#[pymethods]
impl PyDelta {
    #[getter]
    fn request_id(&self) -> u64 {
        self.inner.request_id
    }

    #[getter]
    fn sse<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyBytes>> {
        self.inner
            .sse
            .as_deref()
            .map(|bytes| PyBytes::new(py, bytes))
    }

    #[getter]
    fn text(&self) -> &str {
        &self.inner.text
    }

    #[getter]
    fn token_ids(&self) -> &[u32] {
        &self.inner.token_ids
    }

    #[getter]
    fn logprobs(&self) -> Option<&[Vec<Logprob>]> {
        self.inner.logprobs.as_deref()
    }

    #[getter]
    fn finish_reason(&self) -> Option<&'static str> {
        self.inner.finish_reason.map(FinishReason::as_str)
    }

    #[getter]
    fn stop_reason<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        Ok(match &self.inner.stop_reason {
            None => None,
            Some(StopReason::Token(id)) => Some(id.into_pyobject(py)?.into_any()),
            Some(StopReason::Text(text)) => Some(text.as_ref().into_pyobject(py)?.into_any()),
        })
    }

    #[getter]
    fn cumulative_logprob(&self) -> Option<f64> {
        self.inner.cumulative_logprob
    }

    #[getter]
    fn num_prompt_tokens(&self) -> u32 {
        self.inner.num_prompt_tokens
    }

    #[getter]
    fn num_cached_tokens(&self) -> u32 {
        self.inner.num_cached_tokens
    }

    #[getter]
    fn num_output_tokens(&self) -> u32 {
        self.inner.num_output_tokens
    }

    #[getter]
    fn queue_s(&self) -> Option<f64> {
        self.inner.queue_s
    }

    #[getter]
    fn prefill_s(&self) -> Option<f64> {
        self.inner.prefill_s
    }

    #[getter]
    fn decode_s(&self) -> Option<f64> {
        self.inner.decode_s
    }

    fn __repr__(&self) -> String {
        format!(
            "Delta(request_id={}, text={:?}, num_output_tokens={}, finish_reason={:?})",
            self.inner.request_id,
            self.inner.text,
            self.inner.num_output_tokens,
            self.inner.finish_reason.map(FinishReason::as_str)
        )
    }
}

/// A chunk's frame in HTTP/1.1's chunked coding: its size in hexadecimal, and line ends.
const MAX_FRAME: usize = 2 * size_of::<usize>() + 4;

// The GIL orders all access; atomics only because the class is shared.
#[pyclass(frozen, name = "SseWriter", module = "octavo._core")]
pub(super) struct PySseWriter {
    write: Py<PyAny>,
    is_armed: AtomicBool,
    is_paused: AtomicBool,
    last_write_bits: AtomicU64,
}

impl PySseWriter {
    /// Frames and writes the bytes. On an error nothing was written, and nothing more will be.
    fn write(&self, py: Python<'_>, sse: &[u8], now_s: f64) -> PyResult<()> {
        let mut head = [0; MAX_FRAME];
        let mut rest = &mut head[..];
        let written = write!(rest, "{:x}\r\n", sse.len());
        debug_assert!(written.is_ok(), "a usize fits");
        let num_head = MAX_FRAME - rest.len();
        let chunk = PyBytes::new_with(py, num_head + sse.len() + 2, |chunk| {
            chunk[..num_head].copy_from_slice(&head[..num_head]);
            chunk[num_head..][..sse.len()].copy_from_slice(sse);
            chunk[num_head + sse.len()..].copy_from_slice(b"\r\n");
            Ok(())
        })?;
        self.write
            .call1(py, (chunk,))
            .inspect_err(|_| self.is_paused.store(true, Ordering::Relaxed))?;
        self.last_write_bits
            .store(now_s.to_bits(), Ordering::Relaxed);
        Ok(())
    }
}

#[pymethods]
impl PySseWriter {
    #[new]
    fn new(write: Py<PyAny>) -> Self {
        Self {
            write,
            is_armed: AtomicBool::new(false),
            is_paused: AtomicBool::new(false),
            last_write_bits: AtomicU64::new(0f64.to_bits()),
        }
    }

    /// `write` is a transport's, whose protocol knows this writer.
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.write)
    }

    #[getter]
    fn is_armed(&self) -> bool {
        self.is_armed.load(Ordering::Relaxed)
    }

    #[setter]
    fn set_is_armed(&self, value: bool) {
        self.is_armed.store(value, Ordering::Relaxed);
    }

    #[getter]
    fn is_paused(&self) -> bool {
        self.is_paused.load(Ordering::Relaxed)
    }

    #[setter]
    fn set_is_paused(&self, value: bool) {
        self.is_paused.store(value, Ordering::Relaxed);
    }

    #[getter]
    fn last_write_s(&self) -> f64 {
        f64::from_bits(self.last_write_bits.load(Ordering::Relaxed))
    }
}

#[pyclass(frozen, name = "Outbox", module = "octavo._core")]
pub(super) struct PyOutbox {
    pub(super) inner: Arc<Outbox>,
}

#[pymethods]
impl PyOutbox {
    #[pyo3(signature = (writers=None, now_s=0.0))]
    fn drain(
        &self,
        py: Python<'_>,
        writers: Option<&Bound<'_, PyDict>>,
        now_s: f64,
    ) -> PyResult<Vec<PyDelta>> {
        let deltas = self.inner.drain();
        let Some(writers) = writers.filter(|writers| !writers.is_empty()) else {
            return Ok(deltas.into_iter().map(|inner| PyDelta { inner }).collect());
        };
        let mut rest = Vec::new();
        for inner in deltas {
            if !write_at_once(py, writers, &inner, now_s)? {
                rest.push(PyDelta { inner });
            }
        }
        Ok(rest)
    }
}

/// Whether the delta was the middle of a stream whose writer takes it, and has been written.
fn write_at_once(
    py: Python<'_>,
    writers: &Bound<'_, PyDict>,
    delta: &Delta,
    now_s: f64,
) -> PyResult<bool> {
    let (Some(sse), None) = (&delta.sse, delta.finish_reason) else {
        return Ok(false);
    };
    let Some(writer) = writers.get_item(delta.request_id)? else {
        return Ok(false);
    };
    let writer = writer.cast::<PySseWriter>()?.get();
    // An empty part would end a chunked answer.
    if !writer.is_armed() || writer.is_paused() || sse.is_empty() {
        return Ok(false);
    }
    // What could not be written goes the long way, where its error has a place to surface.
    Ok(writer.write(py, sse, now_s).is_ok())
}
