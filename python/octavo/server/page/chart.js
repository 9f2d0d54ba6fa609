// A chart: lines over the last minutes, drawn as SVG, its newest values beside its title.

import { h, svg } from "./dom.js";

const WIDTH = 320;
const HEIGHT = 96;
/** Points that are kept: at one a second, two minutes. */
export const MAX_POINTS = 120;

/** `series`: names of lines; `format(value)`: a value's text; `top`: the scale's end, if it is fixed. */
export class Chart {
  constructor(title, series, { format, top = null }) {
    this.series = series;
    this.format = format;
    this.top = top;
    this.points = series.map(() => []);
    this.values = series.map(() => h("dd", {}, "–"));
    this.lines = series.map((_, i) => svg("path", { class: `line s${i}` }));
    this.area = svg("path", { class: "area" });
    this.scale = h("span", { class: "scale" });
    this.mark = svg("path", { class: "mark" });
    // The point of the pointer's place, counted from the newest; null: the newest is shown.
    this.back = null;
    this.drawing = svg(
      "svg",
      { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": title },
      svg("path", { class: "grid", d: `M0 .5H${WIDTH}M0 ${HEIGHT / 2}H${WIDTH}M0 ${HEIGHT - 0.5}H${WIDTH}` }),
      this.area,
      ...this.lines,
      this.mark,
    );
    this.drawing.addEventListener("pointermove", ({ clientX }) => {
      const { right, width } = this.drawing.getBoundingClientRect();
      this.point(Math.round(((right - clientX) / width) * (MAX_POINTS - 1)));
    });
    this.drawing.addEventListener("pointerleave", () => this.point(null));
    const legend = series.map((name, i) => h("div", {}, h("dt", { class: `s${i}` }, name), this.values[i]));
    this.element = h(
      "article",
      { class: "chart" },
      h("h2", {}, title),
      h("dl", {}, legend),
      h("div", { class: "plot" }, this.drawing, this.scale),
    );
    this.title = title;
  }

  /** Add a point to each line; null is a gap. */
  push(values) {
    values.forEach((value, i) => {
      const points = this.points[i];
      points.push(value);
      if (points.length > MAX_POINTS) points.shift();
    });
    this.draw();
  }

  /** Show the values of so many points ago; null: of now. */
  point(back) {
    this.back = back;
    this.draw();
  }

  /** Write the values of the pointed place, or the newest. */
  read() {
    const back = Math.min(this.back ?? 0, Math.max(0, this.points[0].length - 1));
    this.values.forEach((shown, i) => {
      const value = this.points[i].at(-1 - back) ?? null;
      shown.textContent = value === null ? "–" : this.format(value);
    });
    const at = x(this.points[0], this.points[0].length - 1 - back).toFixed(1);
    this.mark.setAttribute("d", this.back === null ? "" : `M${at} 0V${HEIGHT}`);
  }

  draw() {
    const highest = Math.max(0, ...this.points.flat().filter((value) => value !== null));
    const top = this.top ?? niceAbove(highest);
    this.scale.textContent = this.format(top);
    this.points.forEach((points, i) => this.lines[i].setAttribute("d", path(points, top)));
    this.read();
    const [first] = this.points;
    const isWhole = this.series.length === 1 && first.length > 1 && !first.includes(null);
    this.area.setAttribute("d", isWhole ? `${path(first, top)}V${HEIGHT}H${x(first, 0)}Z` : "");
    const shown = this.series.map((name, i) => `${name} ${this.values[i].textContent}`);
    this.drawing.setAttribute("aria-label", `${this.title}: ${shown.join(", ")}`);
  }
}

// The newest point is at the right edge.
const x = (points, i) => WIDTH - ((points.length - 1 - i) * WIDTH) / (MAX_POINTS - 1);

function path(points, top) {
  let isPen = false;
  return points
    .map((value, i) => {
      if (value === null) {
        isPen = false;
        return "";
      }
      const y = HEIGHT - 1 - (Math.min(value, top) / top) * (HEIGHT - 4);
      const command = isPen ? "L" : "M";
      isPen = true;
      return `${command}${x(points, i).toFixed(1)} ${y.toFixed(1)}`;
    })
    .join("");
}

/** 1, 2 or 5 times a power of ten, at or above a value. */
function niceAbove(value) {
  if (value <= 0) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].find((step) => step * power >= value) * power;
}
