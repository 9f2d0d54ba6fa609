//! Changes to a tokenizer by the files beside its tokenizer.json: added tokens, a space in front.

use tokenizers::decoders::DecoderWrapper;
use tokenizers::decoders::sequence::Sequence as DecoderSequence;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::metaspace::PrependScheme;
use tokenizers::{AddedToken, Tokenizer};

/// The part of a tokenizer that puts a space in front of a text, and whether it is to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PrefixSpace {
    /// Byte-level splitting adds the space.
    ByteLevel(bool),
    /// The space mark is put in front, and taken off again in decoding.
    Metaspace(bool),
}

/// Add tokens in their order, each under the id that it has or else the next one, and set what
/// stands in front of a text (None: as it is).
pub(crate) fn apply(
    tokenizer: &mut Tokenizer,
    added: &[AddedToken],
    prefix_space: Option<PrefixSpace>,
) -> Result<(), String> {
    tokenizer
        .add_tokens(added.iter().cloned())
        .map_err(|e| e.to_string())?;
    let (Some(prefix_space), Some(mut pre_tokenizer)) =
        (prefix_space, tokenizer.get_pre_tokenizer().cloned())
    else {
        return Ok(());
    };
    let is_changed = set_prefix_space(&mut pre_tokenizer, prefix_space);
    if !is_changed {
        return Ok(());
    }
    tokenizer.with_pre_tokenizer(Some(pre_tokenizer));
    if let (PrefixSpace::Metaspace(add), Some(mut decoder)) =
        (prefix_space, tokenizer.get_decoder().cloned())
    {
        set_stripped(&mut decoder, add);
        tokenizer.with_decoder(Some(decoder));
    }
    Ok(())
}

fn scheme(add: bool) -> PrependScheme {
    if add {
        PrependScheme::First
    } else {
        PrependScheme::Never
    }
}

/// Set a pre-tokenizer's rule; true if it was another.
fn set_prefix_space(pre_tokenizer: &mut PreTokenizerWrapper, prefix_space: PrefixSpace) -> bool {
    match (pre_tokenizer, prefix_space) {
        (PreTokenizerWrapper::ByteLevel(level), PrefixSpace::ByteLevel(add)) => {
            std::mem::replace(&mut level.add_prefix_space, add) != add
        }
        (PreTokenizerWrapper::Metaspace(space), PrefixSpace::Metaspace(add)) => {
            let has = space.prepend_scheme != PrependScheme::Never;
            if has != add {
                space.prepend_scheme = scheme(add);
            }
            has != add
        }
        (PreTokenizerWrapper::Sequence(steps), _) => {
            let mut is_changed = false;
            for step in steps.as_mut() {
                is_changed |= set_prefix_space(step, prefix_space);
            }
            is_changed
        }
        _ => false,
    }
}

/// Set a decoder's rule: where no space was put in front, none is taken off.
fn set_stripped(decoder: &mut DecoderWrapper, add: bool) {
    match decoder {
        DecoderWrapper::Metaspace(space) => space.prepend_scheme = scheme(add),
        DecoderWrapper::Sequence(steps) if !add => {
            let kept = steps.get_decoders().iter().filter(
                |step| !matches!(step, DecoderWrapper::Strip(strip) if strip.content == ' '),
            );
            *decoder = DecoderWrapper::Sequence(DecoderSequence::new(kept.cloned().collect()));
        }
        _ => {}
    }
}
