// Conversations, kept in this browser's storage: one entry each, and a list of them.
//
// A conversation is {id, title, changed, messages}; a message is as the chat interface has it
// (role, content, reasoning, tool_calls, tool_call_id), and `stats` and `error` beside that.

const PREFIX = "octavo.conversation.";
const MAX_TITLE = 60;

/** A new conversation, which is stored once it has a message. */
export function newConversation() {
  // randomUUID is missing from pages over plain HTTP.
  const id = `${Date.now().toString(36)}${Math.random().toString(36).slice(2, 8)}`;
  return { id, title: "", changed: Date.now(), messages: [] };
}

/** Every stored conversation, the last changed first. */
export function all() {
  const found = [];
  for (let i = 0; i < localStorage.length; i += 1) {
    const key = localStorage.key(i);
    if (!key.startsWith(PREFIX)) continue;
    const conversation = load(key.slice(PREFIX.length));
    if (conversation) found.push(conversation);
  }
  return found.sort((a, b) => b.changed - a.changed);
}

/** The stored conversation of an id, or null. */
export function load(id) {
  try {
    const value = JSON.parse(localStorage.getItem(PREFIX + id));
    return Array.isArray(value?.messages) ? value : null;
  } catch {
    return null;
  }
}

/** Store a conversation. Returns false where the browser has no room even without older ones. */
export function save(conversation) {
  const first = conversation.messages.find((message) => message.role === "user");
  conversation.title ||= (first?.content ?? "").trim().split("\n")[0].slice(0, MAX_TITLE);
  conversation.changed = Date.now();
  const text = JSON.stringify(conversation);
  for (;;) {
    try {
      localStorage.setItem(PREFIX + conversation.id, text);
      return true;
    } catch {
      const oldest = all().filter(({ id }) => id !== conversation.id).at(-1);
      if (!oldest) return false;
      remove(oldest.id);
    }
  }
}

/** Forget a conversation. */
export const remove = (id) => localStorage.removeItem(PREFIX + id);
