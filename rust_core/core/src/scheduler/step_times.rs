//! Times of steps, learned from those that came back: what bounds the prompts beside decodes.
//!
//! A step takes the time of its decodes, and each chunk of a prompt adds to it by its tokens and by the
//! pairs of a token and one before it, which attention is about. The two factors are those with the
//! least squared relative error over the last steps with chunks, older ones counting less; where these
//! cannot tell the factors apart, their ratio stays as it was. Both stay positive, so that the time
//! grows with tokens and with context. Of three steps in a row the one of median error is learned from:
//! one that was slow for reasons of its own (a kernel compiled, a graph captured) has no effect. O(1) a step.

/// The chunks of a step, as far as their time is concerned.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Chunks {
    /// Tokens in all.
    pub tokens: f64,
    /// Pairs of a token and one before it.
    pub pairs: f64,
}

impl Chunks {
    /// One chunk of `count` tokens behind `start` others.
    #[must_use]
    pub fn one(start: usize, count: usize) -> Self {
        let (start, count) = (start as f64, count as f64);
        Self {
            tokens: count,
            pairs: count * (start + count / 2.0),
        }
    }

    /// Both together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            tokens: self.tokens + other.tokens,
            pairs: self.pairs + other.pairs,
        }
    }
}

/// Context at which attention takes as long as all else of a token: some 11,000 tokens of an 8B
/// Llama on a Hopper GPU; first guess alone.
const EVEN_CONTEXT: f64 = 10_000.0;

/// Part by which the time of decodes follows the last step of them alone.
const DECODE_GAIN: f64 = 0.5;

/// By which a step counts less with each one after it: after eight the factors are those of a device that has
/// become half as fast.
const DECAY: f64 = 0.8;

/// Steps that the ratio of the factors counts as.
const RATIO_WEIGHT: f64 = 0.1;

/// Part of itself that a factor keeps at least, of one step.
const LEAST_KEPT: f64 = 0.05;

/// Part of a step that its chunks take at least: what is measured less could be noise.
const LEAST_PART: f64 = 0.05;

/// Ranges of the factors, for any clock and device.
const PER_TOKEN_S: (f64, f64) = (1e-10, 1e2);
const PER_PAIR_S: (f64, f64) = (1e-16, 1e-1);

/// Of the normal equations; see `learn`.
#[derive(Debug, Clone, Default)]
struct Sums {
    tokens_tokens: f64,
    tokens_pairs: f64,
    pairs_pairs: f64,
    tokens: f64,
    pairs: f64,
}

/// See the module doc.
#[derive(Debug, Clone)]
pub struct StepTimes {
    /// Of a step of decodes alone; 0: there was none.
    decodes_s: f64,
    per_token_s: f64,
    per_pair_s: f64,
    /// Of steps, decayed: products of their tokens and pairs, each a second of theirs, and their sums.
    sums: Sums,
    /// Steps with chunks, the oldest of `num_recent` is replaced: their chunks and what these added.
    recent: [(Chunks, f64); 3],
    num_recent: usize,
    /// Some of them had decodes too: from then on others teach nothing.
    has_mixed: bool,
}

impl StepTimes {
    /// Before the first step: `per_token_s` is a guess.
    #[must_use]
    pub fn new(per_token_s: f64) -> Self {
        Self {
            decodes_s: 0.0,
            per_token_s: per_token_s.clamp(PER_TOKEN_S.0, PER_TOKEN_S.1),
            per_pair_s: (per_token_s / EVEN_CONTEXT).clamp(PER_PAIR_S.0, PER_PAIR_S.1),
            sums: Sums::default(),
            recent: [(Chunks::default(), 0.0); 3],
            num_recent: 0,
            has_mixed: false,
        }
    }

    /// Seconds of a step of decodes alone, as the last ones took; 0 before the first.
    #[must_use]
    pub fn decodes_s(&self) -> f64 {
        self.decodes_s
    }

    /// Seconds that chunks add to a step.
    #[must_use]
    pub fn chunks_s(&self, chunks: Chunks) -> f64 {
        self.per_token_s * chunks.tokens + self.per_pair_s * chunks.pairs
    }

