//! The table of reasoning forms, and of the names they are known by.

use std::sync::LazyLock;

use crate::text::channels::envelope::Reasoning;
use crate::text::channels::tool_calls::{COHERE_FRAMES, HARMONY};

/// Other names, most of them vLLM's, and the forms they stand for.
pub(crate) const ALIASES: &[(&str, &str)] = &[
    ("cohere", "cohere_command3"),
    ("cohere_command4", "cohere_command3"),
    ("deepseek_r1", "think"),
    ("deepseek_v3", "think"),
    ("deepseek_v31", "think"),
    ("deepseek_v32", "think"),
    ("deepseek_v4", "think"),
    ("exaone4", "think"),
    ("glm45", "think"),
    ("glm47", "think"),
    ("gpt_oss", HARMONY),
    ("harmony", HARMONY),
    ("holo2", "think"),
    ("hy_v3", "think"),
    ("kimi_k2", "think"),
    ("kimi_k3", "think"),
    ("ling3", "think"),
    ("mimo", "think"),
    ("minimax_m2", "think"),
    ("minimax_m2_append_think", "think"),
    ("nemotron_v3", "think"),
    ("olmo3", "think"),
    ("openai_gptoss", HARMONY),
    ("poolside_v1", "think"),
    ("qwen3", "think"),
    ("step3", "think"),
    ("step3p5", "think"),
];

/// All forms but harmony's.
pub(crate) fn forms() -> &'static [Reasoning] {
    static FORMS: LazyLock<Vec<Reasoning>> = LazyLock::new(|| {
        let texts = |texts: &[&str]| texts.iter().map(|&text| text.to_owned()).collect();
        let form = |name: &str, open: &[&str], close: &[&str], frames: &[&str]| Reasoning {
            name: name.to_owned(),
            open: texts(open),
            close: texts(close),
            frames: texts(frames),
        };
        let think = |name, frames| form(name, &["<think>"], &["</think>"], frames);
        vec![
            form("apertus", &["<|inner_prefix|>"], &["<|inner_suffix|>"], &[]),
            form(
                "cohere_command3",
                &["<|START_THINKING|>"],
                &["<|END_THINKING|>"],
                COHERE_FRAMES,
            ),
            think("ernie45", &["<response>", "</response>"]),
            form("gemma4", &["<|channel>thought"], &["<channel|>"], &[]),
            form(
                "granite",
                &["Here is my thought process:", "Here's my thought process:"],
                &["Here is my response:", "Here's my response:"],
                &[],
            ),
            think("hunyuan_a13b", &["<answer>", "</answer>"]),
            form(
                "inkling",
                &["<|content_thinking|>"],
                &["<|end_message|>"],
                &["<|message_model|>", "<|content_text|>"],
            ),
            form("kimi_vl", &["◁think▷"], &["◁/think▷"], &[]),
            form("minimax_m3", &["<mm:think>"], &["</mm:think>"], &[]),
            form("mistral", &["[THINK]"], &["[/THINK]"], &[]),
            form("seed_oss", &["<seed:think>"], &["</seed:think>"], &[]),
            form("solar_open2", &["<|think:start|>"], &["<|think:end|>"], &[]),
            think("think", &[]),
        ]
    });
    &FORMS
}
