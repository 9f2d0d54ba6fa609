//! The tokens of a GGUF file that end an answer: those its keys name, and those known by spelling.
//!
//! Few files name all of them: converters write one `eos`, and a model that ends its turns with
//! `<|im_end|>` would never stop. llama.cpp goes by the spellings, too, and files are made to work
//! with it: the lists are its (`src/llama-vocab.cpp`, end-of-generation tokens).

use crate::files::gguf::GgufFile;

/// No text spells these by chance: they are control tokens whatever their type in the file.
const UNMISTAKABLE: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<turn|>",
    "<|tool_response>",
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
    // Fill in the middle: padding, the name of a repository, a file's end.
    "<|fim_pad|>",
    "<fim-pad>",
    "<fim_pad>",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<fim-repo>",
    "<|file_sep|>",
];

/// These may be words of a text, too: only as control tokens do they end an answer.
const IF_CONTROL: &[&str] = &[
    "</s>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<eos>",
    "[e~[",
    "<PAD>",
    "[PAD]",
    "<REPO>",
    "<reponame>",
];

const KEYS: &[&str] = &["eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep"];

/// True for the spelling of a control token, whatever the type in the file.
pub(crate) fn is_control_spelling(text: &str) -> bool {
    UNMISTAKABLE.contains(&text)
}

/// The ids, those that keys name first, each once. O(vocabulary).
///
/// `texts`, `is_control`: of every token.
pub(crate) fn find(
    file: &GgufFile,
    texts: &[&str],
    is_control: impl Fn(usize) -> bool,
) -> Vec<u32> {
    let named = KEYS
        .iter()
        .filter_map(|key| file.unsigned(&format!("tokenizer.ggml.{key}_token_id")))
        .filter(|&id| id < texts.len() as u64)
        .map(|id| id as usize);
    let spelled = texts.iter().enumerate().filter_map(|(id, text)| {
        let ends = UNMISTAKABLE.contains(text) || (IF_CONTROL.contains(text) && is_control(id));
        ends.then_some(id)
    });
    let mut ids: Vec<u32> = Vec::new();
    for id in named.chain(spelled) {
        if !ids.contains(&(id as u32)) {
            ids.push(id as u32);
        }
    }
    // Where an answer has parts of its own, the end of a part is not the end of the answer.
    let has = |text: &str| ids.iter().any(|&id| texts[id as usize] == text);
    let has_call = has("<|call|>") || has("<|calls|>");
    let drops_end = has_call && (has("<|return|>") || has("<|flush|>"));
    let drops_s = has("<|tool_response>");
    ids.retain(|&id| match texts[id as usize] {
        "<|end|>" => !drops_end,
        "</s>" => !drops_s,
        _ => true,
    });
    ids
}
