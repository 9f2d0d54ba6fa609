//! EngineCore, Staging, ScheduledBatch. See `_core.pyi`.
//!
//! No Python code runs while a lock of the core is held: it could hand the GIL to a thread that
//! waits for the same lock.
//!
//! Longer than other files: it is the list of a class's methods, as `_core.pyi` has them.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use octavo_core::engine::outbox::{Delivery, Extra};
use octavo_core::engine::{AddRequest, EngineCore, Sampled, SampledLogprobs};
use octavo_core::error::Error;
use octavo_core::scheduler::batch::{self, StagingLimits};
use octavo_core::scheduler::{LongPrefill, Policy, PrefixSharing, SchedulerConfig, StateConfig};
use pyo3::buffer::{Element, PyBuffer};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::channels::PyChannels;
use crate::delivery::{PyOutbox, PySseTemplate};
use crate::error::engine_error;
use crate::matcher::{PyGrammar, ReasoningTuple, TriggerTuple, reasoning_tokens, trigger_texts};
use crate::metrics::PyMetrics;
use crate::text::PyTokenizer;
use crate::token_ids::token_ids;

pub(crate) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<PyStaging>()?;
    m.add_class::<PyScheduledBatch>()?;
    m.add_class::<PyMetrics>()?;
    m.add_class::<PyEngineCore>()
}

/// Runs a verb; a panic that the core did not catch itself becomes a RuntimeError, where pyo3 would
/// raise a BaseException that ends the engine's thread.
fn guarded<T>(verb: impl FnOnce() -> Result<T, Error>) -> PyResult<T> {
    match catch_unwind(AssertUnwindSafe(verb)) {
        Ok(result) => result.map_err(engine_error),
        Err(payload) => {
            let text = payload.downcast_ref::<String>().map(String::as_str);
            let text = text.or(payload.downcast_ref::<&str>().copied());
            let text = text.unwrap_or("a panic without a message");
            Err(engine_error(Error::Panic(text.into())))
        }
    }
}

fn buffer<T: Element>(object: &Bound<'_, PyAny>, what: &str, kind: &str) -> PyResult<PyBuffer<T>> {
    let buffer = PyBuffer::<T>::get(object)
        .map_err(|_| PyTypeError::new_err(format!("{what} is not a buffer of {kind}")))?;
    if buffer.is_c_contiguous() {
        Ok(buffer)
    } else {
        Err(PyValueError::new_err(format!("{what} is not C-contiguous")))
    }
}

/// The elements of a C-contiguous buffer.
fn elements<T: Element>(buffer: &PyBuffer<T>) -> &[T] {
    match buffer.as_slice_ptr() {
        // SAFETY: the exporter keeps the memory alive and in place while `buffer` is held; PyBuffer
        // has checked format and alignment, and `as_slice_ptr` contiguity. The GIL is held while
        // the slice is used, so no Python code writes to it meanwhile.
        Some(slice) => unsafe { slice.as_ref() },
        None => &[],
    }
}

// --------------------------------------------------------------------------------- staging

#[pyclass(frozen, name = "Staging", module = "octavo._core")]
struct PyStaging {
    buffer: PyBuffer<i32>,
}

#[pymethods]
impl PyStaging {
    #[new]
    fn new(buffer: &Bound<'_, PyAny>) -> PyResult<Self> {
        let buffer = self::buffer::<i32>(buffer, "buffer", "int32")?;
        if buffer.readonly() || buffer.dimensions() != 1 {
            return Err(PyValueError::new_err(
                "buffer is not writable and of one dimension",
            ));
        }
        Ok(Self { buffer })
    }

    #[staticmethod]
    #[pyo3(signature = (
        max_num_batched_tokens, max_num_seqs, max_model_len, block_size, has_state=false,
        max_shared_groups=0
    ))]
    fn required_len(
        max_num_batched_tokens: usize,
        max_num_seqs: usize,
        max_model_len: usize,
        block_size: usize,
        has_state: bool,
        max_shared_groups: usize,
    ) -> PyResult<usize> {
        if block_size == 0 {
            return Err(PyValueError::new_err("block_size must be at least 1"));
        }
        let limits = StagingLimits::new(
            max_num_batched_tokens,
            max_num_seqs,
            max_model_len,
            block_size,
            has_state,
            max_shared_groups,
        );
        Ok(limits.required_len())
    }
}

