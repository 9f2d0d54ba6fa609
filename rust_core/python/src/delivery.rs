//! SseTemplate, Delta, SseWriter, Outbox. See `_core.pyi`.
//!
//! No Python code runs while the outbox is locked: it could hand the GIL to a thread that waits for
//! the same lock.

use std::io::Write;
use std::mem::ManuallyDrop;
use std::net::TcpStream;
use std::os::fd::{FromRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use octavo_core::engine::outbox::{Delta, Logprob, Outbox};
use octavo_core::scheduler::request::{FinishReason, StopReason};
use octavo_core::text::sse::SseTemplate;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::channels::{PieceTuple, piece_tuple};

pub(crate) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<PySseTemplate>()?;
    m.add_class::<PyDelta>()?;
    m.add_class::<PySseWriter>()?;
    m.add_class::<PyOutbox>()
}

#[pyclass(frozen, name = "SseTemplate", module = "octavo._core")]
pub(crate) struct PySseTemplate {
    pub(crate) inner: Arc<SseTemplate>,
}

#[pymethods]
impl PySseTemplate {
    #[new]
    #[pyo3(
        signature = (before, after, first=Vec::new(), reasoning=None),
        text_signature = "(before, after, first=b'', reasoning=None)"
    )]
    fn new(
        before: Vec<u8>,
        after: Vec<u8>,
        first: Vec<u8>,
        reasoning: Option<Vec<Vec<u8>>>,
    ) -> Self {
        let inner = SseTemplate {
            around_text: [before.into(), after.into()],
            around_reasoning: reasoning.map(|parts| parts.into_iter().map(Into::into).collect()),
            first: first.into(),
        };
        Self {
            inner: Arc::new(inner),
        }
    }
}

