//! Grammars: one vocabulary's compiled grammars, made on threads of their own and kept.
//!
//! Compiling runs on a thread with a large stack, a few at once and against the clock: a hostile grammar
//! costs its own request, and nobody else's. What is compiled stays in a cache bounded by memory.

use std::collections::HashMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use llguidance::ParserFactory;
use llguidance::earley::SlicedBiasComputer;
use toktrie::{InferenceCapabilities, TokEnv};

use super::matching::{Grammar, line};
use super::source::GrammarSource;
use super::vocabulary::Vocabulary;
use crate::error::{Error, Result};
use crate::text::tokenizer::Tokenizer;

/// References may be nested as deeply as `schema` allows, and the crate recurses over them.
const STACK_BYTES: usize = 64 << 20;

/// Grammars compiled at once: the others wait. More would take the cores of those who generate.
const MAX_COMPILING: usize = 2;

/// Lexer states of one sample: of the crate's 250,000, at 1 to 2 KB each, a fifth.
const MAX_LEXER_STATES: usize = 50_000;

/// Tokens of so few characters within a JSON string, beside the crate's own 10, 30 and more. Where a
/// string may be longer by that much the mask holds all of them, and none is tried. Near the end of a
/// string of `maxLength` every token was.
const SHORT_TEXTS: [&str; 2] = [r#"[^"\\\x00-\x1F\x7F]{1,3}"#, r#"[^"\\\x00-\x1F\x7F]{1,6}"#];

/// Sizes of a [`Grammars`].
#[derive(Debug, Clone, Copy)]
pub struct GrammarsConfig {
    /// Memory for compiled grammars.
    pub max_bytes: usize,
    /// Compiling takes no longer.
    pub deadline: Duration,
}

impl Default for GrammarsConfig {
    fn default() -> Self {
        Self {
            // Some thousand schemas of a few kilobytes.
            max_bytes: 128 << 20,
            // The limits end a grammar's compilation within a second; a vocabulary's trie takes two.
            deadline: Duration::from_secs(20),
        }
    }
}

/// See the module's page. Cloning it shares it.
#[derive(Clone)]
pub struct Grammars(Arc<Shared>);

struct Shared {
    tokenizer: Arc<Tokenizer>,
    vocab_size: usize,
    eos_token_ids: Box<[u32]>,
    config: GrammarsConfig,
    /// The vocabulary and the limits, made with the first grammar.
    factory: OnceLock<Result<(Arc<Vocabulary>, ParserFactory)>>,
    cache: Mutex<Cache>,
    num_compiling: Mutex<usize>,
    may_compile: Condvar,
}

impl fmt::Debug for Grammars {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammars")
            .field("vocab_size", &self.0.vocab_size)
            .field("num_cached", &self.num_cached())
            .finish_non_exhaustive()
    }
}

/// A place among those who compile.
struct Permit<'a>(&'a Shared);

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        *lock(&self.0.num_compiling) -= 1;
        self.0.may_compile.notify_one();
    }
}

impl Grammars {
    /// Nothing is made yet. `vocab_size`: the width of the model's logits.
    #[must_use]
    pub fn new(
        tokenizer: Arc<Tokenizer>,
        vocab_size: usize,
        eos_token_ids: &[u32],
        config: GrammarsConfig,
    ) -> Self {
        Self(Arc::new(Shared {
            tokenizer,
            vocab_size,
            eos_token_ids: eos_token_ids.into(),
            config,
            factory: OnceLock::new(),
            cache: Mutex::default(),
            num_compiling: Mutex::default(),
            may_compile: Condvar::new(),
        }))
    }

    /// Compiled grammars that are kept.
    #[must_use]
    pub fn num_cached(&self) -> usize {
        lock(&self.0.cache).entries.len()
    }

    /// A grammar that is kept. O(text).
    #[must_use]
    pub fn find(&self, source: &GrammarSource) -> Option<Arc<Grammar>> {
        lock(&self.0.cache).get(source)
    }

    /// A grammar, compiled if need be; blocks meanwhile.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`]: it is none, it is beyond the limits, or it takes too long.
    pub fn compile(&self, source: &GrammarSource) -> Result<Arc<Grammar>> {
        if let Some(grammar) = self.find(source) {
            return Ok(grammar);
        }
        let deadline = Instant::now() + self.0.config.deadline;
        let (sender, receiver) = mpsc::sync_channel(1);
        let (shared, source) = (self.0.clone(), source.clone());
        let work = move || {
            // Who asked may be gone by then.
            let _ = sender.send(shared.compile_by(&source, deadline));
        };
        thread::Builder::new()
            .name("octavo-grammar".into())
            .stack_size(STACK_BYTES)
            .spawn(work)
            .map_err(|error| Error::Panic(format!("no thread compiles grammars: {error}")))?;
        match receiver.recv_timeout(self.0.config.deadline) {
            Ok(result) => result,
            Err(RecvTimeoutError::Timeout) => Err(self.0.too_slow()),
            Err(RecvTimeoutError::Disconnected) => Err(Error::invalid("it cannot be compiled")),
        }
    }
}

