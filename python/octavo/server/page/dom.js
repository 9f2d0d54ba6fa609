// Elements, built by hand: text becomes text nodes, so that no answer of a model is ever markup.

/**
 * An element with properties and children.
 * Keys of `attributes` that begin with "on" are listeners; true is a bare attribute; null and
 * false leave it away. Children may be nodes, text, or null.
 */
export function h(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? "" : String(value));
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** An SVG element. */
export function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, String(value));
  element.append(...children);
  return element;
}

/** The element with an id, which the page has. */
export const byId = (id) => document.getElementById(id);

/** Copy text; the button tells that it was done. */
export async function copy(text, button) {
  const before = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    // Pages that came over plain HTTP have no clipboard, unless from this machine.
    button.textContent = "Not allowed here";
  }
  setTimeout(() => (button.textContent = before), 1500);
}
