// Markdown to DOM nodes: paragraphs, headings, lists, quotes, tables, code, emphasis, links.
//
// A subset of CommonMark and of GitHub's tables, as models write it. Nothing is ever parsed as
// HTML, and images become links: loading one would tell its host what was talked about.

import { h } from "./dom.js";
import { codeBlock } from "./code.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)(?:\s+#+)?\s*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
// Deeper than anyone writes; a model that repeats ">" must not exhaust the stack.
const MAX_DEPTH = 8;

/** The blocks of a text, each `{type, source, ...}`; equal sources make equal nodes. */
export function blocks(text, depth = 0) {
  const lines = text.split("\n");
  const found = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const begin = at;
    const block = readBlock(lines, at, depth);
    at = block.end;
    found.push({ ...block, source: lines.slice(begin, at).join("\n") });
  }
  return found;
}

/** The node of a block. */
export function render(block) {
  switch (block.type) {
    case "code":
      return codeBlock(block.text, block.language, block.isOpen);
    case "heading":
      // The page's own headings are the first two levels.
      return h(`h${Math.min(6, block.level + 2)}`, {}, inline(block.text));
    case "rule":
      return h("hr");
    case "quote":
      return h("blockquote", {}, block.children.map(render));
    case "list":
      return h(
        block.start === null ? "ul" : "ol",
        block.start > 1 ? { start: block.start } : {},
        block.items.map((item) => h("li", {}, item.map((one) => listChild(one, block.isTight)))),
      );
    case "table":
      return table(block);
    default:
      return h("p", {}, inline(block.text));
  }
}

const listChild = (block, isTight) =>
  isTight && block.type === "paragraph" ? h("span", {}, inline(block.text)) : render(block);

function readBlock(lines, at, depth) {
  const line = lines[at];
  const fence = line.match(FENCE);
  if (fence) return readFence(lines, at, fence);
  const heading = line.match(HEADING);
  if (heading) return { type: "heading", level: heading[1].length, text: heading[2], end: at + 1 };
  if (RULE.test(line)) return { type: "rule", end: at + 1 };
  if (depth < MAX_DEPTH) {
    if (QUOTE.test(line)) return readQuote(lines, at, depth);
    if (ITEM.test(line)) return readList(lines, at, depth);
  }
  if (line.includes("|") && DIVIDER.test(lines[at + 1] ?? "") && lines[at + 1].includes("-")) {
    const columns = cells(line).length;
    if (columns === cells(lines[at + 1]).length) return readTable(lines, at, columns);
  }
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !beginsBlock(lines[end])) end += 1;
  return { type: "paragraph", text: lines.slice(at, end).join("\n"), end };
}

const beginsBlock = (line) =>
  FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line);

function readFence(lines, at, [, mark, language]) {
  let end = at + 1;
  const isEnd = (line) => {
    const bare = line.trim();
    return bare.length >= mark.length && bare === mark[0].repeat(bare.length);
  };
  while (end < lines.length && !isEnd(lines[end])) end += 1;
  const text = lines.slice(at + 1, end).join("\n");
  const isOpen = end === lines.length;
  return { type: "code", text, language, isOpen, end: isOpen ? end : end + 1 };
}

function readQuote(lines, at, depth) {
  let end = at;
  const inner = [];
  while (end < lines.length && QUOTE.test(lines[end])) inner.push(lines[end++].match(QUOTE)[1]);
  return { type: "quote", children: blocks(inner.join("\n"), depth + 1), end };
}

function readList(lines, at, depth) {
  const [, indent, mark] = lines[at].match(ITEM);
  const isOrdered = /\d/.test(mark);
  const items = [];
  let end = at;
  let isTight = true;
  while (end < lines.length) {
    const match = lines[end].match(ITEM);
    if (!match || match[1].length > indent.length + 1 || /\d/.test(match[2]) !== isOrdered) break;
    if (match[1].length < indent.length) break;
    // What is indented as far as the item's text belongs to the item.
    const width = match[1].length + match[2].length + 1;
    const inner = [match[3]];
    end += 1;
    while (end < lines.length) {
      const line = lines[end];
      const isIndented = /^\s/.test(line) && leading(line) >= Math.min(width, indent.length + 2);
      if (!line.trim()) {
        const next = lines[end + 1] ?? "";
        if (!next.trim() || !(leading(next) >= Math.min(width, indent.length + 2))) break;
        inner.push("");
      } else if (isIndented) {
        inner.push(line.slice(Math.min(width, leading(line))));
      } else if (beginsBlock(line)) {
        break;
      } else {
        inner.push(line);
      }
      end += 1;
    }
    items.push(blocks(inner.join("\n"), depth + 1));
    // Between items one empty line is a loose list's.
    if (!lines[end]?.trim() && ITEM.test(lines[end + 1] ?? "")) {
      isTight = false;
      end += 1;
    }
  }
  return { type: "list", start: isOrdered ? Number.parseInt(mark) : null, items, isTight, end };
}

const leading = (line) => line.length - line.trimStart().length;

function readTable(lines, at, columns) {
  const aligns = cells(lines[at + 1]).map((cell) => {
    if (/^:-+:$/.test(cell)) return "center";
    return /-:$/.test(cell) ? "right" : "left";
  });
  const rows = [];
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) rows.push(cells(lines[end++]).slice(0, columns));
  return { type: "table", head: cells(lines[at]), aligns, rows, end };
}

const cells = (line) =>
  line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "")
    .split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));

