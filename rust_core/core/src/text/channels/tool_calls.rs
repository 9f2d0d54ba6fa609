//! The table of tool-call envelopes, and of the names they are known by.

use std::sync::LazyLock;

use crate::text::channels::envelope::{
    Arguments, Body, Envelope, Field, FieldKind, IdPlace, Keys, Tags,
};
use crate::text::channels::value::Dialect;

/// Harmony's calls are channels of messages: see `harmony`.
pub(crate) const HARMONY: &str = "openai";

/// Harmony's special tokens that its reader knows.
pub(crate) mod harmony_token {
    pub(crate) const CHANNEL: &str = "<|channel|>";
    pub(crate) const CONSTRAIN: &str = "<|constrain|>";
    pub(crate) const MESSAGE: &str = "<|message|>";
}

/// All of harmony's special tokens.
pub(crate) const HARMONY_TOKENS: [&str; 7] = [
    "<|start|>",
    "<|end|>",
    harmony_token::MESSAGE,
    harmony_token::CHANNEL,
    harmony_token::CONSTRAIN,
    "<|return|>",
    "<|call|>",
];

/// The text around harmony's reasoning.
pub(crate) const HARMONY_REASONING: (&str, &str) = ("<|channel|>analysis<|message|>", "<|end|>");

/// Other names, most of them vLLM's, and the envelopes they stand for.
pub(crate) const ALIASES: &[(&str, &str)] = &[
    ("cohere", "cohere_command3"),
    ("deepseek_v41", "deepseek_v4"),
    ("ernie45", "hermes"),
    ("exaone", "hermes"),
    ("glm4_moe", "glm45"),
    ("granite4", "hermes"),
    ("gpt_oss", HARMONY),
    ("harmony", HARMONY),
    ("hunyuan_a13b", "jamba"),
    ("kimi_k3", "kimi_k2"),
    ("ling3", "glm47"),
    ("llama3", "llama3_json"),
    ("llama4_json", "llama3_json"),
    ("mimo", "qwen3_coder"),
    ("minimax_m1", "minimax"),
    ("nemotron_json", "nemotron"),
    ("openai_gptoss", HARMONY),
    ("phi4", "phi4_mini_json"),
    ("poolside_v1", "glm45"),
    ("qwen", "hermes"),
    ("qwen25", "hermes"),
    ("qwen3", "hermes"),
    ("qwen3_xml", "qwen3_coder"),
    ("step3p5", "qwen3_coder"),
];

/// All envelopes but harmony's.
pub(crate) fn envelopes() -> &'static [Envelope] {
    static ENVELOPES: LazyLock<Vec<Envelope>> = LazyLock::new(|| {
        let mut all = objects();
        all.extend(named_values());
        all.extend(tagged());
        all.extend(languages());
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    });
    &ENVELOPES
}

