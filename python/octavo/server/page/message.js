// One message on the page: who said it, its reasoning folded, its tool calls, its text, its actions.

import { codeBlock } from "./code.js";
import { copy, h } from "./dom.js";
import { LiveMarkdown } from "./markdown.js";

const NAMES = { user: "You", assistant: "Model", tool: "Tool’s result", system: "System" };

/** The element of a message, which may still grow. */
export class MessageView {
  /** `actions`: pairs of a label and a function, shown below the text. */
  constructor(message, actions = []) {
    this.reasoning = new LiveMarkdown();
    this.fold = h("details", { class: "reasoning", hidden: true }, h("summary", {}, "Reasoning"), this.reasoning.element);
    this.text = message.role === "assistant" ? new LiveMarkdown() : null;
    this.plain = h("div", { class: "plain" });
    this.calls = h("div", { class: "calls" });
    this.stats = h("span", { class: "stats" });
    this.error = h("p", { class: "error", role: "alert", hidden: true });
    this.actions = h("div", { class: "actions" }, this.stats);
    this.element = h(
      "li",
      { class: `message ${message.role}` },
      h("h3", { class: "hidden" }, NAMES[message.role] ?? message.role),
      this.fold,
      this.text?.element ?? this.plain,
      this.calls,
      this.error,
      this.actions,
    );
    this.message = message;
    this.callsShown = "";
    this.fold.addEventListener("toggle", () => this.updateReasoning());
    for (const [label, act] of actions) this.addAction(label, act);
    this.update();
  }

  addAction(label, act) {
    const button = h("button", { type: "button", class: "small" }, label);
    button.addEventListener("click", () => act(button));
    this.actions.append(button);
  }

  /** Show the message as it is now. `isRunning`: more will come. */
  update(isRunning = false) {
    const { content, reasoning, tool_calls: calls, stats, error } = this.message;
    this.element.setAttribute("aria-busy", String(isRunning));
    this.actions.hidden = isRunning;
    if (reasoning) {
      this.fold.hidden = false;
      const isThinking = isRunning && !content && !calls;
      this.fold.firstChild.textContent = isThinking ? "Reasoning…" : "Reasoning";
      this.updateReasoning();
    }
    if (this.text) this.text.update(content ?? "");
    else this.plain.textContent = content ?? "";
    this.updateCalls(calls ?? []);
    this.stats.textContent = stats ?? "";
    this.error.hidden = !error;
    this.error.textContent = error ?? "";
  }

  updateReasoning() {
    // Folded it is not seen, and may be long.
    if (this.fold.open) this.reasoning.update(this.message.reasoning);
  }

  updateCalls(calls) {
    const written = JSON.stringify(calls);
    if (written === this.callsShown) return;
    this.callsShown = written;
    this.calls.replaceChildren(...calls.filter(Boolean).map(callBox));
  }
}

function callBox(call) {
  return h(
    "section",
    { class: "call", "aria-label": `Call of ${call.function.name}` },
    h("p", {}, "calls ", h("strong", {}, call.function.name)),
    codeBlock(indented(call.function.arguments), "json"),
  );
}

function indented(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    // It is still being written.
    return text;
  }
}

/** Actions of every message. */
export const copyAction = (message) => ["Copy", (button) => copy(message.content ?? "", button)];