macro_rules! scheduled_batch {
    ($($field:ident)*) => {
        #[pyclass(frozen, get_all, name = "ScheduledBatch", module = "octavo._core")]
        struct PyScheduledBatch {
            step_id: u64,
            awaited_step: Option<u64>,
            $($field: usize,)*
            new_slots: Vec<(u32, u64, u32)>,
            request_ids: Vec<u64>,
        }

        impl PyScheduledBatch {
            fn new(batch: &batch::ScheduledBatch, plan: &batch::Plan) -> Self {
                Self {
                    step_id: batch.step_id,
                    awaited_step: batch.awaited_step,
                    $($field: batch.$field,)*
                    new_slots: plan.new_slots.clone(),
                    request_ids: plan.entries.iter().map(|entry| entry.request_id).collect(),
                }
            }
        }
    };
}

scheduled_batch! {
    num_tokens num_reqs num_decodes num_samples num_constrained num_block_updates
    num_shared_groups num_state_restores num_state_saves max_query_len max_seq_len packed_len
    input_ids_offset positions_offset slot_mapping_offset slots_offset seq_lens_offset
    query_start_loc_offset sample_rows_offset sample_slots_offset block_updates_offset
    shared_groups_offset shared_members_offset shared_tokens_offset state_restores_offset state_saves_offset
}

#[pymethods]
impl PyScheduledBatch {
    fn __repr__(&self) -> String {
        format!(
            "ScheduledBatch(step_id={}, num_tokens={}, num_reqs={}, num_decodes={})",
            self.step_id, self.num_tokens, self.num_reqs, self.num_decodes
        )
    }
}

// ---------------------------------------------------------------------------------- engine

/// Python's `time.monotonic()` without a call into Python.
struct Clock {
    offset_s: f64,
    started: Instant,
}

impl Clock {
    fn new(py: Python<'_>) -> PyResult<Self> {
        let now_s: f64 = py.import("time")?.call_method0("monotonic")?.extract()?;
        Ok(Self {
            offset_s: now_s,
            started: Instant::now(),
        })
    }

    fn now_s(&self) -> f64 {
        self.offset_s + self.started.elapsed().as_secs_f64()
    }
}

#[pyclass(name = "EngineCore", module = "octavo._core")]
struct PyEngineCore {
    core: EngineCore,
    clock: Clock,
}

