// The page: its parts joined, the model chosen, views switched, the key asked for.

import { Api } from "./api.js";
import { Chat } from "./chat.js";
import * as store from "./conversations.js";
import { byId, h } from "./dom.js";
import { Live } from "./live.js";
import { Settings } from "./settings.js";
import { Similarity } from "./similarity.js";

const VIEWS = ["chat", "similarity", "live"];
const LOADING_RETRY_MS = 1000;

const api = new Api(askKey);
const settings = new Settings(byId("settings-fields"));
const modelSelect = byId("model");
const modelId = () => modelSelect.value;
const chat = new Chat(api, settings, modelId, drawConversations);
const live = new Live(api, (error) => notify(error && `The metrics cannot be read: ${error.message}`));
new Similarity(api, modelId);
let models = [];
let asking = null;

/** Ask for the API key; several requests wait for one answer. */
function askKey(message) {
  asking ??= new Promise((resolve) => {
    const dialog = byId("key-dialog");
    byId("key-error").textContent = message;
    byId("key").value = "";
    dialog.addEventListener("close", () => {
      asking = null;
      api.setKey(byId("key").value.trim(), byId("keep-key").checked);
      resolve();
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

// Without a key nothing works: Escape must not close the question.
byId("key-dialog").addEventListener("cancel", (event) => event.preventDefault());

function notify(text) {
  byId("notice").hidden = !text;
  byId("notice").textContent = text ?? "";
}

async function loadModels() {
  for (;;) {
    try {
      models = await api.models();
      break;
    } catch (error) {
      const isLoading = error.status === 503;
      notify(isLoading ? "The model is loading…" : `The server does not answer: ${error.message}`);
      await new Promise((resolve) => setTimeout(resolve, LOADING_RETRY_MS));
    }
  }
  notify(null);
  modelSelect.replaceChildren(...models.map(({ id }) => h("option", { value: id }, shortName(id))));
  modelSelect.disabled = false;
  const last = localStorage.getItem("octavo.model");
  if (models.some(({ id }) => id === last)) modelSelect.value = last;
  onModel();
}

/** An id without its organisation, where that still tells it from the others. */
function shortName(id) {
  const short = id.split("/").at(-1);
  return models.filter((model) => model.id.split("/").at(-1) === short).length > 1 ? id : short;
}

function onModel() {
  const model = models.find(({ id }) => id === modelId());
  localStorage.setItem("octavo.model", modelId());
  const embeds = model.task === "embed";
  const generates = model.task === "generate";
  byId("tab-similarity").hidden = !embeds;
  byId("tab-chat").hidden = !generates;
  byId("welcome-model").textContent = `${model.id}, ${model.max_model_len.toLocaleString("en")} tokens of context`;
  modelSelect.title = model.id;
  show();
}

/** Show the view that the address names, or the first that the model has. */
function show() {
  const visible = VIEWS.filter((view) => !byId(`tab-${view}`).hidden);
  const asked = location.hash.slice(1);
  const view = visible.includes(asked) ? asked : visible[0];
  for (const name of VIEWS) {
    byId(name).hidden = name !== view;
    byId(`tab-${name}`).toggleAttribute("aria-current", name === view);
    if (name === view) byId(`tab-${name}`).setAttribute("aria-current", "page");
  }
  document.body.dataset.view = view;
  showTitle();
  live.show(view === "live");
}

function showTitle() {
  const { title } = chat.conversation;
  document.title = document.body.dataset.view === "chat" && title ? `${title} · octavo` : "octavo";
}

function openConversation(conversation) {
  closeSide();
  location.hash = "chat";
  chat.open(conversation);
  drawConversations();
}

function drawConversations() {
  const rows = store.all().map((conversation) => {
    const { id, title } = conversation;
    const open = h("button", { type: "button", class: "open", "aria-current": id === chat.conversation.id ? "true" : null }, title || "Untitled");
    open.addEventListener("click", () => openConversation(store.load(id)));
    const remove = h("button", { type: "button", class: "icon", "aria-label": `Delete ${title}` }, "×");
    remove.addEventListener("click", () => {
      store.remove(id);
      if (id === chat.conversation.id) chat.open(store.newConversation());
      drawConversations();
    });
    return h("li", {}, open, remove);
  });
  byId("conversations").replaceChildren(...rows);
  showTitle();
}

function closeSide() {
  document.body.classList.remove("side-open");
  byId("toggle-side").setAttribute("aria-expanded", "false");
}

byId("toggle-side").addEventListener("click", () => {
  const isOpen = document.body.classList.toggle("side-open");
  byId("toggle-side").setAttribute("aria-expanded", String(isOpen));
});
byId("main").addEventListener("click", closeSide);
byId("new-chat").addEventListener("click", () => openConversation(store.newConversation()));
byId("open-settings").addEventListener("click", () => byId("settings").showModal());
byId("reset-settings").addEventListener("click", () => settings.reset());
modelSelect.addEventListener("change", onModel);
addEventListener("hashchange", show);

drawConversations();
show();
loadModels();