    /// Tokens of the longest chunk behind `start` others that adds `seconds` at most.
    #[must_use]
    pub fn tokens_within(&self, seconds: f64, start: usize) -> usize {
        // The positive root of per_pair / 2 * n^2 + linear * n = seconds.
        let linear = self.per_token_s + self.per_pair_s * start as f64;
        let root = (linear * linear + 2.0 * self.per_pair_s * seconds.max(0.0)).sqrt();
        (2.0 * seconds.max(0.0) / (linear + root)) as usize
    }

    /// Takes a step of decodes alone that took `seconds`.
    #[inline]
    pub fn observe_decodes(&mut self, seconds: f64) {
        if self.decodes_s == 0.0 {
            self.decodes_s = seconds.max(0.0);
        }
        let near = seconds.clamp(self.decodes_s / 2.0, self.decodes_s * 2.0);
        self.decodes_s += (near - self.decodes_s) * DECODE_GAIN;
    }

    /// Takes a step of `chunks` that took `seconds`, and whether there were decodes beside them.
    pub fn observe(&mut self, chunks: Chunks, seconds: f64, has_decodes: bool) {
        // Alone, a chunk pays for what it would share with decodes: an upper bound, until there is better.
        if !seconds.is_finite() || seconds <= 0.0 || (self.has_mixed && !has_decodes) {
            return;
        }
        if has_decodes && !self.has_mixed {
            self.has_mixed = true;
            self.num_recent = 0;
            self.sums = Sums::default();
        }
        let others_s = if has_decodes { self.decodes_s } else { 0.0 };
        let added_s = (seconds - others_s).max(seconds * LEAST_PART);
        self.recent[self.num_recent % 3] = (chunks, added_s);
        self.num_recent += 1;
        self.learn();
    }

    /// Has the factors follow the median of the recent steps; of two, the faster.
    fn learn(&mut self) {
        let num = self.num_recent.min(3);
        let mut recent = self
            .recent
            .map(|(chunks, added_s)| (added_s / self.chunks_s(chunks), chunks, added_s));
        recent[..num].sort_by(|a, b| a.0.total_cmp(&b.0));
        let (ratio, chunks, added_s) = recent[(num - 1) / 2];
        if self.num_recent == 6 {
            self.num_recent = 3;
        }
        let (tokens, pairs) = (chunks.tokens / added_s, chunks.pairs / added_s);
        let sums = &mut self.sums;
        sums.tokens_tokens = DECAY * sums.tokens_tokens + tokens * tokens;
        sums.tokens_pairs = DECAY * sums.tokens_pairs + tokens * pairs;
        sums.pairs_pairs = DECAY * sums.pairs_pairs + pairs * pairs;
        sums.tokens = DECAY * sums.tokens + tokens;
        sums.pairs = DECAY * sums.pairs + pairs;
        // With the old ratio this step's time is met by these.
        let (token_s, pair_s) = (self.per_token_s * ratio, self.per_pair_s * ratio);
        let aa = sums.tokens_tokens + RATIO_WEIGHT / (token_s * token_s);
        let bb = sums.pairs_pairs + RATIO_WEIGHT / (pair_s * pair_s);
        let ab = sums.tokens_pairs;
        let (a, b) = (
            sums.tokens + RATIO_WEIGHT / token_s,
            sums.pairs + RATIO_WEIGHT / pair_s,
        );
        let determinant = aa * bb - ab * ab;
        let (least_token_s, least_pair_s) = (LEAST_KEPT * token_s, LEAST_KEPT * pair_s);
        let (mut per_token_s, mut per_pair_s) = if determinant > 0.0 {
            (
                (a * bb - b * ab) / determinant,
                (aa * b - ab * a) / determinant,
            )
        } else {
            // The weights of the ratio are lost in rounding.
            (token_s, pair_s)
        };
        if per_token_s < least_token_s {
            per_token_s = least_token_s;
            per_pair_s = (b - ab * per_token_s) / bb;
        }
        if per_pair_s < least_pair_s {
            per_pair_s = least_pair_s;
            per_token_s = ((a - ab * per_pair_s) / aa).max(least_token_s);
        }
        self.per_token_s = per_token_s.clamp(PER_TOKEN_S.0, PER_TOKEN_S.1);
        self.per_pair_s = per_pair_s.clamp(PER_PAIR_S.0, PER_PAIR_S.1);
    }
}