#[pyclass(frozen, name = "Delta", module = "octavo._core")]
pub(crate) struct PyDelta {
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
    fn pieces(&self) -> Option<Vec<PieceTuple<'_>>> {
        Some(self.inner.pieces()?.iter().map(piece_tuple).collect())
    }

    #[getter]
    fn num_reasoning_tokens(&self) -> u32 {
        let news = self.inner.channels.as_ref();
        news.map_or(0, |news| news.num_reasoning_tokens)
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

    #[getter]
    fn extra(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        let extra = self.inner.extra.as_ref()?;
        Some(extra.get::<Py<PyAny>>()?.clone_ref(py))
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

// The GIL orders all access; atomics only because the class is shared.
#[pyclass(frozen, name = "SseWriter", module = "octavo._core")]
pub(crate) struct PySseWriter {
    write: Py<PyAny>,
    /// Number of bytes `write` still holds, and the socket they go to.
    direct: Option<(Py<PyAny>, RawFd)>,
    is_armed: AtomicBool,
    is_paused: AtomicBool,
    last_write_bits: AtomicU64,
}

impl PySseWriter {
    /// The socket, where nothing that came before waits in front of it.
    fn idle_socket(&self, py: Python<'_>) -> Option<RawFd> {
        let (num_buffered, fd) = self.direct.as_ref()?;
        let num_bytes: usize = num_buffered.call0(py).ok()?.extract(py).ok()?;
        (num_bytes == 0).then_some(*fd)
    }

    /// Returns true if the transport took them. If not, it takes nothing more.
    fn write(&self, py: Python<'_>, bytes: &[u8]) -> bool {
        let is_taken = self.write.call1(py, (PyBytes::new(py, bytes),)).is_ok();
        if !is_taken {
            self.is_paused.store(true, Ordering::Relaxed);
        }
        is_taken
    }
}

/// The chunks of one drain, framed one after the other.
#[derive(Default)]
struct Chunks {
    bytes: Vec<u8>,
    list: Vec<Chunk>,
}

struct Chunk {
    delta: Delta,
    writer: Py<PySseWriter>,
    /// The socket, where it may be sent at once.
    socket: Option<RawFd>,
    /// One past its last byte.
    end: usize,
    /// Number of bytes the socket took.
    num_sent: usize,
}

impl Chunks {
    /// Adds one in the frame of HTTP/1.1's chunked coding: its size in hexadecimal, and line ends.
    fn push(&mut self, delta: Delta, writer: Py<PySseWriter>, socket: Option<RawFd>) {
        let sse = delta.sse.as_deref().unwrap_or_default();
        let written = write!(self.bytes, "{:x}\r\n", sse.len());
        debug_assert!(written.is_ok(), "a vector takes everything");
        self.bytes.extend_from_slice(sse);
        self.bytes.extend_from_slice(b"\r\n");
        self.list.push(Chunk {
            delta,
            writer,
            socket,
            end: self.bytes.len(),
            num_sent: 0,
        });
    }

    /// Sends what idle sockets take without waiting.
    fn send(&mut self) {
        let mut start = 0;
        let mut busy: Vec<RawFd> = Vec::new();
        for chunk in &mut self.list {
            let bytes = &self.bytes[start..chunk.end];
            start = chunk.end;
            let Some(fd) = chunk.socket.filter(|fd| !busy.contains(fd)) else {
                continue;
            };
            // SAFETY: the descriptor is open: its transport, which owns it, pauses the writer before
            // it closes, on the thread that drains. It is not closed here, and a stream's `write` is
            // a plain send to whatever socket it is, which does not block: the transport's do not.
            let stream = ManuallyDrop::new(unsafe { TcpStream::from_raw_fd(fd) });
            // An error is the transport's to meet, when it is handed the chunk.
            chunk.num_sent = (&*stream).write(bytes).unwrap_or(0);
            if chunk.num_sent < bytes.len() {
                busy.push(fd);
            }
        }
    }

    /// Sends all of it: what a socket does not take at once goes through its transport. Returns
    /// what neither took: it goes the long way, where its error has a place to surface.
    fn deliver(mut self, py: Python<'_>, now_s: f64) -> Vec<Delta> {
        if self.list.iter().any(|chunk| chunk.socket.is_some()) {
            // Other threads may run meanwhile: a send takes microseconds, and there are hundreds.
            py.detach(|| self.send());
        }
        let mut start = 0;
        let mut failed = Vec::new();
        for chunk in self.list {
            let writer = chunk.writer.get();
            let rest = &self.bytes[start + chunk.num_sent..chunk.end];
            start = chunk.end;
            if rest.is_empty() || writer.write(py, rest) {
                let now_bits = now_s.to_bits();
                writer.last_write_bits.store(now_bits, Ordering::Relaxed);
            } else if chunk.num_sent == 0 {
                failed.push(chunk.delta);
            }
        }
        failed
    }
}

#[pymethods]
impl PySseWriter {
    #[new]
    #[pyo3(signature = (write, num_buffered=None, fd=None))]
    fn new(write: Py<PyAny>, num_buffered: Option<Py<PyAny>>, fd: Option<RawFd>) -> Self {
        Self {
            write,
            direct: num_buffered.zip(fd.filter(|fd| *fd >= 0)),
            is_armed: AtomicBool::new(false),
            is_paused: AtomicBool::new(false),
            last_write_bits: AtomicU64::new(0f64.to_bits()),
        }
    }

    /// `write` is a transport's, whose protocol knows this writer.
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        if let Some((num_buffered, _)) = &self.direct {
            visit.call(num_buffered)?;
        }
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
pub(crate) struct PyOutbox {
    pub(crate) inner: Arc<Outbox>,
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
        let mut chunks = Chunks::default();
        for inner in deltas {
            match taker(writers, &inner)? {
                Some(writer) => {
                    let socket = writer.get().idle_socket(py);
                    chunks.push(inner, writer.unbind(), socket);
                }
                None => rest.push(PyDelta { inner }),
            }
        }
        let failed = chunks.deliver(py, now_s);
        rest.extend(failed.into_iter().map(|inner| PyDelta { inner }));
        Ok(rest)
    }
}

/// The writer that takes the delta, if it is the middle of a stream that has one and nothing but
/// text.
fn taker<'py>(
    writers: &Bound<'py, PyDict>,
    delta: &Delta,
) -> PyResult<Option<Bound<'py, PySseWriter>>> {
    let (Some(sse), None, None) = (&delta.sse, delta.finish_reason, &delta.extra) else {
        return Ok(None);
    };
    let Some(writer) = writers.get_item(delta.request_id)? else {
        return Ok(None);
    };
    let writer = writer.cast_into::<PySseWriter>()?;
    // Pieces that are no frames yet are the front end's to write.
    let is_ready = delta.pieces().is_none_or(<[_]>::is_empty);
    let takes = is_ready && writer.get().is_armed() && !writer.get().is_paused();
    // An empty part would end a chunked answer.
    Ok((takes && !sse.is_empty()).then_some(writer))
}
