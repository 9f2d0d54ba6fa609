//! A parameter's value that holds tags itself, as JSON: members of an object, or items of an array.

use crate::text::channels::envelope::Tags;
use crate::text::channels::piece::quote;
use crate::text::channels::schema::{ArgumentType, to_json};

/// The name of an array's elements.
const ITEM: &str = "item";

/// Tags inside tags are read this deep; what is deeper stays text.
const MAX_DEPTH: usize = 64;

/// Writes a value with tags in it. What does not fit together is a string.
pub(crate) fn elements_to_json(text: &str, tags: &Tags, out: &mut String) {
    match children(text, tags) {
        Some(children) => write(&children, tags, 0, out),
        None => quote(text, out),
    }
}

/// The elements that a text consists of: (name, content); None if it does not.
fn children<'a>(text: &'a str, tags: &Tags) -> Option<Vec<(&'a str, &'a str)>> {
    let mut children = Vec::new();
    let mut rest = text.trim();
    while !rest.is_empty() {
        let (name, after) = rest.strip_prefix(&*tags.open)?.split_once('>')?;
        let close = tags.close.replace("{key}", name);
        let (content, after) = split_close(after, &format!("{}{name}>", tags.open), &close)?;
        children.push((name, content));
        rest = after.trim_start();
    }
    Some(children)
}

/// Cuts at the closing tag that belongs to the opening one in front of `text`.
fn split_close<'a>(text: &'a str, open: &str, close: &str) -> Option<(&'a str, &'a str)> {
    let mut depth = 0;
    let mut at = 0;
    loop {
        let end = at + text[at..].find(close)?;
        depth += text[at..end].matches(open).count();
        at = end + close.len();
        if depth == 0 {
            return Some((&text[..end], &text[at..]));
        }
        depth -= 1;
    }
}

fn write(children: &[(&str, &str)], tags: &Tags, depth: usize, out: &mut String) {
    let is_array = children.iter().all(|(name, _)| *name == ITEM);
    out.push(if is_array { '[' } else { '{' });
    for (index, (name, content)) in children.iter().enumerate() {
        if index > 0 {
            out.push_str(", ");
        }
        if !is_array {
            quote(name, out);
            out.push_str(": ");
        }
        let inner = match content.contains(&*tags.open) && depth < MAX_DEPTH {
            true => self::children(content, tags),
            false => None,
        };
        match inner {
            Some(inner) => write(&inner, tags, depth + 1, out),
            None => to_json(content, ArgumentType::Either, out),
        }
    }
    out.push(if is_array { ']' } else { '}' });
}
