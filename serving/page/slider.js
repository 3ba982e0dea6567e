// A slider with its name and its value in words, on a scale of steps or of factors.

import { box, make } from "./dom.js";

const STEPS = 200;

export class Slider {
  moved = false;

  /** `factors`: the scale is one of factors. `whole`: values are whole numbers. `shown(value)` are its words. */
  constructor({ name, label, least, most, value, factors = false, whole = false }, { shown, changed }) {
    Object.assign(this, { least, most, factors, whole, shown, first: value });
    const text = make("label", label);
    this.output = make("output");
    this.input = make("input");
    text.htmlFor = this.input.id = `slider_${name}`;
    Object.assign(this.input, { type: "range", min: 0, max: STEPS, step: 1, value: this.#place(value), name });
    this.element = box("div", "slider", text, this.output, this.input);
    this.#tell();
    this.input.addEventListener("input", () => {
      this.moved = true;
      this.#tell();
      changed();
    });
  }

  /** Until it is moved, a slider stands for the value it was given, which may lie between two of its steps. */
  get value() {
    if (!this.moved) return this.first;
    const { least, most } = this;
    const position = Number(this.input.value) / STEPS;
    const value = this.factors ? least * (most / least) ** position : least + (most - least) * position;
    return this.whole ? Math.round(value) : Number(value.toPrecision(3));
  }

  /** As if it had never been moved. */
  set(value) {
    Object.assign(this, { first: value, moved: false });
    this.input.value = this.#place(value);
    this.#tell();
  }

  #place(value) {
    const { least, most } = this;
    return Math.round((this.factors ? Math.log(value / least) / Math.log(most / least) : (value - least) / (most - least)) * STEPS);
  }

  #tell() {
    this.output.textContent = this.shown(this.value);
    this.input.setAttribute("aria-valuetext", this.output.textContent);
  }
}
