//! The grammar of harmony's calls.

use crate::text::channels::grammar::options::{Extent, GrammarOptions};
use crate::text::channels::grammar::parameters::Tool;
use crate::text::channels::rules::{Rules, any_object};
use crate::text::channels::tool_calls::harmony_token;

/// Harmony's words before a function's name, the usual way first. Its special tokens keep it out of
/// thoughts about calls.
pub(super) const HARMONY_CALLS: [&str; 3] = [
    "<|channel|>commentary to=functions.",
    "<|channel|>analysis to=functions.",
    "<|start|>assistant to=functions.",
];

pub(super) fn write_harmony(
    rules: &mut Rules<'_>,
    tools: &[Tool<'_>],
    options: &GrammarOptions<'_>,
) {
    let is_free = options.extent == Extent::Calls;
    let mut names = Vec::new();
    for (number, tool) in tools.iter().enumerate() {
        let head = match is_free {
            // The channel may stand behind the recipient, and the form go untold.
            true => {
                let name = rules.literal(tool.name);
                let channel = rules.literal(harmony_token::CHANNEL);
                let constrain = rules.literal(harmony_token::CONSTRAIN);
                let message = rules.literal(harmony_token::MESSAGE);
                let channel = format!("({channel} (\"commentary\" | \"analysis\"))?");
                let form = format!("(\" \"? {constrain} \"json\"? | \" json\")?");
                format!("{name} {channel} {form} {message}")
            }
            false => rules.literal(&format!(
                "{}{} <|constrain|>json<|message|>",
                HARMONY_CALLS[0], tool.name
            )),
        };
        let arguments = rules.json(tool.schema.as_ref().unwrap_or(&any_object()));
        let rule = format!("call_{number}");
        let body = rules.sequence(&[&head, &arguments]);
        rules.add(&rule, &body);
        names.push(rule);
    }
    rules.add("call", &names.join(" | "));
    if is_free {
        rules.add_text();
        let heads = HARMONY_CALLS.iter().enumerate();
        let starts: Vec<String> = heads
            .map(|(number, text)| format!("{} call", rules.text_and_head(text, number)))
            .collect();
        rules.add("start", &format!("({}) TEXT", starts.join(" | ")));
        return;
    }
    let next = rules.literal("<|start|>assistant");
    let call_end = rules.literal("<|call|>");
    let analysis = rules.literal("<|channel|>analysis<|message|>");
    let end = rules.literal("<|end|>");
    rules.add_text();
    let message_end = match rules.is_special("<|end|>") {
        true => format!("TEXT {end}"),
        false => rules.text_up_to("message_text", "<|end|>"),
    };
    rules.add("thought", &format!("{analysis} {message_end} {next}"));
    let more = match options.at_most_one {
        true => String::new(),
        false => format!("({call_end} {next} thought? call)*"),
    };
    let calls = format!("thought? call {more}");
    if options.at_least_one {
        // Thinking may have been constrained by nothing, and its end leave the next header to us.
        rules.add("start", &format!("({next})? {calls}"));
        return;
    }
    let channel = rules.literal("<|channel|>");
    let message = rules.literal("<|message|>");
    let preamble = format!("{channel} \"commentary\" {message} {message_end} {next}");
    rules.add("preamble", &preamble);
    rules.add("answer", &format!("{channel} \"final\" {message} TEXT"));
    rules.add(
        "start",
        &format!("({next})? thought? preamble? (answer | call {more})"),
    );
}