function table({ head, aligns, rows }) {
  const row = (name, texts) =>
    h("tr", {}, texts.map((text, i) => h(name, { class: aligns[i] }, inline(text))));
  return h(
    "div",
    { class: "scrolls", tabindex: "0", role: "region", "aria-label": "Table" },
    h("table", {}, h("thead", {}, row("th", head)), h("tbody", {}, rows.map((r) => row("td", r)))),
  );
}

// Spans have a longest length: what a model repeats without an end must not cost its square.
// The order matters: code before all else, links before strong, strong before emphasis.
const INLINE = new RegExp(
  [
    /\uE000(\d+)\uE001/, // 1
    /\\([!-/:-@[-`{-~])/, // 2
    /!?\[([^\]]{0,1000})\]\(\s{0,9}<?([^\s)>]{1,2000})>?(?:\s{1,9}["'(][^)]{0,1000})?\)/, // 3, 4
    /<?(https?:\/\/[^\s<>]{0,1999}[^\s<>.,;:!?'"()\]*_~])>?/, // 5
    /\*\*(?=\S)(.{1,1000}?\*{0,2})(?<=\S)\*\*|(?<!\w)__(?=\S)(.{1,1000}?)(?<=\S)__(?!\w)/, // 6, 7
    /\*(?=[^\s*])(.{1,1000}?)(?<=[^\s*])\*(?!\*)|(?<!\w)_(?=\S)(.{1,1000}?)(?<=\S)_(?!\w)/, // 8, 9
    /~~(?=\S)(.{1,1000}?)(?<=\S)~~/, // 10
    /( {2,9}|\\)?\n/, // 11
  ].map((part) => part.source).join("|"),
  "gs",
);

/** The nodes of a paragraph's text. */
export function inline(text) {
  const codes = [];
  return spans(withoutCode(text, codes), codes, 0);
}

/**
 * The text with a mark in place of each span of code, which goes to `codes`: a run of backticks, up
 * to the next run of as many.
 */
function withoutCode(text, codes) {
  // The marks are of no script: nobody writes them.
  const plain = text.replace(/[\uE000\uE001]/g, "\uFFFD");
  const runs = [...plain.matchAll(/`+/g)];
  // From the end: where the next run of each length begins.
  const nextOf = new Map();
  const partner = new Array(runs.length);
  for (let i = runs.length - 1; i >= 0; i -= 1) {
    const size = runs[i][0].length;
    partner[i] = nextOf.get(size);
    nextOf.set(size, i);
  }
  let found = "";
  let at = 0;
  for (let i = 0; i < runs.length; i += 1) {
    const end = partner[i];
    if (end === undefined || plain[runs[i].index - 1] === "\\") continue;
    const begin = runs[i].index + runs[i][0].length;
    const code = plain.slice(begin, runs[end].index).replaceAll("\n", " ");
    found += `${plain.slice(at, runs[i].index)}\uE000${codes.length}\uE001`;
    codes.push(code.replace(/^ (.*\S.*) $/, "$1"));
    at = runs[end].index + runs[end][0].length;
    i = end;
  }
  return found + plain.slice(at);
}

function spans(text, codes, depth) {
  if (depth > MAX_DEPTH) return [withCode(text, codes)];
  const nodes = [];
  let at = 0;
  for (const match of text.matchAll(INLINE)) {
    if (match.index > at) nodes.push(text.slice(at, match.index));
    nodes.push(spanNode(match, codes, depth));
    at = match.index + match[0].length;
  }
  if (at < text.length) nodes.push(text.slice(at));
  return nodes;
}

/** Marks back to what they stand for, where nodes cannot be. */
const withCode = (text, codes) => text.replace(/\uE000(\d+)\uE001/g, (_, i) => `\`${codes[i]}\``);

function spanNode(match, codes, depth) {
  const inner = (text) => spans(text, codes, depth + 1);
  if (match[1] !== undefined) return h("code", {}, codes[match[1]]);
  if (match[2] !== undefined) return match[2];
  if (match[4] !== undefined) {
    return link(match[4], inner(match[3] || match[4]), withCode(match[0], codes));
  }
  if (match[5] !== undefined) return link(match[5], [match[5]], match[0]);
  const strong = match[6] ?? match[7];
  if (strong !== undefined) return h("strong", {}, inner(strong));
  const emphasis = match[8] ?? match[9];
  if (emphasis !== undefined) return h("em", {}, inner(emphasis));
  if (match[10] !== undefined) return h("del", {}, inner(match[10]));
  return match[11] ? h("br") : "\n";
}

/** A link that leaves the page, if its address is one that may; else its source as text. */
function link(address, children, source) {
  let url;
  try {
    url = new URL(address);
  } catch {
    return source;
  }
  if (!["http:", "https:", "mailto:"].includes(url.protocol)) return source;
  return h("a", { href: url.href, target: "_blank", rel: "noopener noreferrer" }, children);
}

/** An element that follows a growing text: only blocks that changed are made anew. */
export class LiveMarkdown {
  constructor() {
    this.element = h("div", { class: "markdown" });
    this.sources = [];
  }

  /** Show the text. */
  update(text) {
    const found = blocks(text);
    const isSame = (i) => this.sources[i] === found[i]?.source;
    let same = 0;
    while (same < this.sources.length && same < found.length && isSame(same)) same += 1;
    while (this.element.childNodes.length > same) this.element.lastChild.remove();
    this.element.append(...found.slice(same).map(render));
    this.sources = found.map((block) => block.source);
  }
}