/// `{"name": …, "arguments": …}` between markers, alone or in an array.
fn objects() -> Vec<Envelope> {
    let keyed = |keys: Keys| Body::Object {
        keys,
        in_array: false,
    };
    let object = || keyed(Keys::usual().clone());
    let array = |keys: Keys| Body::Object {
        keys,
        in_array: true,
    };
    let usual = || array(Keys::usual().clone());
    let parameters = || Keys::new("name", "parameters", "");
    let by_name = Keys {
        name_is_key: true,
        ..Keys::usual().clone()
    };
    vec![
        Envelope::new("hermes", object())
            .call(&["<tool_call>\n"], &["\n</tool_call>"])
            .separator("\n"),
        Envelope::new("longcat", object())
            .call(&["<longcat_tool_call>\n"], &["\n</longcat_tool_call>"])
            .separator("\n"),
        Envelope::new("llama3_json", keyed(parameters()))
            .call(&["<|python_tag|>"], &[])
            .separator("; ")
            .bare(),
        Envelope::new("xlam", usual()).bare(),
        Envelope::new("granite", usual())
            .section(&["<|tool_call|>", "<tool_call>"], &["", "</tool_call>"]),
        Envelope::new("granite-20b-fc", object())
            .call(&["<function_call> "], &[])
            .separator("\n"),
        Envelope::new("phi4_mini_json", usual())
            .section(&["functools[", "<|tool_call|>"], &["", "<|/tool_call|>"]),
        Envelope::new("jamba", usual()).section(&["<tool_calls>"], &["</tool_calls>"]),
        Envelope::new("minimax", object())
            .section(&["<tool_calls>\n"], &["\n</tool_calls>"])
            .separator("\n"),
        Envelope::new("nemotron", usual()).section(&["<TOOLCALL>"], &["</TOOLCALL>"]),
        Envelope::new("internlm", keyed(parameters()))
            .call(&["<|action_start|><|plugin|>\n"], &["<|action_end|>"]),
        Envelope::new("gigachat3", object())
            .call(&["function call<|role_sep|>\n"], &[])
            .frames(&["<|message_sep|>"]),
        Envelope::new("inkling", keyed(Keys::new("name", "args", "")))
            .call(&["<|content_invoke_tool_json|>"], &["<|end_message|>"])
            .frames(&["<|message_model|>", "<|content_text|>", "<|end_message|>"]),
        Envelope::new(
            "mistral_array",
            array(Keys::usual().clone().with_id(IdPlace::Last)),
        )
        .section(&["[TOOL_CALLS]"], &[]),
        Envelope::new(
            "cohere_command3",
            array(Keys::new("tool_name", "parameters", "tool_call_id").with_id(IdPlace::First)),
        )
        .section(&["<|START_ACTION|>"], &["<|END_ACTION|>"])
        .frames(COHERE_FRAMES),
        Envelope::new("apertus", array(by_name))
            .section(&["<|tools_prefix|>"], &["<|tools_suffix|>"]),
    ]
}

/// Markers around Cohere's answers.
pub(crate) const COHERE_FRAMES: &[&str] = &[
    "<|START_RESPONSE|>",
    "<|END_RESPONSE|>",
    "<|START_TEXT|>",
    "<|END_TEXT|>",
];

/// A name between markers, and then one value.
fn named_values() -> Vec<Envelope> {
    let json = |fields: Vec<Field>| Body::Fields {
        fields,
        arguments: Arguments::Value(Dialect::Json),
    };
    let name = |ends: &[(&str, usize)]| Field::new(FieldKind::Name, ends);
    let gemma = |mark: &str| Body::Fields {
        fields: vec![Field::new(FieldKind::Name, &[])],
        arguments: Arguments::Value(Dialect::marked(mark)),
    };
    let deepseek = |body: Body, version: &str| {
        Envelope::new(version, body).section(&["<｜tool▁calls▁begin｜>"], &["<｜tool▁calls▁end｜>"])
    };
    vec![
        Envelope::new(
            "mistral",
            json(vec![
                name(&[("[ARGS]", 2), ("[CALL_ID]", 1)]),
                Field::new(FieldKind::Id, &[("[ARGS]", 2)]),
            ]),
        )
        .call(&["[TOOL_CALLS]"], &[]),
        deepseek(json(vec![name(&[("\n```json\n", 1)])]), "deepseek_v3")
            .call(
                &["<｜tool▁call▁begin｜>function<｜tool▁sep｜>"],
                &["\n```<｜tool▁call▁end｜>", "<｜tool▁call▁end｜>"],
            )
            .separator("\n"),
        deepseek(json(vec![name(&[("<｜tool▁sep｜>", 1)])]), "deepseek_v31")
            .call(&["<｜tool▁call▁begin｜>"], &["<｜tool▁call▁end｜>"]),
        Envelope::new(
            "kimi_k2",
            json(vec![Field::new(
                FieldKind::NameInId,
                &[("<|tool_call_argument_begin|>", 1)],
            )]),
        )
        .section(
            &[
                "<|tool_calls_section_begin|>",
                "<|tool_call_section_begin|>",
            ],
            &["<|tool_calls_section_end|>", "<|tool_call_section_end|>"],
        )
        .call(&["<|tool_call_begin|>"], &["<|tool_call_end|>"]),
        Envelope::new("functionary_v3", json(vec![name(&[("\n", 1)])]))
            .call(&[">>>"], &[])
            .frames(&[">>>all\n"])
            .prompted(">>>"),
        Envelope::new("gemma4", gemma("<|\"|>"))
            .call(&["<|tool_call>call:"], &["<tool_call|>"])
            .tokens(&["<|\"|>"]),
        Envelope::new("functiongemma", gemma("<escape>"))
            .call(&["<start_function_call>call:"], &["<end_function_call>"])
            .tokens(&["<escape>"]),
    ]
}

