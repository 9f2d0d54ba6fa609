// The chat: a conversation on the page, and the answers that stream into it.

import { Answer, forRequest } from "./answer.js";
import * as store from "./conversations.js";
import { byId, h } from "./dom.js";
import { MessageView, copyAction } from "./message.js";

const STARTERS = [
  "Explain paged attention to someone who knows operating systems.",
  "Write a Python function that merges overlapping intervals, with tests.",
  "Compare three ways to brew coffee in a table.",
];
// As near to its end, a scrolled text follows what is added.
const NEAR_PX = 60;

/** The view of one conversation at a time. */
export class Chat {
  /** `modelId()`: the model to ask; `onChange()`: the list of conversations has changed. */
  constructor(api, settings, modelId, onChange) {
    Object.assign(this, { api, settings, modelId, onChange });
    this.scroll = byId("scroll");
    this.toEnd = byId("to-end");
    this.list = byId("messages");
    this.prompt = byId("prompt");
    this.controller = null;
    this.conversation = store.newConversation();
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    byId("stop").addEventListener("click", () => this.stop());
    this.scroll.addEventListener("scroll", () => (this.toEnd.hidden = this.isNearEnd()), { passive: true });
    this.toEnd.addEventListener("click", () => this.follow(true));
    this.prompt.addEventListener("input", () => this.fitPrompt());
    this.prompt.addEventListener("keydown", (event) => this.onKey(event));
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !document.querySelector("dialog[open]")) this.stop();
    });
    byId("starters").append(
      ...STARTERS.map((text) => h("button", { type: "button", onclick: () => this.send(text) }, text)),
    );
  }

  get isRunning() {
    return this.controller !== null;
  }

  /** Show a conversation; one under way is stopped. */
  open(conversation) {
    this.stop();
    this.conversation = conversation;
    this.draw();
    this.prompt.focus({ preventScroll: true });
  }

  /** Stop the answer; what has come of it stays. */
  stop() {
    this.controller?.abort();
  }

  /** Send a message, by default what was typed. */
  async send(text = this.prompt.value) {
    if (this.isRunning || !text.trim()) return;
    this.prompt.value = "";
    this.fitPrompt();
    this.conversation.messages.push({ role: "user", content: text.trim() });
    await this.ask();
  }

  /** Ask for the next message of the conversation. */
  async ask() {
    const conversation = this.conversation;
    const answer = new Answer();
    // What was asked outlives the tab, whatever becomes of the answer.
    const isKept = store.save(conversation);
    this.onChange();
    this.setRunning(new AbortController());
    this.draw();
    const view = new MessageView(answer.message);
    this.list.append(view.element);
    view.update(true);
    this.follow(true);
    let ending = null;
    let frame = 0;
    const draw = () => {
      frame = 0;
      const isNear = this.isNearEnd();
      view.update(true);
      this.follow(isNear);
    };
    try {
      for await (const chunk of this.api.chat(this.body(), this.controller.signal)) {
        // As often as the screen is drawn, not as often as tokens come.
        if (answer.take(chunk)) frame ||= requestAnimationFrame(draw);
      }
    } catch (error) {
      if (error.name === "AbortError") ending = "stopped";
      else answer.message.error = describe(error);
    }
    cancelAnimationFrame(frame);
    this.setRunning(null);
    conversation.messages.push(answer.close(ending));
    // One that was deleted meanwhile stays deleted.
    const isDeleted = isKept && !store.load(conversation.id);
    if (!isDeleted && !store.save(conversation)) answer.message.error ??= "This browser has no room to keep it.";
    this.onChange();
    this.draw();
  }

  body() {
    return {
      model: this.modelId(),
      messages: [...this.settings.messages(), ...this.conversation.messages
        // A message that only holds an error is not the model's.
        .filter(({ role, content, tool_calls: calls }) => role !== "assistant" || content || calls)
        .map(forRequest)],
      ...this.settings.body(),
      stream: true,
      stream_options: { include_usage: true },
    };
  }

  /** Ask again: from the last message that is not the model's. */
  async regenerate() {
    if (this.isRunning) return;
    const { messages } = this.conversation;
    while (messages.at(-1)?.role === "assistant") messages.pop();
    if (messages.length) await this.ask();
  }

  /** Take a message back into the composer, and all that followed it away. */
  edit(message) {
    if (this.isRunning) return;
    const { messages } = this.conversation;
    messages.length = messages.indexOf(message);
    this.prompt.value = message.content;
    this.draw();
    this.fitPrompt();
    this.prompt.focus();
  }

  /** Answer the calls of the last message, and go on. */
  async answerCalls(calls, results) {
    calls.forEach(({ id }, i) => {
      this.conversation.messages.push({ role: "tool", tool_call_id: id, content: results[i] });
    });
    await this.ask();
  }

  draw() {
    const isNear = this.isNearEnd();
    const { messages } = this.conversation;
    byId("welcome").hidden = messages.length > 0;
    const last = messages.at(-1);
    this.list.replaceChildren(...messages.map((m) => new MessageView(m, this.actions(m, m === last)).element));
    const calls = this.isRunning ? [] : (last?.tool_calls ?? []);
    if (calls.length) this.list.append(this.callForm(calls));
    this.follow(isNear);
  }

  actions(message, isLast) {
    const again = ["Regenerate", () => this.regenerate()];
    if (message.role === "user") {
      const actions = [copyAction(message), ["Edit", () => this.edit(message)]];
      // Its answer never came: the page was closed.
      return isLast && !this.isRunning ? [...actions, ["Ask again", again[1]]] : actions;
    }
    if (message.role !== "assistant") return [];
    return isLast ? [copyAction(message), again] : [copyAction(message)];
  }

  callForm(calls) {
    const fields = calls.map((call) =>
      h("label", {}, `Result of ${call.function.name}`, h("textarea", { rows: 2, required: true })));
    const form = h("form", { class: "results" }, fields, h("button", { class: "primary" }, "Send results"));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.answerCalls(calls, fields.map((field) => field.querySelector("textarea").value));
    });
    return h("li", {}, form);
  }

  setRunning(controller) {
    this.controller = controller;
    byId("send").hidden = controller !== null;
    byId("stop").hidden = controller === null;
  }

  isNearEnd() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroll;
    return scrollHeight - scrollTop - clientHeight < NEAR_PX;
  }

  follow(isWanted) {
    if (isWanted) this.scroll.scrollTop = this.scroll.scrollHeight;
    this.toEnd.hidden = this.isNearEnd();
  }

  fitPrompt() {
    this.prompt.style.height = "auto";
    this.prompt.style.height = `${this.prompt.scrollHeight + 2}px`;
  }

  onKey(event) {
    // While a word is being composed, Enter belongs to the input method.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    this.send();
  }
}

function describe(error) {
  if (error instanceof TypeError) return "The server does not answer.";
  return error.message;
}
