"use strict";
/* Curves one can hover: lines over a number, with a cursor that all charts of one axis share. */

const SVG = "http://www.w3.org/2000/svg";
const PAGE = JSON.parse(document.getElementById("page-data").textContent);
const MARGIN = { left: 46, right: 10, top: 10, bottom: 34 };
const DOTS = 16; // series of fewer points show each of them
const COLOURS = 10;

function make(name, attributes = {}, ...children) {
  const node = name.startsWith("svg:") ? document.createElementNS(SVG, name.slice(4)) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

/** Four significant digits, no exponent between 0.001 and 100,000. */
function short(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e5) return value.toExponential(2).replace(/\.?0*e\+?/, "e");
  const text = size >= 1000 ? value.toFixed(0) : value.toPrecision(4);
  return text.includes(".") ? text.replace(/\.?0+$/, "") : text;
}

/** Round numbers that divide a range in about `wanted` parts. */
function ticks(low, high, wanted) {
  const rough = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999) || power * 10;
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) found.push(+(n * step).toPrecision(12));
  return found;
}

/** The ticks of decades; the fewer decades, the more within each. */
function logTicks(low, high) {
  const decades = Math.log10(high / low);
  if (decades < 0.7) return ticks(low, high, 4).filter((t) => t > 0);
  const within = decades < 1.6 ? [1, 2, 3, 5] : decades < 3.2 ? [1, 3] : [1];
  const stride = Math.max(1, Math.ceil(decades / 7)), found = [];
  for (let d = Math.floor(Math.log10(low)); d <= Math.ceil(Math.log10(high)); d += stride)
    for (const m of within) if (m * 10 ** d >= low * 0.999 && m * 10 ** d <= high * 1.001) found.push(+(m * 10 ** d).toPrecision(6));
  return found;
}

/** Call back when the width of an element changes; heights follow from what is drawn, and would never rest. */
function onWidth(element, callback) {
  let known = element.clientWidth;
  new ResizeObserver(() => {
    if (element.clientWidth === known) return;
    known = element.clientWidth;
    requestAnimationFrame(callback);
  }).observe(element);
}

class Chart {
  constructor(figure, spec) {
    this.figure = figure;
    this.spec = spec;
    this.series = spec.series.map((s, n) => ({ ...s, x: PAGE.axes[s.x], colour: `var(--s${n % COLOURS})`, shown: true }));
    for (const s of this.series) s.there = s.x.map((_, i) => i).filter((i) => s.y[i] !== null);
    this.log = spec.log;
    this.stops = [...new Set(this.series.flatMap((s) => s.there.map((i) => s.x[i])))].sort((a, b) => a - b);
    this.at = null;
    this.build();
    this.draw();
    onWidth(this.plot, () => this.draw());
  }

  build() {
    const { title, note, log } = this.spec;
    this.where = make("output");
    this.scale = make("button", { type: "button", class: "scale" });
    this.scale.hidden = !this.series.some((s) => s.y.some((v) => v > 0)) || !log;
    this.scale.addEventListener("click", () => { this.log = !this.log; this.draw(); });
    this.plot = make("div", { class: "plot", tabindex: "0", role: "slider", "aria-label": title,
      "aria-valuemin": this.stops[0] ?? 0, "aria-valuemax": this.stops.at(-1) ?? 0 });
    this.legend = make("ul", { class: "legend" });
    for (const series of this.series) {
      const button = make("button", { type: "button", "aria-pressed": "true" }, series.name || title);
      button.style.setProperty("--c", series.colour);
      button.addEventListener("click", () => {
        series.shown = !series.shown;
        button.setAttribute("aria-pressed", series.shown);
        this.draw();
      });
      series.output = make("output");
      this.legend.append(make("li", {}, button, series.output));
    }
    const caption = make("figcaption", {}, make("strong", {}, title), this.scale, this.where);
    if (note) caption.append(make("span", { class: "note" }, note));
    this.figure.replaceChildren(caption, this.plot, this.legend);
    this.plot.addEventListener("pointermove", (event) => this.point(event));
    this.plot.addEventListener("pointerdown", (event) => this.point(event));
    this.plot.addEventListener("pointerleave", () => this.tell(null));
    this.plot.addEventListener("blur", () => this.tell(null));
    this.plot.addEventListener("keydown", (event) => this.key(event));
  }

  /* --- scales --- */