impl Shared {
    fn too_slow(&self) -> Error {
        let seconds = self.config.deadline.as_secs_f64();
        Error::invalid(format!("compiling it takes longer than {seconds} s"))
    }

    fn compile_by(&self, source: &GrammarSource, deadline: Instant) -> Result<Arc<Grammar>> {
        let Some(_permit) = self.permit(deadline) else {
            return Err(self.too_slow());
        };
        // Another request may have compiled it meanwhile.
        if let Some(grammar) = lock(&self.cache).get(source) {
            return Ok(grammar);
        }
        let grammar = catch_unwind(AssertUnwindSafe(|| self.build(source)))
            .unwrap_or_else(|_| Err(Error::invalid("it cannot be compiled")))?;
        let grammar = Arc::new(grammar);
        lock(&self.cache).insert(source.clone(), grammar.clone(), self.config.max_bytes);
        Ok(grammar)
    }

    /// None once the deadline has passed.
    fn permit(&self, deadline: Instant) -> Option<Permit<'_>> {
        let mut num = lock(&self.num_compiling);
        while *num >= MAX_COMPILING {
            let left = deadline.checked_duration_since(Instant::now())?;
            (num, _) = self
                .may_compile
                .wait_timeout(num, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
        *num += 1;
        Some(Permit(self))
    }

    fn build(&self, source: &GrammarSource) -> Result<Grammar> {
        let (vocabulary, factory) = self
            .factory
            .get_or_init(|| self.make_factory())
            .as_ref()
            .map_err(Clone::clone)?;
        let grammar = source.lower(vocabulary)?;
        let parser = factory
            .create_parser(grammar)
            .map_err(|error| Error::invalid(line(&error)))?;
        Grammar::new(parser, source.text.len())
    }

    fn make_factory(&self) -> Result<(Arc<Vocabulary>, ParserFactory)> {
        let tokenizer = self.tokenizer.clone();
        let vocabulary = Vocabulary::new(tokenizer, self.vocab_size, &self.eos_token_ids)?;
        let vocabulary = Arc::new(vocabulary);
        let env: TokEnv = vocabulary.clone();
        let mut slices = SlicedBiasComputer::general_slices();
        slices.extend(SHORT_TEXTS.map(str::to_owned));
        let mut factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices)
            .map_err(|error| Error::invalid(line(&error)))?;
        factory.quiet();
        let limits = factory.limits_mut();
        limits.max_lexer_states = MAX_LEXER_STATES;
        limits.verbose_errors = false;
        Ok((vocabulary, factory))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Grammars by source, those used least lately given up first.
#[derive(Default)]
struct Cache {
    entries: HashMap<GrammarSource, Entry>,
    num_bytes: usize,
    /// Counts uses.
    clock: u64,
}

struct Entry {
    grammar: Arc<Grammar>,
    num_bytes: usize,
    used: u64,
}

impl Cache {
    fn get(&mut self, source: &GrammarSource) -> Option<Arc<Grammar>> {
        let entry = self.entries.get_mut(source)?;
        self.clock += 1;
        entry.used = self.clock;
        Some(entry.grammar.clone())
    }

    /// O(entries) where one has to go.
    fn insert(&mut self, source: GrammarSource, grammar: Arc<Grammar>, max_bytes: usize) {
        self.clock += 1;
        let num_bytes = source.text.len() + grammar.num_bytes();
        self.num_bytes += num_bytes;
        let entry = Entry {
            grammar,
            num_bytes,
            used: self.clock,
        };
        if let Some(old) = self.entries.insert(source, entry) {
            self.num_bytes -= old.num_bytes;
        }
        while self.num_bytes > max_bytes && self.entries.len() > 1 {
            let oldest = self.entries.iter().min_by_key(|(_, entry)| entry.used);
            let Some(source) = oldest.map(|(source, _)| source.clone()) else {
                return;
            };
            if let Some(entry) = self.entries.remove(&source) {
                self.num_bytes -= entry.num_bytes;
            }
        }
    }
}
