// The bundled pictures, each with a question and its right answer: one press fills the form.

import { at, make } from "./dom.js";

export class Samples {
  #sample = null; // whose question and answer stand in the fields

  /** `failed(text)` says why a picture could not be had. */
  constructor({ ask, failed }) {
    Object.assign(this, { ask, failed });
  }

  async load(picture) {
    this.picture = picture;
    const { samples } = await (await this.ask("samples")).json();
    at("samples").replaceChildren(...samples.map((row) => this.#item(row)));
    at("samples_box").hidden = !samples.length;
  }

  /** Another picture: what the sample had filled in no longer fits. */
  forget() {
    const sample = this.#sample;
    if (sample && at("question").value === sample.question) at("question").value = "";
    if (sample && at("reference").value === sample.answer) at("reference").value = "";
    this.#mark(null);
  }

  #item(row) {
    const button = make("button", "", "sample");
    Object.assign(button, { type: "button", title: row.question });
    button.dataset.file = row.file;
    button.setAttribute("aria-pressed", "false");
    const image = make("img");
    Object.assign(image, { src: row.url, alt: `${row.file.replace(/\.\w+$/, "").replaceAll("-", " ")}: ${row.question}` });
    button.append(image);
    button.addEventListener("click", () => this.#take(row));
    const item = make("li");
    item.append(button);
    return item;
  }

  async #take(row) {
    try {
      const blob = await (await this.ask(row.url)).blob();
      this.picture.set(new File([blob], row.file, { type: blob.type }));
    } catch (error) {
      return this.failed(error.message);
    }
    this.failed("");
    this.#mark(row);
    at("question").value = row.question;
    at("reference").value = row.answer ?? "";
    if (matchMedia("(pointer: fine)").matches) at("question").focus(); // on a phone this would raise the keyboard
  }

  #mark(sample) {
    this.#sample = sample;
    for (const button of at("samples").querySelectorAll("button")) {
      button.setAttribute("aria-pressed", String(button.dataset.file === sample?.file));
    }
  }
}