  extent() {
    const values = [], positive = this.log ? (v) => v !== null && v !== undefined && v > 0 : (v) => v !== null && v !== undefined;
    for (const s of this.series) if (s.shown) for (const list of [s.y, s.low || [], s.high || []]) for (const v of list) if (positive(v)) values.push(v);
    if (!values.length) return [this.log ? 0.1 : 0, 1];
    let low = values[0], high = values[0];
    for (const v of values) { if (v < low) low = v; if (v > high) high = v; }
    const [first, last] = [low, high];
    for (const level of Object.values(this.spec.levels)) { // a level is shown where it does not dwarf the curves
      const near = this.log ? level > first / 4 && level < last * 4 : Math.abs(level - (first + last) / 2) <= 1.5 * (last - first);
      if (near) { low = Math.min(low, level); high = Math.max(high, level); }
    }
    if (this.log) return low === high ? [low / 2, high * 2] : [low / (high / low) ** 0.05, high * (high / low) ** 0.05];
    const pad = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
    return [low >= 0 && low - pad < 0 ? 0 : low - pad, high + pad];
  }

  prepare() {
    const width = Math.max(this.plot.clientWidth, 160), wide = this.figure.classList.contains("wide");
    const height = wide ? Math.min(320, Math.max(220, width * 0.42)) : 190;
    const [low, high] = this.extent(), value = this.log ? Math.log : (v) => v;
    let [first, last] = [this.stops[0] ?? 0, this.stops.at(-1) ?? 1];
    const named = this.spec.x_names, place = this.spec.x_log ? Math.log : (v) => v;
    if (named) [first, last] = [-0.5, named.length - 0.5];
    else if (first === last) [first, last] = this.spec.x_log ? [first / 2, last * 2] : [first - 1, last + 1];
    const inner = width - MARGIN.left - MARGIN.right, tall = height - MARGIN.top - MARGIN.bottom;
    Object.assign(this, { width, height, low, high, first, last });
    this.px = (x) => MARGIN.left + (inner * (place(x) - place(first))) / (place(last) - place(first));
    this.py = (y) => MARGIN.top + tall * (1 - (value(y) - value(low)) / (value(high) - value(low)));
    this.drawn = (y) => y !== null && y !== undefined && (!this.log || y > 0);
  }

  /* --- drawing --- */

  draw() {
    this.prepare();
    this.scale.textContent = this.log ? "log scale" : "linear scale";
    const svg = make("svg:svg", { viewBox: `0 0 ${this.width} ${this.height}`, height: this.height, "aria-hidden": "true" });
    this.axes(svg);
    for (const s of this.series) if (s.shown) this.curve(svg, s);
    this.marks = make("svg:g");
    svg.append(this.marks);
    this.plot.replaceChildren(svg);
    this.show(this.at);
  }

  axes(svg) {
    const right = this.width - MARGIN.right, bottom = this.height - MARGIN.bottom;
    for (const t of this.log ? logTicks(this.low, this.high) : ticks(this.low, this.high, 4)) {
      svg.append(make("svg:line", { class: "rule", x1: MARGIN.left, x2: right, y1: this.py(t), y2: this.py(t) }));
      svg.append(make("svg:text", { x: MARGIN.left - 6, y: this.py(t) + 4, "text-anchor": "end" }, short(t)));
    }
    const names = this.spec.x_names;
    const marks = names ? names.map((_, n) => n) : this.spec.x_log ? this.stops : ticks(this.first, this.last, Math.max(3, this.width / 90));
    let free = -Infinity; // names that would run into one another are left out
    for (const t of marks) {
      const label = names ? names[t] : short(t), half = label.length * 3.3;
      if (t < this.first || t > this.last || this.px(t) - half < free) continue;
      svg.append(make("svg:text", { x: this.px(t), y: bottom + 15, "text-anchor": "middle" }, label));
      free = this.px(t) + half + 4;
    }
    svg.append(make("svg:text", { x: right, y: bottom + 29, "text-anchor": "end" }, this.spec.x_label));
    for (const [name, level] of Object.entries(this.spec.levels)) {
      if (level < this.low || level > this.high) continue;
      svg.append(make("svg:line", { class: "level", x1: MARGIN.left, x2: right, y1: this.py(level), y2: this.py(level) }));
      svg.append(make("svg:text", { x: right, y: this.py(level) - 4, "text-anchor": "end" }, name));
    }
  }

