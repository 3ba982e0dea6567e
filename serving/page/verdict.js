// Which of two targets to ship, from all that was kept: sliders for what counts how much, the service's decision.

import { box, make, pair, rowHead } from "./dom.js";
import { offerReport } from "./report.js";
import { Slider } from "./slider.js";

const PRIORITIES = {
  quality: "Quality: right answers",
  reliability: "Reliability: answers at all",
  speed: "Speed",
  cost: "Cost",
  privacy: "Privacy: what stays here",
};
const LENSES = { builder: "The builder", skeptic: "The skeptic", futurist: "The futurist", buyer: "The buyer" };
const PAUSE_MS = 150;
const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(3)}`;
const span = ({ mean, low, high }) => `${signed(mean)} (${signed(low)} to ${signed(high)})`;

export class Verdict {
  #sliders = new Map();

  /** `parts`: sliders, first, second, reset, report, message, result, and what it has. `chosen(query)`: for the address. */
  constructor(parts, { ask, key, chosen }) {
    Object.assign(this, { parts, ask, chosen });
    for (const select of [parts.first, parts.second]) select.addEventListener("change", () => this.#moved());
    parts.reset.addEventListener("click", () => {
      this.hide();
      parts.first.value = parts.second.value = "";
      this.#ask(new URLSearchParams(), { anew: true });
      chosen("");
    });
    const say = (text) => (parts.message.textContent = text);
    offerReport(parts.report, { ask, key, terms: () => this.asked ?? "", say });
  }

  /** `query`: targets, weights and volume as the address has them, and as the service takes them. */
  async show(query) {
    this.hide();
    await this.#offerTargets(query.get("targets")?.split(",") ?? []);
    await this.#ask(query, { anew: true });
  }

  /** What a slider or a choice was about to ask is not asked any more. */
  hide() {
    clearTimeout(this.waiting);
  }

  #moved() {
    this.hide();
    this.waiting = setTimeout(() => {
      const query = this.#query();
      this.chosen(query.toString());
      this.#ask(query, { anew: false });
    }, PAUSE_MS);
  }

  #query() {
    const [first, second] = [this.parts.first.value, this.parts.second.value];
    const weights = [...this.#sliders].filter(([name]) => name !== "volume").map(([name, { value }]) => `${name}=${value}`);
    const query = new URLSearchParams(first && second ? { targets: `${first},${second}` } : {});
    if (weights.length) query.set("weights", weights.join(","));
    if (this.#sliders.get("volume")?.moved) query.set("volume", this.#sliders.get("volume").value);
    return query;
  }

  /** `anew`: the sliders are set to what was decided with. Of answers that overtake each other the last one's is shown. */
  async #ask(query, { anew }) {
    const { message, result } = this.parts;
    const asked = (this.asked = query);
    try {
      const found = await (await this.ask(`verdict${query.size ? `?${query}` : ""}`)).json();
      if (asked !== this.asked) return;
      message.textContent = "";
      if (anew) this.#setSliders(found, Number(query.get("volume")) || volumeOf(found));
      this.#draw(found);
      result.hidden = false;
    } catch (error) {
      if (asked !== this.asked) return;
      message.textContent = error.message;
      result.hidden = true;
    }
  }

  async #offerTargets(chosen) {
    const names = new Set(chosen);
    try {
      for (const { name } of (await (await this.ask("targets")).json()).targets) names.add(name);
    } catch {
      // The verdict itself says what is wrong.
    }
    for (const [place, select] of [this.parts.first, this.parts.second].entries()) {
      const none = make("option", "the two asked most together");
      none.value = "";
      select.replaceChildren(none, ...[...names].map((name) => make("option", name)));
      select.value = chosen[place] ?? "";
    }
  }

  #setSliders({ weights }, volume) {
    const changed = () => this.#moved();
    for (const [name, label] of Object.entries(PRIORITIES)) {
      const weight = weights[name];
      if (this.#sliders.has(name)) this.#sliders.get(name).set(weight);
      else this.#add(name, { label, least: 0, most: 1, value: weight }, { shown: (value) => value.toFixed(2), changed });
    }
    const slider = this.#sliders.get("volume");
    if (slider) slider.set(volume);
    else {
      const scale = { label: "Inputs a month", least: 10, most: 1e7, value: volume, factors: true, whole: true };
      this.#add("volume", scale, { shown: (value) => value.toLocaleString("en"), changed });
    }
  }

  #add(name, scale, told) {
    const slider = new Slider({ name: `weight_${name}`, ...scale }, told);
    this.#sliders.set(name, slider);
    this.parts.sliders.append(slider.element);
  }

  #draw(found) {
    const { parts } = this;
    parts.choice.textContent = found.target ? `${found.choice}: ${found.target}` : found.choice;
    parts.choice.dataset.choice = found.choice;
    parts.text.textContent = found.text;
    parts.dissent.replaceChildren(...found.dissent.map((line) => make("li", line)));
    parts.sides.replaceChildren(make("span", `← ${found.first}`), make("span", `${found.second} →`));
    const rows = Object.entries(found.priorities).map(([name, estimate]) => estimateRow(name, found.weights[name], estimate));
    parts.rows.replaceChildren(...rows, estimateRow("together", null, found.advantage));
    parts.reasons.replaceChildren(...found.reasons.map((line) => make("li", line)));
    parts.lenses.replaceChildren(...found.lenses.map(lensCard));
    const formulas = Object.entries(found.formulas).map(([name, text]) => pair(name.replaceAll("_", " "), make("dd", text)));
    parts.formulas.replaceChildren(...formulas);
  }
}

const volumeOf = ({ lenses }) => lenses.find(({ name }) => name === "buyer").figures.volume;

/** A difference with its interval, on a scale from -1, all for the first, to 1, all for the second. */
function estimateRow(name, weight, estimate) {
  const line = box("tr", weight === null ? "given" : "", rowHead(name), make("td", weight === null ? "" : String(weight)));
  if (!estimate) {
    line.append(make("td", "not measured", "missing"));
    return line;
  }
  const share = (value) => `${(value + 1) * 50}%`;
  const [interval, mark] = [make("span", "", "interval"), make("span", "", "mark")];
  Object.assign(interval.style, { left: share(estimate.low), width: `${(estimate.high - estimate.low) * 50}%` });
  mark.style.left = share(estimate.mean);
  const scale = box("span", `scale both ${estimate.sign ? "certain" : ""}`, interval, mark);
  scale.setAttribute("aria-hidden", "true");
  line.append(box("td", "drawn", scale, make("span", span(estimate)), make("small", `n ${estimate.n}`)));
  return line;
}

function lensCard({ name, prefers, text }) {
  const card = box("article", "lens", make("h3", LENSES[name] ?? name), make("p", prefers ? `prefers ${prefers}` : "is not certain", prefers ? "prefers" : "hint"));
  const said = text.split("; ").map((part) => make("li", part));
  card.append(box("ul", "", ...said));
  return card;
}
