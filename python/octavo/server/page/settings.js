// Settings of requests: the system prompt, sampling, reasoning and tools. Kept in this browser.

import { h } from "./dom.js";

const KEY = "octavo.settings";

// Each field of the dialog: its name in a request's body, what it is called, and its bounds.
const FIELDS = [
  { name: "system", label: "System prompt", kind: "text", rows: 4 },
  { name: "temperature", label: "Temperature", kind: "number", min: 0, max: 2, step: 0.05 },
  { name: "top_p", label: "Top p", kind: "number", min: 0, max: 1, step: 0.01 },
  { name: "top_k", label: "Top k", kind: "number", min: 0, step: 1 },
  { name: "min_p", label: "Min p", kind: "number", min: 0, max: 1, step: 0.01 },
  { name: "max_tokens", label: "Longest answer (tokens)", kind: "number", min: 1, step: 1 },
  { name: "seed", label: "Seed", kind: "number", step: 1 },
  { name: "presence_penalty", label: "Presence penalty", kind: "number", min: -2, max: 2, step: 0.1 },
  { name: "frequency_penalty", label: "Frequency penalty", kind: "number", min: -2, max: 2, step: 0.1 },
  { name: "repetition_penalty", label: "Repetition penalty", kind: "number", min: 0.1, step: 0.05 },
  {
    name: "reasoning_effort", label: "Reasoning", kind: "choice",
    choices: ["", "none", "low", "medium", "high"],
  },
  { name: "stop", label: "Stop at (one a line)", kind: "text", rows: 2 },
  {
    name: "tools", label: "Tools (JSON, as in OpenAI’s interface)", kind: "text", rows: 4,
    placeholder: '[{"type": "function", "function": {"name": "weather", "parameters": {…}}}]',
  },
];

/** The settings, their dialog's fields, and their part of a request. */
export class Settings {
  constructor(container) {
    this.container = container;
    try {
      this.values = JSON.parse(localStorage.getItem(KEY)) ?? {};
    } catch {
      this.values = {};
    }
    this.draw();
  }

  /** Forget all. */
  reset() {
    this.values = {};
    this.store();
    this.draw();
  }

  /** Messages that stand before a conversation's. */
  messages() {
    const system = this.values.system?.trim();
    return system ? [{ role: "system", content: system }] : [];
  }

  /** The fields of a request's body. Throws SyntaxError where the tools are not JSON. */
  body() {
    const { system, stop, tools, ...rest } = this.values;
    const body = Object.fromEntries(Object.entries(rest).filter(([, value]) => value !== ""));
    const stops = (stop ?? "").split("\n").filter((line) => line !== "");
    if (stops.length) body.stop = stops;
    if (tools?.trim()) {
      try {
        body.tools = JSON.parse(tools);
      } catch (error) {
        throw new SyntaxError(`The tools in the settings are not JSON: ${error.message}`);
      }
    }
    return body;
  }

  store() {
    localStorage.setItem(KEY, JSON.stringify(this.values));
  }

  draw() {
    this.container.replaceChildren(...FIELDS.map((field) => this.row(field)));
  }

  row(field) {
    const id = `setting-${field.name}`;
    const input = this.input(field, id);
    input.value = this.values[field.name] ?? "";
    input.addEventListener("input", () => {
      if (!input.checkValidity()) return;
      const isNumber = field.kind === "number" && input.value !== "";
      this.values[field.name] = isNumber ? Number(input.value) : input.value;
      this.store();
    });
    return h("div", { class: `field ${field.kind}` }, h("label", { for: id }, field.label), input);
  }

  input({ kind, rows, choices, min, max, step, placeholder }, id) {
    if (kind === "text") return h("textarea", { id, rows, placeholder, spellcheck: "false" });
    if (kind === "choice") {
      const options = choices.map((value) => h("option", { value }, value || "as the model does"));
      return h("select", { id }, options);
    }
    return h("input", { id, type: "number", min, max, step, inputmode: "decimal", placeholder: "default" });
  }
}