/// A name between markers, and then a tag a parameter.
fn tagged() -> Vec<Envelope> {
    let tagged = |fields: Vec<Field>, tags: Tags| Body::Fields {
        fields,
        arguments: Arguments::Tags(tags),
    };
    let name = |ends: &[(&str, usize)]| Field::new(FieldKind::Name, ends);
    let function = |on_lines: bool| {
        let tags = Tags {
            on_lines,
            ..Tags::new("<parameter=", &[(">", None)], "</parameter>")
        };
        tagged(vec![name(&[(">\n", 1)])], tags)
    };
    let keyed = |field: Field, value_open: &str, separator: &str| {
        let tags = Tags {
            value_open: Some(value_open.to_owned()),
            separator: separator.to_owned(),
            ..Tags::new("<arg_key>", &[("</arg_key>", None)], "</arg_value>")
        };
        tagged(vec![field], tags)
    };
    let dsml = |name: &str, section: &str, other: &str| {
        let open = |section: &str| format!("<｜DSML｜{section}>\n");
        let close = |section: &str| format!("\n</｜DSML｜{section}>");
        let tags = Tags::new(
            "<｜DSML｜parameter name=\"",
            TYPED_ENDS,
            "</｜DSML｜parameter>",
        );
        Envelope::new(
            name,
            tagged(vec![Field::new(FieldKind::Name, &[("\">\n", 1)])], tags),
        )
        .section(
            &[&format!("\n\n{}", open(section)), &open(other)],
            &[&close(section), &close(other)],
        )
        .call(&["<｜DSML｜invoke name=\""], &["</｜DSML｜invoke>"])
        .separator("\n")
        .tokens(&["｜DSML｜"])
    };
    let mut all = vec![
        Envelope::new("qwen3_coder", function(true))
            .sections(&["<tool_call>\n"], &["\n</tool_call>"])
            .call(&["<function="], &["</function>"])
            .separator("\n"),
        Envelope::new("seed_oss", function(false))
            .sections(&["<seed:tool_call>\n"], &["\n</seed:tool_call>"])
            .call(&["<function="], &["</function>"])
            .separator("\n"),
        Envelope::new("glm45", keyed(name(&[("\n", 1)]), "\n<arg_value>", "\n"))
            .call(&["<tool_call>"], &["</tool_call>"])
            .separator("\n"),
        Envelope::new("glm47", keyed(name(&[]), "<arg_value>", ""))
            .call(&["<tool_call>"], &["</tool_call>"]),
        Envelope::new(
            "hy_v3",
            keyed(name(&[("<tool_sep>\n", 1)]), "\n<arg_value>", "\n"),
        )
        .section(&["<tool_calls>\n"], &["\n</tool_calls>"])
        .call(&["<tool_call>"], &["</tool_call>"])
        .separator("\n"),
        dsml("deepseek_v32", "function_calls", "tool_calls"),
        dsml("deepseek_v4", "tool_calls", "function_calls"),
    ];
    all.extend(attributed());
    all
}

