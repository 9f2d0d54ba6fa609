//! The vocabulary of a GGUF file: spellings, types and scores of its tokens, and those with a role.

use std::borrow::Cow;

use tokenizers::models::bpe::Vocab;
use tokenizers::processors::template::{SpecialToken, TemplateProcessing};
use tokenizers::{AddedToken, Tokenizer};

use crate::files::gguf::GgufFile;
use crate::text::gguf_end_tokens;

pub(super) const SPACE_MARK: &str = "\u{2581}";

// tokenizer.ggml.token_type
pub(super) const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
pub(super) const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
pub(super) const BYTE: i32 = 6;

pub(super) type Result<T> = std::result::Result<T, String>;

/// A file's vocabulary.
pub(super) struct Tokens<'a> {
    pub(super) texts: Vec<Cow<'a, str>>,
    pub(super) types: Vec<i32>,
    ids: Vocab,
}

impl<'a> Tokens<'a> {
    pub(super) fn read(file: &'a GgufFile) -> Result<Self> {
        let texts = strings(file, "tokenizer.ggml.tokens")?;
        let mut types = match file.get("tokenizer.ggml.token_type") {
            None => vec![NORMAL; texts.len()],
            Some(_) => integers(file, "tokenizer.ggml.token_type")?,
        };
        if types.len() != texts.len() {
            return Err(format!(
                "has {} tokens but {} token types",
                texts.len(),
                types.len()
            ));
        }
        for (text, kind) in texts.iter().zip(&mut types) {
            if gguf_end_tokens::is_control_spelling(text) {
                *kind = CONTROL;
            }
        }
        // Some files hold empty entries; each needs a spelling of its own.
        let texts: Vec<Cow<'a, str>> = texts
            .into_iter()
            .enumerate()
            .map(|(id, text)| match text {
                "" => format!("[EMPTY_{id}]").into(),
                text => text.into(),
            })
            .collect();
        let ids = distinct(&texts)?;
        Ok(Self { texts, types, ids })
    }

    /// All spellings, by id.
    pub(super) fn texts(&self) -> impl Iterator<Item = &str> {
        self.texts.iter().map(AsRef::as_ref)
    }

    /// The spellings of tokens that texts are cut into.
    pub(super) fn normal(&self) -> impl Iterator<Item = &str> {
        self.texts()
            .zip(&self.types)
            .filter(|(_, kind)| **kind == NORMAL)
            .map(|(text, _)| text)
    }

    /// True if any token is of this type.
    pub(super) fn has(&self, kind: i32) -> bool {
        self.types.contains(&kind)
    }

    /// The id of a spelling.
    pub(super) fn id(&self, text: &str) -> Option<u32> {
        self.ids.get(text).copied()
    }

    /// Spelling to id.
    pub(super) fn ids(&self) -> Vocab {
        self.ids.clone()
    }

    /// Spell normal tokens, and those that are not used, in another way.
    pub(super) fn rename(&mut self, spelling: impl Fn(&str) -> String) -> Result<()> {
        for (text, kind) in self.texts.iter_mut().zip(&self.types) {
            if !matches!(*kind, UNKNOWN | CONTROL | USER_DEFINED) {
                *text = spelling(text).into();
            }
        }
        self.ids = distinct(&self.texts)?;
        Ok(())
    }

    /// A token with a role: of the first of `names` that the file has, or spelled so.
    pub(super) fn special(
        &self,
        file: &GgufFile,
        names: &[&str],
        spelling: &str,
    ) -> Result<(String, u32)> {
        let named = names
            .iter()
            .find_map(|name| file.unsigned(&format!("tokenizer.ggml.{name}_token_id")))
            .and_then(|id| u32::try_from(id).ok());
        let id = named.or_else(|| self.id(spelling));
        id.and_then(|id| Some((self.texts.get(id as usize)?.to_string(), id)))
            .ok_or_else(|| format!("has no token {spelling:?}"))
    }

