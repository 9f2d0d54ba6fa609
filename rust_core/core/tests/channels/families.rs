//! Calls as the models of every family write them: see the templates of their checkpoints.

use serde_json::{Value, json};

use crate::support::Call;

fn call_object(call: &Call, name: &str, arguments: &str) -> String {
    format!(
        "{{\"{name}\": {}, \"{arguments}\": {}}}",
        json!(call.name),
        call.json()
    )
}

fn usual(call: &Call) -> String {
    call_object(call, "name", "arguments")
}

fn join(calls: &[Call], separator: &str, one: impl Fn(&Call) -> String) -> String {
    calls.iter().map(one).collect::<Vec<_>>().join(separator)
}

/// A parameter's text: strings as they are.
fn raw(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn tags(call: &Call, one: impl Fn(&str, &Value) -> String) -> String {
    call.arguments
        .iter()
        .map(|(key, value)| one(key, value))
        .collect()
}

fn python(value: &Value) -> String {
    match value {
        Value::Null => "None".to_owned(),
        Value::Bool(true) => "True".to_owned(),
        Value::Bool(false) => "False".to_owned(),
        Value::String(text) => {
            let escaped = text.replace('\\', "\\\\").replace('\'', "\\'");
            format!("'{}'", escaped.replace('\n', "\\n"))
        }
        Value::Array(items) => {
            let items: Vec<String> = items.iter().map(python).collect();
            format!("[{}]", items.join(", "))
        }
        Value::Object(pairs) => {
            let pair = |(key, value): (&String, &Value)| {
                format!("{}: {}", python(&json!(key)), python(value))
            };
            format!(
                "{{{}}}",
                pairs.iter().map(pair).collect::<Vec<_>>().join(", ")
            )
        }
        number => number.to_string(),
    }
}

fn python_call(call: &Call) -> String {
    let one = |(key, value): (&String, &Value)| format!("{key}={}", python(value));
    let arguments: Vec<String> = call.arguments.iter().map(one).collect();
    format!("{}({})", call.name, arguments.join(", "))
}

fn marked(value: &Value, mark: &str) -> String {
    match value {
        Value::String(text) => format!("{mark}{text}{mark}"),
        Value::Array(items) => {
            let items: Vec<String> = items.iter().map(|item| marked(item, mark)).collect();
            format!("[{}]", items.join(","))
        }
        Value::Object(pairs) => {
            let pair = |(key, value): (&String, &Value)| format!("{key}:{}", marked(value, mark));
            format!(
                "{{{}}}",
                pairs.iter().map(pair).collect::<Vec<_>>().join(",")
            )
        }
        other => other.to_string(),
    }
}

fn function(call: &Call, line: &str) -> String {
    let body = tags(call, |key, value| {
        format!("<parameter={key}>{line}{}{line}</parameter>\n", raw(value))
    });
    format!("<function={}>\n{body}</function>", call.name)
}

fn keyed(call: &Call, line: &str) -> String {
    tags(call, |key, value| {
        format!(
            "<arg_key>{key}</arg_key>{line}<arg_value>{}</arg_value>{line}",
            raw(value)
        )
    })
}

fn typed(call: &Call, tag: &str) -> String {
    tags(call, |key, value| {
        let is_text = value.is_string();
        format!(
            "<{tag} name=\"{key}\" string=\"{is_text}\">{}</{tag}>\n",
            raw(value)
        )
    })
}

/// Calls as a model of the family writes them.
#[allow(clippy::too_many_lines)] // a few a family
pub(crate) fn render(format: &str, calls: &[Call]) -> String {
    let array = |one: fn(&Call) -> String| format!("[{}]", join(calls, ", ", one));
    let parameters = |call: &Call| call_object(call, "name", "parameters");
    match format {
        "hermes" => join(calls, "\n", |c| {
            format!("<tool_call>\n{}\n</tool_call>", usual(c))
        }),
        "longcat" => join(calls, "\n", |c| {
            format!("<longcat_tool_call>\n{}\n</longcat_tool_call>", usual(c))
        }),
        "llama3_json" => join(calls, "; ", parameters),
        "xlam" => array(usual),
        "granite" => format!("<|tool_call|>{}", array(usual)),
        "granite-20b-fc" => join(calls, "\n", |c| format!("<function_call> {}", usual(c))),
        "phi4_mini_json" => format!("functools{}", array(usual)),
        "jamba" => format!("<tool_calls>{}</tool_calls>", array(usual)),
        "minimax" => format!("<tool_calls>\n{}\n</tool_calls>", join(calls, "\n", usual)),
        "nemotron" => format!("<TOOLCALL>{}</TOOLCALL>", array(usual)),
        "internlm" => join(calls, "", |c| {
            format!(
                "<|action_start|><|plugin|>\n{}<|action_end|>",
                parameters(c)
            )
        }),
        "gigachat3" => join(calls, "", |c| {
            format!("function call<|role_sep|>\n{}", usual(c))
        }),
        "inkling" => join(calls, "", |c| {
            let object = call_object(c, "name", "args");
            format!("<|content_invoke_tool_json|>{object}<|end_message|>")
        }),
        "mistral" => join(calls, "", |c| {
            format!("[TOOL_CALLS]{}[ARGS]{}", c.name, c.json())
        }),
        "mistral_array" => format!("[TOOL_CALLS]{}", array(usual)),
        "cohere_command3" => {
            let one = |c: &Call| call_object(c, "tool_name", "parameters");
            format!(
                "<|START_ACTION|>[\n    {}\n]<|END_ACTION|>",
                join(calls, ",\n    ", one)
            )
        }
        "apertus" => {
            let one = |c: &Call| format!("{{{}: {}}}", json!(c.name), c.json());
            format!(
                "<|tools_prefix|>[{}]<|tools_suffix|>",
                join(calls, ", ", one)
            )
        }
        "deepseek_v3" => {
            let one = |c: &Call| {
                let (name, json) = (&c.name, c.json());
                format!(
                    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{json}\n```\
                     <｜tool▁call▁end｜>"
                )
            };
            let calls = join(calls, "\n", one);
            format!("<｜tool▁calls▁begin｜>{calls}<｜tool▁calls▁end｜>")
        }
        "deepseek_v31" => {
            let one = |c: &Call| {
                let (name, json) = (&c.name, c.json());
                format!("<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{json}<｜tool▁call▁end｜>")
            };
            format!(
                "<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>",
                join(calls, "", one)
            )
        }
        "kimi_k2" => {
            let one = |c: &Call| {
                let (name, json) = (&c.name, c.json());
                format!(
                    "<|tool_call_begin|>functions.{name}:3<|tool_call_argument_begin|>{json}\
                     <|tool_call_end|>"
                )
            };
            let calls = join(calls, "", one);
            format!("<|tool_calls_section_begin|>{calls}<|tool_calls_section_end|>")
        }
        // The prompt has written the first mark.
        "functionary_v3" => join(calls, ">>>", |c| format!("{}\n{}", c.name, c.json())),
        "gemma4" => join(calls, "", |c| {
            let arguments = marked(&Value::Object(c.arguments.clone()), "<|\"|>");
            format!("<|tool_call>call:{}{arguments}<tool_call|>", c.name)
        }),
        "functiongemma" => join(calls, "", |c| {
            let arguments = marked(&Value::Object(c.arguments.clone()), "<escape>");
            format!(
                "<start_function_call>call:{}{arguments}<end_function_call>",
                c.name
            )
        }),
        "qwen3_coder" => join(calls, "\n", |c| {
            format!("<tool_call>\n{}\n</tool_call>", function(c, "\n"))
        }),
        "seed_oss" => join(calls, "\n", |c| {
            format!("<seed:tool_call>\n{}\n</seed:tool_call>", function(c, ""))
        }),
        "glm45" => join(calls, "\n", |c| {
            format!("<tool_call>{}\n{}</tool_call>", c.name, keyed(c, "\n"))
        }),
        "glm47" => join(calls, "", |c| {
            format!("<tool_call>{}{}</tool_call>", c.name, keyed(c, ""))
        }),
        "hy_v3" => {
            let one = |c: &Call| {
                format!(
                    "<tool_call>{}<tool_sep>\n{}</tool_call>",
                    c.name,
                    keyed(c, "\n")
                )
            };
            format!("<tool_calls>\n{}\n</tool_calls>", join(calls, "\n", one))
        }
        "deepseek_v32" | "deepseek_v4" => {
            let section = match format {
                "deepseek_v32" => "function_calls",
                _ => "tool_calls",
            };
            let one = |c: &Call| {
                let body = typed(c, "｜DSML｜parameter");
                format!(
                    "<｜DSML｜invoke name=\"{}\">\n{body}</｜DSML｜invoke>",
                    c.name
                )
            };
            let calls = join(calls, "\n", one);
            format!("\n\n<｜DSML｜{section}>\n{calls}\n</｜DSML｜{section}>")
        }
        "minimax_m2" => {
            let one = |c: &Call| {
                let body = tags(c, |key, value| {
                    format!("<parameter name=\"{key}\">{}</parameter>\n", raw(value))
                });
                format!("<invoke name=\"{}\">\n{body}</invoke>", c.name)
            };
            format!(
                "<minimax:tool_call>\n{}\n</minimax:tool_call>",
                join(calls, "\n", one)
            )
        }
        "minimax_m3" => {
            let ns = "]<]minimax[>[";
            let one = |c: &Call| {
                let body = tags(c, |key, value| {
                    format!("{ns}<{key}>{}{ns}</{key}>\n", raw(value))
                });
                format!("{ns}<invoke name=\"{}\">\n{body}{ns}</invoke>", c.name)
            };
            format!(
                "{ns}<tool_call>\n{}\n{ns}</tool_call>",
                join(calls, "\n", one)
            )
        }
        "step3" => {
            let one = |c: &Call| {
                let body = tags(c, |key, value| {
                    format!(
                        "<steptml:parameter name=\"{key}\">{}</steptml:parameter>",
                        raw(value)
                    )
                });
                format!(
                    "<｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name=\"{}\">\n{body}\
                     </steptml:invoke><｜tool_call_end｜>",
                    c.name
                )
            };
            let calls = join(calls, "\n", one);
            format!("<｜tool_calls_begin｜>\n{calls}\n<｜tool_calls_end｜>")
        }
        "minicpm5" => join(calls, "\n", |c| {
            let body = tags(c, |key, value| {
                format!("<param name=\"{key}\">{}</param>", raw(value))
            });
            format!("<function name=\"{}\">{body}</function>", c.name)
        }),
        "cohere_command4" => {
            let one = |c: &Call| {
                let body = typed(c, "cofl:tool_param");
                format!(
                    "<cofl:tool_call id=\"7\" name=\"{}\">\n{body}</cofl:tool_call>",
                    c.name
                )
            };
            format!(
                "<cofl:tool_calls>\n{}\n</cofl:tool_calls>",
                join(calls, "\n", one)
            )
        }
        "solar_open2" => join(calls, "\n", |c| {
            let body = tags(c, |key, value| {
                format!(
                    "<|tool_arg:start|>{key}<|tool_arg:value|>{}<|tool_arg:end|>\n",
                    raw(value)
                )
            });
            format!("<|tool_call:start|>{}\n{body}<|tool_call:end|>", c.name)
        }),
        "pythonic" => array(python_call),
        "llama4_pythonic" => format!("<|python_start|>{}<|python_end|>", array(python_call)),
        "lfm2" => format!("<|tool_call_start|>{}<|tool_call_end|>", array(python_call)),
        "olmo3" => {
            format!(
                "<function_calls>\n{}\n</function_calls>",
                join(calls, "\n", python_call)
            )
        }
        "openai" => join(calls, "<|call|><|start|>assistant", |c| {
            let (name, json) = (&c.name, c.json());
            format!("<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{json}")
        }),
        other => panic!("{other} is not written here"),
    }
}