#[pymethods]
impl PyEngineCore {
    #[new]
    #[pyo3(signature = (
        *, num_blocks, block_size, max_num_seqs, max_num_batched_tokens, max_model_len,
        enable_prefix_caching=true, enable_chunked_prefill=true, long_prefill_token_threshold=0,
        long_prefill_token_threshold_adaptive=false, max_step_ms=0.0,
        padded_prompts=Vec::new(), policy="fcfs", num_stages=1,
        stream_interval=1, tokenizer=None, num_state_checkpoints=None,
        state_checkpoint_interval=512, prefix_sharing=None
    ))]
    #[allow(clippy::too_many_arguments)] // keyword arguments of the Python constructor
    fn new(
        py: Python<'_>,
        num_blocks: usize,
        block_size: usize,
        max_num_seqs: usize,
        max_num_batched_tokens: usize,
        max_model_len: usize,
        enable_prefix_caching: bool,
        enable_chunked_prefill: bool,
        long_prefill_token_threshold: usize,
        long_prefill_token_threshold_adaptive: bool,
        max_step_ms: f64,
        padded_prompts: Vec<usize>,
        policy: &str,
        num_stages: usize,
        stream_interval: u32,
        tokenizer: Option<&PyTokenizer>,
        num_state_checkpoints: Option<usize>,
        state_checkpoint_interval: usize,
        prefix_sharing: Option<(usize, usize, usize)>,
    ) -> PyResult<Self> {
        let policy = match policy {
            "fcfs" => Policy::Fcfs,
            "priority" => Policy::Priority,
            other => {
                return Err(PyValueError::new_err(format!(
                    "policy must be 'fcfs' or 'priority', not {other:?}"
                )));
            }
        };
        let config = SchedulerConfig {
            num_blocks,
            block_size,
            max_num_seqs,
            max_num_batched_tokens,
            max_model_len,
            enable_prefix_caching,
            enable_chunked_prefill,
            long_prefill: LongPrefill {
                threshold: long_prefill_token_threshold,
                is_adaptive: long_prefill_token_threshold_adaptive,
            },
            max_step_s: max_step_ms / 1e3,
            padded_prompts,
            policy,
            num_stages,
            state: num_state_checkpoints.map(|num_checkpoints| StateConfig {
                num_checkpoints,
                interval: state_checkpoint_interval,
            }),
            prefix_sharing: prefix_sharing.map(|(max_groups, min_tokens, min_saved_tokens)| {
                PrefixSharing {
                    max_groups,
                    min_tokens,
                    min_saved_tokens,
                }
            }),
        };
        let tokenizer = tokenizer.map(|tokenizer| Arc::clone(&tokenizer.inner));
        let core = EngineCore::new(config, stream_interval, tokenizer).map_err(engine_error)?;
        Ok(Self {
            core,
            clock: Clock::new(py)?,
        })
    }

    #[getter]
    fn outbox(&self) -> PyOutbox {
        PyOutbox {
            inner: Arc::clone(self.core.outbox()),
        }
    }

    #[getter]
    fn metrics(&self) -> PyMetrics {
        PyMetrics {
            inner: Arc::clone(self.core.metrics()),
        }
    }

    #[pyo3(
        signature = (
            request_ids, prompt_token_ids, *, max_tokens, min_tokens=0, eos_token_ids=Vec::new(),
            stop_token_ids=Vec::new(), stop=Vec::new(), include_stop_str_in_output=false,
            skip_special_tokens=true, num_logprobs=None, priority=0, cache_salt=None,
            arrival_s=None, stream_interval=None, delivery="final", sse=None, channels=None,
            grammar=None, trigger=None, may_force=false, reasoning=None,
            bad_words=Vec::new()
        ),
        text_signature = "($self, request_ids, prompt_token_ids, *, max_tokens, min_tokens=0, \
                          eos_token_ids=(), stop_token_ids=(), stop=(), \
                          include_stop_str_in_output=False, skip_special_tokens=True, \
                          num_logprobs=None, priority=0, cache_salt=None, arrival_s=None, \
                          stream_interval=None, delivery='final', sse=None, channels=None, \
                          grammar=None, trigger=None, may_force=False, reasoning=None, \
                          bad_words=())"
    )]
    #[allow(clippy::too_many_arguments)] // keyword arguments of the Python method
    fn add_request(
        &mut self,
        py: Python<'_>,
        request_ids: Vec<u64>,
        prompt_token_ids: &Bound<'_, PyAny>,
        max_tokens: usize,
        min_tokens: usize,
        eos_token_ids: Vec<u32>,
        stop_token_ids: Vec<u32>,
        stop: Vec<String>,
        include_stop_str_in_output: bool,
        skip_special_tokens: bool,
        num_logprobs: Option<usize>,
        priority: i64,
        cache_salt: Option<&str>,
        arrival_s: Option<f64>,
        stream_interval: Option<u32>,
        delivery: &str,
        sse: Option<Vec<Py<PySseTemplate>>>,
        channels: Option<&PyChannels>,
        grammar: Option<&PyGrammar>,
        trigger: Option<TriggerTuple>,
        may_force: bool,
        reasoning: Option<ReasoningTuple>,
        bad_words: Vec<Vec<u32>>,
    ) -> PyResult<()> {
        let prompt = token_ids(prompt_token_ids)?;
        let num_samples = request_ids.len();
        let deliveries = match (delivery, sse) {
            ("sse", Some(templates)) => templates
                .iter()
                .map(|template| Delivery::Sse(Arc::clone(&template.borrow(py).inner)))
                .collect(),
            ("sse", None) => {
                return Err(PyValueError::new_err(
                    "delivery 'sse' needs a template per sample",
                ));
            }
            ("delta", _) => vec![Delivery::Delta; num_samples],
            ("final", _) => vec![Delivery::Final; num_samples],
            (other, _) => {
                return Err(PyValueError::new_err(format!(
                    "delivery must be 'sse', 'delta' or 'final', not {other:?}"
                )));
            }
        };
        let arrival_s = arrival_s.unwrap_or_else(|| self.clock.now_s());
        let trigger = trigger.as_ref().map(trigger_texts);
        guarded(|| {
            self.core.add_request(AddRequest {
                request_ids: &request_ids,
                prompt: &prompt,
                max_tokens,
                min_tokens,
                eos_token_ids: &eos_token_ids,
                stop_token_ids: &stop_token_ids,
                stop: &stop,
                include_stop_str_in_output,
                skip_special_tokens,
                grammar: grammar.map(|grammar| Arc::clone(&grammar.inner)),
                trigger,
                may_force,
                bad_words: &bad_words,
                reasoning: reasoning.map(reasoning_tokens),
                num_logprobs,
                priority,
                cache_salt,
                arrival_s,
                stream_interval,
                deliveries,
                channels: channels.map(|channels| Arc::clone(&channels.inner)),
            })
        })
    }

    fn abort(&mut self, request_id: u64) -> PyResult<bool> {
        let now_s = self.clock.now_s();
        guarded(|| Ok(self.core.abort(request_id, now_s)))
    }

    fn schedule(&mut self, staging: &PyStaging) -> PyResult<Option<PyScheduledBatch>> {
        let now_s = self.clock.now_s();
        let buffer = match staging.buffer.as_slice_ptr() {
            // SAFETY: as in `elements`; the buffer was checked to be writable. The slice lives
            // until the end of this call, during which the GIL is held and the core runs no Python
            // code, so nothing else refers to the memory.
            Some(mut slice) => unsafe { slice.as_mut() },
            None => &mut [],
        };
        let mut target = batch::Staging { buffer };
        let batch = guarded(|| self.core.schedule(&mut target, now_s))?;
        let plan = batch
            .as_ref()
            .and_then(|batch| self.core.plan(batch.step_id));
        Ok(batch
            .as_ref()
            .zip(plan)
            .map(|(batch, plan)| PyScheduledBatch::new(batch, plan)))
    }

    /// The core is free meanwhile: whoever wants its outbox does not wait for masks.
    #[pyo3(signature = (step_id, rows, masks, token_ids=None))]
    fn masks(
        this: &Bound<'_, Self>,
        step_id: u64,
        rows: &Bound<'_, PyAny>,
        masks: &Bound<'_, PyAny>,
        token_ids: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<usize> {
        let row_buffer = self::buffer::<i32>(rows, "rows", "int32")?;
        let buffer = self::buffer::<u32>(masks, "masks", "uint32")?;
        let token_ids = token_ids
            .map(|ids| self::buffer::<i32>(ids, "token_ids", "int32"))
            .transpose()?;
        let &[num_rows, num_words] = buffer.shape() else {
            return Err(PyValueError::new_err("masks has not two dimensions"));
        };
        if buffer.readonly() || row_buffer.readonly() {
            return Err(PyValueError::new_err("masks or rows is not writable"));
        }
        let (first, last) = (buffer.buf_ptr() as usize, row_buffer.buf_ptr() as usize);
        if first < last + row_buffer.len_bytes() && last < first + buffer.len_bytes() {
            return Err(PyValueError::new_err("masks and rows share memory"));
        }
        let tokens = token_ids.as_ref().map(elements);
        let mut batch = guarded(|| this.borrow_mut().core.take_masks(step_id, tokens))?;
        let num_masks = batch.items.len();
        let filled = if num_masks > num_rows.min(row_buffer.item_count()) {
            Err(PyValueError::new_err(format!(
                "{num_masks} masks do not fit {num_rows} rows"
            )))
        } else {
            let rows = match row_buffer.as_slice_ptr() {
                // SAFETY: as of `out`, with which it shares no memory.
                Some(mut slice) => unsafe { slice.as_mut() },
                None => &mut [],
            };
            let out = match buffer.as_slice_ptr() {
                // SAFETY: the exporter keeps the memory alive and in place while `buffer` is held;
                // PyBuffer has checked format and alignment, and `buffer` contiguity and that it is
                // writable. It belongs to the runner, which uses it on this thread alone: nothing
                // else refers to the memory until this call returns.
                Some(mut slice) => unsafe { slice.as_mut() },
                None => &mut [],
            };
            guarded(|| {
                this.py().detach(|| batch.fill(rows, out, num_words));
                Ok(num_masks)
            })
        };
        this.borrow_mut().core.return_masks(batch);
        filled
    }

    #[pyo3(signature = (
        step_id, token_ids, logprob_ids=None, logprobs=None, ranks=None, extras=None
    ))]
    #[allow(clippy::too_many_arguments)] // one step's results, by position
    fn update(
        &mut self,
        step_id: u64,
        token_ids: &Bound<'_, PyAny>,
        logprob_ids: Option<&Bound<'_, PyAny>>,
        logprobs: Option<&Bound<'_, PyAny>>,
        ranks: Option<&Bound<'_, PyAny>>,
        extras: Option<Vec<(u64, Py<PyAny>)>>,
    ) -> PyResult<bool> {
        let now_s = self.clock.now_s();
        let token_ids = buffer::<i32>(token_ids, "token_ids", "int32")?;
        let buffers = match (logprob_ids, logprobs, ranks) {
            (Some(ids), Some(values), Some(ranks)) => Some((
                buffer::<i32>(ids, "logprob_ids", "int32")?,
                buffer::<f32>(values, "logprobs", "float32")?,
                buffer::<i32>(ranks, "ranks", "int32")?,
            )),
            (None, None, None) => None,
            _ => {
                return Err(PyValueError::new_err(
                    "logprob_ids, logprobs and ranks come together or not at all",
                ));
            }
        };
        let logprobs = buffers
            .as_ref()
            .map(|(ids, values, ranks)| SampledLogprobs {
                ids: elements(ids),
                values: elements(values),
                ranks: elements(ranks),
                width: ids.shape().get(1).copied().unwrap_or(1),
            });
        let sampled = Sampled {
            token_ids: elements(&token_ids),
            logprobs,
        };
        // Before the tokens: what comes with a sample's token is in the same delta.
        for (request_id, extra) in extras.into_iter().flatten() {
            let left = guarded(|| Ok(self.core.attach(request_id, Extra::new(extra))))?;
            // Its end may run Python code: here no lock is held.
            drop(left);
        }
        guarded(|| self.core.update(step_id, sampled, now_s))
    }

    fn refuse(&mut self, request_ids: Vec<u64>, num_prompt_tokens: u64) -> PyResult<bool> {
        guarded(|| Ok(self.core.refuse(&request_ids, num_prompt_tokens)))
    }

    fn take_ended(&mut self) -> Vec<u64> {
        self.core.take_ended().collect()
    }

    fn abandon(&mut self) -> PyResult<bool> {
        let now_s = self.clock.now_s();
        guarded(|| Ok(self.core.abandon(now_s)))
    }

    fn fail_step(&mut self, step_id: u64) -> PyResult<bool> {
        let now_s = self.clock.now_s();
        guarded(|| self.core.fail_step(step_id, now_s))
    }

    fn token_ids(&self, request_id: u64) -> PyResult<Vec<u32>> {
        self.core.token_ids(request_id).map_err(engine_error)
    }

    fn num_unfinished(&self) -> usize {
        self.core.num_unfinished()
    }

    fn has_work(&self) -> bool {
        self.core.has_work()
    }

    fn reset_prefix_cache(&mut self) {
        self.core.reset_prefix_cache();
    }

    fn check_integrity(&self) -> PyResult<()> {
        guarded(|| self.core.check_integrity())
    }

    fn block_ids(&self, request_id: u64) -> PyResult<Vec<u32>> {
        self.core.block_ids(request_id).map_err(engine_error)
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = self.core.stats();
        let dict = PyDict::new(py);
        dict.set_item("num_running", stats.num_running)?;
        dict.set_item("num_waiting", stats.num_waiting)?;
        dict.set_item("num_free_blocks", stats.num_free_blocks)?;
        dict.set_item("num_cached_blocks", stats.num_cached_blocks)?;
        dict.set_item("num_blocks", stats.num_blocks)?;
        dict.set_item("num_preemptions", stats.num_preemptions)?;
        dict.set_item("num_in_flight", stats.num_in_flight)?;
        Ok(dict)
    }
}