    /// Tokens that are cut out of a text before anything else sees it; user-defined ones written
    /// with a space mark only once spaces are marks too, where `marks_spaces`.
    pub(super) fn added(
        &self,
        rstrip: impl Fn(&str) -> bool,
        marks_spaces: bool,
    ) -> Vec<AddedToken> {
        self.texts
            .iter()
            .zip(&self.types)
            .filter(|(_, kind)| matches!(**kind, UNKNOWN | CONTROL | USER_DEFINED))
            .map(|(text, &kind)| {
                let marked = kind == USER_DEFINED && text.contains(SPACE_MARK);
                AddedToken::from(text.as_ref(), kind != USER_DEFINED)
                    .normalized(marks_spaces && marked)
                    .rstrip(rstrip(text))
            })
            .collect()
    }
}

/// Spelling to id.
fn distinct(texts: &[Cow<'_, str>]) -> Result<Vocab> {
    let mut ids = Vocab::with_capacity(texts.len());
    for (id, text) in texts.iter().enumerate() {
        if let Some(other) = ids.insert(text.to_string(), id as u32) {
            return Err(format!("token {text:?} has two ids, {other} and {id}"));
        }
    }
    Ok(ids)
}

/// Every token's score.
pub(super) fn scores(file: &GgufFile, tokens: &Tokens<'_>) -> Result<Vec<f32>> {
    let scores = file
        .floats("tokenizer.ggml.scores")
        .map_err(|e| without_path(file, e.0))?;
    if scores.len() != tokens.texts.len() {
        return Err(format!(
            "has {} tokens but {} scores",
            tokens.texts.len(),
            scores.len()
        ));
    }
    Ok(scores)
}

pub(super) fn strings<'a>(file: &'a GgufFile, key: &str) -> Result<Vec<&'a str>> {
    file.strings(key).map_err(|e| without_path(file, e.0))
}

fn integers(file: &GgufFile, key: &str) -> Result<Vec<i32>> {
    file.integers(key).map_err(|e| without_path(file, e.0))
}

/// The caller names the file; once is enough.
fn without_path(file: &GgufFile, message: String) -> String {
    match message.strip_prefix(file.path()) {
        Some(rest) => rest.trim_start_matches(": ").to_owned(),
        None => message,
    }
}

/// The ids that open and close a text: those whose `add_*_token` holds and which exist.
pub(super) fn add_bos_eos(
    tokenizer: &mut Tokenizer,
    file: &GgufFile,
    tokens: &Tokens<'_>,
    defaults: (bool, bool),
    default_ids: (Option<u64>, Option<u64>),
) -> Result<()> {
    let mut special = Vec::new();
    let mut wanted = |name: &str, default: bool, default_id: Option<u64>| -> Result<bool> {
        if !file
            .bool(&format!("tokenizer.ggml.add_{name}_token"))
            .unwrap_or(default)
        {
            return Ok(false);
        }
        let key = format!("tokenizer.ggml.{name}_token_id");
        let Some(id) = file.unsigned(&key).or(default_id) else {
            return Ok(false);
        };
        let Some(text) = usize::try_from(id).ok().and_then(|id| tokens.texts.get(id)) else {
            return Err(format!("key {key:?}: no token has the id {id}"));
        };
        let token = SpecialToken::new(name.to_owned(), vec![id as u32], vec![text.to_string()]);
        special.push(token.map_err(|e| e.to_string())?);
        Ok(true)
    };
    let bos = wanted("bos", defaults.0, default_ids.0)?;
    let eos = wanted("eos", defaults.1, default_ids.1)?;
    if !(bos || eos) {
        return Ok(());
    }
    let template = match (bos, eos) {
        (true, true) => "bos $A eos",
        (true, false) => "bos $A",
        _ => "$A eos",
    };
    let processor = TemplateProcessing::builder()
        .try_single(template)
        .map_err(|e| e.to_string())?
        .special_tokens(special)
        .build()
        .map_err(|e| e.to_string())?;
    tokenizer.with_post_processor(Some(processor));
    Ok(())
}