  curve(svg, s) {
    const there = s.there.filter((i) => this.drawn(s.y[i]));
    if (s.joined) {
      const path = there.map((i, n) => `${n ? "L" : "M"}${this.px(s.x[i]).toFixed(1)} ${this.py(s.y[i]).toFixed(1)}`).join("");
      svg.append(make("svg:path", { class: "line", d: path }));
      svg.lastChild.style.stroke = s.colour;
    }
    for (const i of there) {
      const x = this.px(s.x[i]);
      if (s.low && this.drawn(s.low[i]) && this.drawn(s.high[i])) {
        svg.append(make("svg:line", { class: "line", x1: x, x2: x, y1: this.py(s.low[i]), y2: this.py(s.high[i]) }));
        svg.lastChild.style.stroke = s.colour;
      }
      if (!s.joined || there.length < DOTS) {
        svg.append(make("svg:circle", { cx: x, cy: this.py(s.y[i]), r: s.low ? 4 : 2.6 }));
        svg.lastChild.style.fill = s.colour;
      }
    }
  }

  /* --- the cursor --- */

  point(event) {
    const box = this.plot.getBoundingClientRect(), x = event.clientX - box.left;
    let best = null;
    for (const stop of this.stops) if (best === null || Math.abs(this.px(stop) - x) < Math.abs(this.px(best) - x)) best = stop;
    this.tell(best);
  }

  key(event) {
    const moves = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -10, PageUp: 10 };
    const last = this.stops.length - 1;
    let place = this.at === null ? last : this.stops.indexOf(this.at);
    if (event.key === "Home") place = 0;
    else if (event.key === "End") place = last;
    else if (event.key === "Escape") return this.tell(null);
    else if (event.key in moves) place = Math.min(last, Math.max(0, place + moves[event.key]));
    else return undefined;
    event.preventDefault();
    return this.tell(this.stops[place]);
  }

  /** Move the cursor here and in every chart over the same axis. */
  tell(at) {
    const alike = ({ spec }) => spec.x_label === this.spec.x_label && !spec.x_names && !this.spec.x_names;
    for (const chart of charts) if (chart === this || alike(chart)) chart.show(at);
  }

  show(at) {
    this.at = at;
    const names = this.spec.x_names, told = [];
    this.marks.replaceChildren();
    if (at !== null && at >= this.first && at <= this.last)
      this.marks.append(make("svg:line", { class: "cursor", x1: this.px(at), x2: this.px(at), y1: MARGIN.top, y2: this.height - MARGIN.bottom }));
    for (const s of this.series) {
      const found = this.reading(s, at);
      s.output.replaceChildren(found.map((i) => short(s.y[i])).join(", ") || "–");
      if (found.length && at !== null && s.x[found[0]] !== at) s.output.append(make("small", {}, ` @${short(s.x[found[0]])}`));
      if (s.shown && found.length) told.push(`${s.name || this.spec.title} ${s.output.textContent}`);
      for (const i of at === null || !s.shown ? [] : found) {
        if (!this.drawn(s.y[i])) continue;
        this.marks.append(make("svg:circle", { class: "ring", cx: this.px(s.x[i]), cy: this.py(s.y[i]), r: 4 }));
        this.marks.lastChild.style.stroke = s.colour;
      }
    }
    const place = at === null ? "" : names ? names[at] : `${this.spec.x_label} ${short(at)}`;
    this.where.textContent = place || (names ? "" : "last");
    this.plot.setAttribute("aria-valuenow", at ?? this.stops.at(-1) ?? 0);
    this.plot.setAttribute("aria-valuetext", `${place || "last"}: ${told.join("; ")}`);
  }

  /** The points of a series nearest to the cursor; its last one where there is none. */
  reading(s, at) {
    const there = s.there;
    if (!there.length) return [];
    if (at === null) return this.spec.x_names ? [] : [there.at(-1)];
    const nearest = there.reduce((a, b) => (Math.abs(s.x[b] - at) < Math.abs(s.x[a] - at) ? b : a));
    if (this.spec.x_names && s.x[nearest] !== at) return [];
    return there.filter((i) => s.x[i] === s.x[nearest]);
  }
}

const charts = [];
for (const figure of document.querySelectorAll("[data-chart]")) charts.push(new Chart(figure, PAGE.charts[figure.dataset.chart]));
