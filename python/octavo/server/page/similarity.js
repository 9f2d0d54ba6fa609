// The similarity view, for models that embed: texts against one another, and ranked for a query.

import { byId, h } from "./dom.js";

const EXAMPLE = [
  "The cat sat on the mat.",
  "A kitten is lying on the rug.",
  "The central bank raised interest rates.",
  "Inflation makes borrowing dearer.",
];
const MAX_TEXTS = 40;

/** `modelId()`: the model to ask. */
export class Similarity {
  constructor(api, modelId) {
    this.api = api;
    this.modelId = modelId;
    this.result = byId("similarity-result");
    byId("texts").value = EXAMPLE.join("\n");
    byId("query").value = "pets";
    byId("texts-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.compare();
    });
  }

  async compare() {
    const lines = byId("texts").value.split("\n").map((line) => line.trim()).filter(Boolean);
    const texts = lines.slice(0, MAX_TEXTS);
    const query = byId("query").value.trim();
    if (!texts.length) return;
    const began = performance.now();
    try {
      const input = query ? [...texts, query] : texts;
      const answer = await this.api.post("v1/embeddings", { model: this.modelId(), input });
      const vectors = answer.data.map(({ embedding }) => unit(embedding));
      const ms = performance.now() - began;
      const note = `${input.length} vectors of ${vectors[0].length} numbers, ${answer.usage.prompt_tokens} tokens, ${ms.toFixed(0)} ms`;
      this.result.replaceChildren(
        h("p", { class: "quiet" }, note),
        query ? ranking(texts, vectors, query) : "",
        matrix(texts, vectors),
      );
    } catch (error) {
      this.result.replaceChildren(h("p", { class: "error", role: "alert" }, error.message));
    }
  }
}

function unit(vector) {
  const length = Math.hypot(...vector) || 1;
  return vector.map((x) => x / length);
}

const cosine = (a, b) => a.reduce((sum, x, i) => sum + x * b[i], 0);

function ranking(texts, vectors, query) {
  const scored = texts.map((text, i) => ({ text, score: cosine(vectors[i], vectors.at(-1)) }));
  scored.sort((a, b) => b.score - a.score);
  const rows = scored.map(({ text, score }) => h("li", {}, tinted("span", score), ` ${text}`));
  return h("section", {}, h("h2", {}, `Nearest to “${query}”`), h("ol", { class: "ranking" }, rows));
}

function matrix(texts, vectors) {
  const head = h("tr", {}, h("td"), texts.map((_, i) => h("th", { scope: "col" }, String(i + 1))));
  const rows = texts.map((text, i) =>
    h("tr", {}, h("th", { scope: "row", title: text }, `${i + 1}  ${text}`),
      texts.map((_, j) => tinted("td", cosine(vectors[i], vectors[j])))));
  const table = h("table", { class: "matrix" }, h("thead", {}, head), h("tbody", {}, rows));
  return h("div", { class: "scrolls", tabindex: "0", role: "region", "aria-label": "Similarities" }, table);
}

/** A cosine with a ground as strong as it is. */
function tinted(name, score) {
  const cell = h(name, { class: "score" }, score.toFixed(2));
  cell.style.setProperty("--score", `${Math.round(100 * Math.max(0, score))}%`);
  return cell;
}
