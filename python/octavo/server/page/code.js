// A block of code: its language, a button that copies it, and colours for what most languages share.

import { copy, h } from "./dom.js";

// Colouring takes time linear in the text, and is done again while it grows.
const MAX_COLOURED = 20000;
const HASH = /^(py|python|sh|bash|shell|zsh|console|ruby|rb|r|perl|yaml|yml|toml|ini|make|makefile|dockerfile|elixir|julia|nix|conf)$/;
const DASH = /^(sql|lua|haskell|hs|ada|vhdl|elm)$/;
const KEYWORDS = new Set(
  `abstract and as async await begin bool break case catch char class const continue def default del
  do double elif else end enum except export extends extern false final finally float fn for foreach
  from func function global go goto if impl implements import in include int interface is lambda let
  long loop match mod module mut namespace new nil none not null of operator or package pass private
  protected pub public raise ref repeat return self select short sizeof static string struct super
  switch template then this throw trait true try type typedef typeof union unsigned until use using
  var virtual void where while with yield SELECT FROM WHERE JOIN LEFT RIGHT INNER OUTER GROUP ORDER BY
  INSERT INTO VALUES UPDATE SET DELETE CREATE TABLE AND OR NOT NULL AS ON HAVING LIMIT None True False`
    .split(/\s+/),
);

/** The element of a block; `isOpen`: its end has not come yet. */
export function codeBlock(text, language, isOpen = false) {
  const button = h("button", { type: "button", class: "small" }, "Copy");
  button.addEventListener("click", () => copy(text, button));
  const name = language || "code";
  return h(
    "figure",
    { class: "code", "aria-busy": isOpen },
    h("figcaption", {}, h("span", {}, name), button),
    h("pre", { tabindex: "0", "aria-label": `${name}` }, h("code", {}, colour(text, language))),
  );
}

/** Nodes of a code's text, its comments, strings, numbers and keywords in spans. */
export function colour(text, language) {
  if (!language || text.length > MAX_COLOURED || /^(te?xt|plain|markdown|md|diff)$/i.test(language)) {
    return [text];
  }
  const nodes = [];
  let at = 0;
  for (const match of text.matchAll(pattern(language.toLowerCase()))) {
    const kind = kindOf(match);
    if (kind === null) continue;
    if (match.index > at) nodes.push(text.slice(at, match.index));
    nodes.push(h("span", { class: kind }, match[0]));
    at = match.index + match[0].length;
  }
  nodes.push(text.slice(at));
  return nodes;
}

function pattern(language) {
  let comment = String.raw`//[^\n]*|/\*[\s\S]*?(?:\*/|$)`;
  if (HASH.test(language)) comment = String.raw`#[^\n]*`;
  if (DASH.test(language)) comment = String.raw`--[^\n]*`;
  if (/^(html|xml|svg)$/.test(language)) comment = String.raw`<!--[\s\S]*?(?:-->|$)`;
  const string = String.raw`"""[\s\S]*?(?:"""|$)|"(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n])*'|\x60(?:\\.|[^\x60\\])*\x60`;
  return new RegExp(`(${comment})|(${string})|(\\b\\d[\\w.]*)|([A-Za-z_]\\w*)`, "g");
}

function kindOf(match) {
  if (match[1]) return "comment";
  if (match[2]) return "string";
  if (match[3]) return "number";
  return KEYWORDS.has(match[4]) ? "keyword" : null;
}
