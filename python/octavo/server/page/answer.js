// An answer under way: chunks of a stream gathered into one message, and its figures.

/** Gathers chunks. `message` is what the conversation keeps. */
export class Answer {
  constructor() {
    this.message = { role: "assistant", content: "" };
    this.began = performance.now();
    this.firstToken = null;
    this.finishReason = null;
    this.usage = null;
  }

  /** Take a chunk. Returns true where it changed what is shown. */
  take(chunk) {
    if (chunk.usage) this.usage = chunk.usage;
    const choice = chunk.choices?.[0];
    if (!choice) return false;
    if (choice.finish_reason) this.finishReason = choice.finish_reason;
    const { content, reasoning, tool_calls: calls } = choice.delta;
    if (!(content || reasoning || calls)) return false;
    this.firstToken ??= performance.now();
    if (content) this.message.content += content;
    if (reasoning) this.message.reasoning = (this.message.reasoning ?? "") + reasoning;
    for (const call of calls ?? []) this.takeCall(call);
    return true;
  }

  takeCall({ index, id, function: part }) {
    const all = (this.message.tool_calls ??= []);
    const call = (all[index] ??= { id, type: "function", function: { name: "", arguments: "" } });
    if (id) call.id = id;
    call.function.name += part?.name ?? "";
    call.function.arguments += part?.arguments ?? "";
  }

  /** Close it: a line of figures goes into the message. `ending`: a word where it was cut off. */
  close(ending = null) {
    const parts = [];
    const tokens = this.usage?.completion_tokens;
    if (tokens) parts.push(`${tokens} token${tokens === 1 ? "" : "s"}`);
    if (this.firstToken !== null) {
      const seconds = (performance.now() - this.firstToken) / 1000;
      // The first token's time is the prompt's.
      if (tokens > 1 && seconds > 0) parts.push(`${((tokens - 1) / seconds).toFixed(1)} tok/s`);
      parts.push(`first after ${((this.firstToken - this.began) / 1000).toFixed(2)} s`);
    }
    const cached = this.usage?.prompt_tokens_details?.cached_tokens;
    if (cached) parts.push(`${cached} of ${this.usage.prompt_tokens} prompt tokens cached`);
    if (this.finishReason === "length") parts.push("cut off: longest answer reached");
    if (ending) parts.push(ending);
    this.message.stats = parts.join(" · ");
    return this.message;
  }
}

/** A message as a request carries it, without what only this page knows. */
export function forRequest({ role, content, reasoning, tool_calls, tool_call_id }) {
  const message = { role, content };
  if (reasoning) message.reasoning = reasoning;
  if (tool_calls?.length) message.tool_calls = tool_calls;
  if (tool_call_id) message.tool_call_id = tool_call_id;
  return message;
}