/// The end of a parameter's name where a second attribute may tell its type.
const TYPED_ENDS: &[(&str, Option<bool>)] = &[
    ("\" string=\"true\">", Some(true)),
    ("\" string=\"false\">", Some(false)),
    ("\">", None),
];

/// Names as attributes of tags.
fn attributed() -> Vec<Envelope> {
    let tagged = |fields: Vec<Field>, tags: Tags| Body::Fields {
        fields,
        arguments: Arguments::Tags(tags),
    };
    let name = || Field::new(FieldKind::Name, &[("\">\n", 1)]);
    let plain = |open: &str, close: &str| Tags::new(open, &[("\">", None)], close);
    let ns = "]<]minimax[>[";
    let elements = Tags {
        is_nested: true,
        ..Tags::new(
            &format!("{ns}<"),
            &[(">", None)],
            &format!("{ns}</{{key}}>"),
        )
    };
    let solar = Tags {
        value_open: None,
        ..Tags::new(
            "<|tool_arg:start|>",
            &[("<|tool_arg:value|>", None)],
            "<|tool_arg:end|>",
        )
    };
    vec![
        Envelope::new(
            "minimax_m2",
            tagged(vec![name()], plain("<parameter name=\"", "</parameter>")),
        )
        .section(&["<minimax:tool_call>\n"], &["\n</minimax:tool_call>"])
        .call(&["<invoke name=\""], &["</invoke>"])
        .separator("\n"),
        Envelope::new("minimax_m3", tagged(vec![name()], elements))
            .section(
                &[&format!("{ns}<tool_call>\n")],
                &[&format!("\n{ns}</tool_call>")],
            )
            .call(
                &[&format!("{ns}<invoke name=\"")],
                &[&format!("{ns}</invoke>")],
            )
            .separator("\n")
            .tokens(&[ns]),
        Envelope::new(
            "step3",
            tagged(
                vec![name()],
                plain("<steptml:parameter name=\"", "</steptml:parameter>"),
            ),
        )
        .section(&["<｜tool_calls_begin｜>\n"], &["\n<｜tool_calls_end｜>"])
        .call(
            &["<｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name=\""],
            &["</steptml:invoke><｜tool_call_end｜>"],
        )
        .separator("\n"),
        Envelope::new(
            "minicpm5",
            tagged(vec![name()], plain("<param name=\"", "</param>")),
        )
        .call(&["<function name=\""], &["</function>"])
        .separator("\n"),
        Envelope::new(
            "cohere_command4",
            tagged(
                vec![
                    Field::new(FieldKind::Id, &[("\" name=\"", 1)]),
                    Field::new(FieldKind::Name, &[("\">\n", 2)]),
                ],
                Tags::new("<cofl:tool_param name=\"", TYPED_ENDS, "</cofl:tool_param>"),
            ),
        )
        .section(&["<cofl:tool_calls>\n"], &["\n</cofl:tool_calls>"])
        .call(&["<cofl:tool_call id=\""], &["</cofl:tool_call>"])
        .separator("\n")
        .frames(COHERE_FRAMES),
        Envelope::new(
            "solar_open2",
            tagged(vec![Field::new(FieldKind::Name, &[("\n", 1)])], solar),
        )
        .call(&["<|tool_call:start|>"], &["<|tool_call:end|>"])
        .separator("\n"),
    ]
}

/// Python.
fn languages() -> Vec<Envelope> {
    let list = || Body::Python { in_list: true };
    vec![
        Envelope::new("pythonic", list()).bare(),
        Envelope::new("llama4_pythonic", list())
            .call(&["<|python_start|>"], &["<|python_end|>"])
            .bare(),
        Envelope::new("lfm2", list()).call(&["<|tool_call_start|>"], &["<|tool_call_end|>"]),
        Envelope::new("olmo3", Body::Python { in_list: false })
            .call(&["<function_calls>\n"], &["\n</function_calls>"])
            .separator("\n"),
    ]
}
