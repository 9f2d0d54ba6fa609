//! Splitting: how byte-level tokenizers cut a text into words, by the names GGUF files use.
//!
//! Only the words are encoded, each by itself. A name whose rule is not certain is not here: wrong
//! words make a model subtly worse, unnoticed.

use tokenizers::SplitDelimiterBehavior;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};

pub(crate) const GPT2: &str =
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
pub(crate) const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
pub(crate) const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
pub(crate) const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK_V3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;
const LETTERS: &str = r"\s?\p{L}+";
const SEED_CODER: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";
pub(crate) const DIGIT: &str = r"\p{N}";
const THREE_DIGITS: &str = "[0-9][0-9][0-9]";

/// Patterns that make words of letters; each starts a new one at a space between two of them.
const WORD_PATTERNS: &[&str] = &[
    GPT2,
    LLAMA3,
    QWEN2,
    QWEN35,
    GPT4O,
    TEKKEN,
    DEEPSEEK_V3,
    LETTERS,
    SEED_CODER,
];

/// Rules by which a text is cut into words, each of which is encoded by itself.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Splitting {
    names: &'static [&'static str],
    /// Each one cuts what the one before has left, into matches and what lies between.
    patterns: &'static [&'static str],
    /// A word that is a token is taken as it is.
    pub(crate) ignore_merges: bool,
    /// A text begins with BOS unless the file's metadata has it otherwise.
    pub(crate) add_bos: bool,
    /// Text is normalized to Unicode's composed form first.
    pub(crate) compose: bool,
}

const fn plain(names: &'static [&'static str], patterns: &'static [&'static str]) -> Splitting {
    Splitting {
        names,
        patterns,
        ignore_merges: false,
        add_bos: false,
        compose: false,
    }
}

const SPLITTINGS: &[Splitting] = &[
    plain(
        &["default"],
        &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", THREE_DIGITS],
    ),
    plain(
        &[
            "gpt-2",
            "phi-2",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "exaone4",
            "gigachat",
            "a.x-4.0",
            "mellum",
            "granite-docling",
        ],
        &[GPT2],
    ),
    plain(
        &[
            "smollm",
            "starcoder",
            "refact",
            "command-r",
            "codeshell",
            "exaone",
            "minerva-7b",
            "mellum2",
        ],
        &[DIGIT, GPT2],
    ),
    plain(&["falcon"], &[r"[\p{P}\$\+<=>\^~\|`]+", GPT2, THREE_DIGITS]),
    Splitting {
        ignore_merges: true,
        add_bos: true,
        ..plain(
            &[
                "llama3",
                "llama-v3",
                "llama-bpe",
                "falcon3",
                "falcon-h1",
                "pixtral",
                "midm-2.0",
                "lfm2",
            ],
            &[LLAMA3],
        )
    },
    plain(&["dbrx", "smaug-bpe", "glm4", "chatglm-bpe"], &[LLAMA3]),
    Splitting {
        compose: true,
        ..plain(&["qwen2", "deepseek-r1-qwen"], &[QWEN2])
    },
    plain(
        &[
            "stablelm2",
            "megrez",
            "hunyuan",
            "solar-open",
            "grok-2",
            "kormo",
        ],
        &[QWEN2],
    ),
    Splitting {
        compose: true,
        ..plain(&["qwen35"], &[QWEN35])
    },
    plain(&["gpt-4o", "llama4", "kanana2", "minimax-m2"], &[GPT4O]),
    Splitting {
        ignore_merges: true,
        add_bos: true,
        ..plain(&["tekken"], &[TEKKEN])
    },
    plain(
        &["deepseek-v3", "hunyuan-dense"],
        &[
            r"\p{N}{1,3}",
            "[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+",
            DEEPSEEK_V3,
        ],
    ),
    plain(
        &["deepseek-coder"],
        &[
            r"[\r\n]",
            LETTERS,
            r"\s?\p{P}+",
            "[\u{4e00}-\u{9fa5}\u{800}-\u{4e00}\u{ac00}-\u{d7ff}]+",
            DIGIT,
        ],
    ),
    plain(&["seed-coder"], &[SEED_CODER]),
];

/// The splitting that `tokenizer.ggml.pre` names.
pub(crate) fn splitting(name: &str) -> Option<Splitting> {
    let is_named = |splitting: &&Splitting| splitting.names.contains(&name);
    SPLITTINGS.iter().find(is_named).copied()
}

/// For one of the patterns above, true if it makes words of letters; else None.
pub(crate) fn is_word_pattern(pattern: &str) -> Option<bool> {
    let is_known = SPLITTINGS
        .iter()
        .any(|splitting| splitting.patterns.contains(&pattern));
    is_known.then(|| WORD_PATTERNS.contains(&pattern))
}

impl Splitting {
    /// The crate's form of it, which also turns bytes into the vocabulary's characters.
    pub(crate) fn pre_tokenizer(&self, add_space: bool) -> Result<Sequence, String> {
        let mut steps: Vec<PreTokenizerWrapper> = Vec::new();
        for pattern in self.patterns {
            let pattern = SplitPattern::Regex((*pattern).to_owned());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false);
            steps.push(split.map_err(|e| e.to_string())?.into());
        }
        steps.push(ByteLevel::new(add_space, false, false).into());
        Ok(Sequence::new(steps))
    }
}

#[cfg(test)]
pub(crate) fn all() -> impl Iterator<Item = Splitting> {
    SPLITTINGS.iter().copied()
}
