// The break-even: sliders for what it rests on, the service's answer as a plot, a table and the list of all inputs.

import { drawn as element, make, rowHead } from "./dom.js";
import { dollars } from "./format.js";
import { posted } from "./service.js";
import { Slider } from "./slider.js";

// [input, what its slider is called, least, most, on a scale of factors rather than of steps]
const SLIDERS = [
  ["volume", "Images a month", 100, 1e7, true],
  ["local_s", "Seconds an image, here", 0.1, 100, true],
  ["local_acceptance", "Accepted, here", 0.3, 1, false],
  ["hosted_acceptance", "Accepted, hosted", 0.3, 1, false],
  ["wrong_usd", "A wrong answer costs", 0, 1, false],
  ["local_operations_hours", "Hours of work a month, here", 0, 20, false],
  ["hardware_usd", "A box costs", 0, 10000, false],
  ["usd_per_kwh", "A kilowatt-hour costs", 0, 1, false],
];
const PAUSE_MS = 120;
const MODES = { standard: "", batch: " (batch)", cached: " (cached)" };
const [LEAST_WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [480, 360, 56, 26, 12, 44]; // in pixels, as text is
const DASHES = ["", "7 3", "2 3", "9 3 2 3", "4 2", "12 4", "1 4"];

const count = (value) => value.toLocaleString("en", { maximumFractionDigits: 0 });
const short = (value) => (value >= 1e6 ? `${value / 1e6} M` : value >= 1000 ? `${value / 1000} k` : String(value));
const shown = (name, value) =>
  name.includes("usd") ? dollars(value) : name.includes("acceptance") ? `${(value * 100).toFixed(0)} %`
    : value >= 1000 ? count(value) : value.toLocaleString("en", { maximumSignificantDigits: 3 });

export class BreakEven {
  sliders = new Map();

  /** `parts`: sliders, mode, measured, plot, heading, rows, inputs, message, method. `ask` is fetch with the key. */
  constructor(parts, { ask }) {
    Object.assign(this, { parts, ask });
    parts.mode.addEventListener("change", () => this.draw());
    addEventListener("resize", () => this.draw());
    parts.measured.addEventListener("change", () => this.load());
  }

  show() {
    if (this.answer) this.draw(); // at the width that it has now
    else this.load();
  }

  /** Ask with what was moved; of answers that overtake each other the last question's is shown. */
  async load() {
    const moved = [...this.sliders].filter(([, slider]) => slider.moved).map(([name, slider]) => [name, slider.value]);
    const asked = (this.asked = { ...Object.fromEntries(moved), measured: this.parts.measured.checked });
    try {
      const answer = await (await this.ask("break-even", posted(asked))).json();
      if (asked !== this.asked) return;
      this.answer = answer;
      this.parts.message.textContent = "";
    } catch (error) {
      if (asked === this.asked) this.parts.message.textContent = error.message;
      return;
    }
    if (!this.sliders.size) this.parts.sliders.replaceChildren(...SLIDERS.map((slider) => this.slider(slider)));
    this.draw();
  }

  slider([name, label, least, most, factors]) {
    const { value } = this.answer.inputs.find((input) => input.name === name);
    const slider = new Slider({ name, label, least, most, factors, value, whole: name === "volume" }, {
      shown: (value) => shown(name, value),
      changed: () => {
        clearTimeout(this.waiting);
        this.waiting = setTimeout(() => this.load(), PAUSE_MS);
      },
    });
    this.sliders.set(name, slider);
    return slider.element;
  }

  /** The targets of the chosen kind of price, and how each is drawn. */
  lines() {
    const suffix = MODES[this.parts.mode.value];
    const fits = ({ target, kind }) => kind === "local" || target === "reviews"
      || (suffix ? target.endsWith(suffix) : !Object.values(MODES).some((other) => other && target.endsWith(other)));
    let [place, here] = [0, 0];
    return this.answer.targets.filter(fits).map((row) => {
      if (row.kind === "local") return { row, className: "line own", dash: DASHES[here++ % DASHES.length] };
      if (row.target === "reviews") return { row, className: "line reviews", dash: "2 4" };
      const at = place++;
      return { row, className: `line line${at % 6}`, dash: DASHES[at % DASHES.length] };
    });
  }

  draw() {
    if (!this.answer) return;
    const { targets, volume, crossings, series, inputs, method } = this.answer;
    const lines = this.lines();
    this.parts.plot.replaceChildren(plot(lines, series, volume, Math.max(LEAST_WIDTH, this.parts.plot.clientWidth)));
    // Of several models here, the one that is cheaper first.
    const first = ({ volume: { value } }) => value ?? Infinity;
    const crossing = (target) =>
      crossings.filter(({ hosted }) => hosted === target).sort((one, other) => first(one) - first(other))[0];
    this.parts.rows.replaceChildren(...lines.map((line) => tableRow(line, crossing(line.row.target))));
    this.parts.heading.textContent = `At ${count(volume)} images a month`;
    this.parts.inputs.replaceChildren(...inputs.map(inputRow));
    this.parts.method.textContent = method;
    this.parts.plot.setAttribute("aria-label", `Dollars for 1,000 accepted images against images a month, ${lines.length} of ${targets.length} targets; the table has the figures.`);
  }
}

function tableRow({ row, className, dash }, crossing) {
  const cost = row.usd_per_1000_accepted;
  const from = crossing && (crossing.volume.value === null ? "never" : count(crossing.volume.value));
  const span = crossing && `${bound(crossing.volume.low)} to ${bound(crossing.volume.high)}`;
  const line = make("tr");
  const name = rowHead("");
  const sample = element("svg", { class: "sample_line", viewBox: "0 0 28 8", "aria-hidden": "true" });
  sample.append(element("line", { x1: 0, x2: 28, y1: 4, y2: 4, class: className, "stroke-dasharray": dash }));
  name.append(sample, make("span", row.target), make("small", row.label));
  const figure = make("td", dollars(cost.value));
  figure.append(make("small", `${dollars(cost.low)} to ${dollars(cost.high)}`));
  const least = make("td", crossing ? from : "");
  if (crossing) least.append(make("small", span));
  line.append(name, make("td", row.price_usd_per_image === null ? "" : dollars(row.price_usd_per_image)), figure, least);
  return line;
}

const bound = (value) => (value === null ? "never" : count(value));

function inputRow({ name, value, unit, reason, origin }) {
  const line = make("tr", "", origin === "default" ? "" : "given");
  line.append(rowHead(name), make("td", `${value === null ? "–" : value.toLocaleString("en", { maximumSignificantDigits: 6 })} ${unit}`), make("td", reason));
  return line;
}

/** Both axes in factors of ten: costs fall with the volume over several of them. */
function plot(lines, { volumes, usd_per_1000_accepted: costs }, volume, width) {
  const all = lines.flatMap(({ row }) => costs[row.target]).filter((usd) => usd !== null && usd > 0);
  const least = Math.min(...all) * 0.8; // the rest of the first images' cost, far above, is not drawn
  const [low, high] = [least, Math.min(Math.max(...all), least * 100)].map(Math.log10);
  const [first, last] = [volumes[0], volumes.at(-1)].map(Math.log10);
  const x = (value) => LEFT + ((Math.log10(value) - first) / (last - first)) * (width - LEFT - RIGHT);
  const y = (usd) => TOP + ((high - Math.log10(usd)) / (high - low || 1)) * (HEIGHT - TOP - BOTTOM);
  const svg = element("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, "aria-hidden": "true" });
  for (const tick of ticks(first, last, [1])) {
    svg.append(element("line", { x1: x(tick), x2: x(tick), y1: TOP, y2: HEIGHT - BOTTOM, class: "grid" }));
    svg.append(element("text", { x: x(tick), y: HEIGHT - BOTTOM + 16, "text-anchor": "middle" }, short(tick)));
  }
  for (const tick of ticks(low, high, high - low > 2.5 ? [1] : [1, 2, 5])) {
    svg.append(element("line", { x1: LEFT, x2: width - RIGHT, y1: y(tick), y2: y(tick), class: "grid" }));
    svg.append(element("text", { x: LEFT - 6, y: y(tick) + 4, "text-anchor": "end" }, `$${tick.toLocaleString("en")}`));
  }
  svg.append(element("text", { x: (LEFT + width) / 2, y: HEIGHT - 8, "text-anchor": "middle" }, "images a month"));
  const frame = element("clipPath", { id: "plot_frame" });
  frame.append(element("rect", { x: LEFT, y: TOP, width: width - LEFT - RIGHT, height: HEIGHT - TOP - BOTTOM }));
  svg.append(frame);
  const inside = element("g", { "clip-path": "url(#plot_frame)" });
  inside.append(element("line", { x1: x(volume), x2: x(volume), y1: TOP, y2: HEIGHT - BOTTOM, class: "at_volume" }));
  for (const { row, className, dash } of [...lines].reverse()) {
    const points = volumes.map((at, place) => [at, costs[row.target][place]]).filter(([, usd]) => usd > 0);
    const path = points.map(([at, usd], place) => `${place ? "L" : "M"}${x(at).toFixed(1)} ${y(usd).toFixed(1)}`).join("");
    inside.append(element("path", { d: path, class: className, "stroke-dasharray": dash }));
  }
  svg.append(inside);
  return svg;
}

function ticks(low, high, steps) {
  const found = [];
  for (let power = Math.floor(low); power <= Math.ceil(high); power++) {
    for (const step of steps) if (Math.log10(step) + power >= low - 1e-9 && Math.log10(step) + power <= high + 1e-9) found.push(Number((step * 10 ** power).toPrecision(1)));
  }
  return found;
}
