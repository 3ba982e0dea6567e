// The form: one picture, one question, some targets. Sends one comparison and shows its events as they come.

import { at, make } from "./dom.js";
import { fieldOf, Picture } from "./picture.js";
import { readEvents } from "./sse.js";

const RETRY_MS = 1500;

export class Compare {
  #running = null; // the AbortController of the comparison under way
  #targets = [];

  /** `answers` shows them; `made(id)` is called with each whole comparison. */
  constructor({ ask, answers, uploads, samples, made }) {
    Object.assign(this, { ask, answers, uploads, samples, made });
    this.picture = new Picture(
      { drop: at("drop"), input: at("file"), preview: at("preview"), title: at("drop_title") },
      {
        changed: () => {
          this.say("");
          samples.forget();
        },
        refused: (text) => this.say(text),
      },
    );
    this.#listen();
  }

  say(text) {
    at("message").textContent = text;
  }

  /** Whether the targets are there; waits while the service is not ready. */
  async load() {
    try {
      ({ targets: this.#targets } = await (await this.ask("targets")).json());
      at("targets").replaceChildren(...this.#targets.map((target) => this.#targetRow(target)));
      this.#showNotices();
      await this.samples.load(this.picture);
      this.say("");
      return true;
    } catch (error) {
      this.say(error.message);
      if (error.status !== 503) return false;
      await new Promise((settle) => setTimeout(settle, RETRY_MS)); // the models are still being loaded
      return this.load();
    }
  }

  #listen() {
    at("form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#compare();
    });
    at("question").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#compare();
    });
    at("stop").addEventListener("click", () => {
      this.#running?.abort();
      at("ask").focus();
    });
  }

  #targetRow(target) {
    const row = make("label", "", "check");
    const box = make("input");
    // Under the policy prefer-local a hosted target is allowed, and still not asked unless it is chosen.
    const checked = target.allowed && target.compared_by_default !== false;
    Object.assign(box, { type: "checkbox", value: target.name, checked, disabled: !target.allowed });
    box.addEventListener("change", () => this.#showNotices());
    const text = make("span");
    const where = target.leaves_device
      ? `sends the input to ${target.destination ?? "another machine"}`
      : `stays on this device${target.destination ? `, at ${target.destination}` : ""}`;
    text.append(make("span", target.name, "name"), make("span", where, target.leaves_device ? "hint left" : "hint"));
    if (!target.allowed) text.append(make("span", "off: the server's policy is local-only", "hint"));
    row.append(box, text);
    return row;
  }

  #chosen() {
    return [...at("targets").querySelectorAll("input:checked")].map((box) => box.value);
  }

  #showNotices() {
    const chosen = this.#chosen();
    const told = this.#targets.filter(({ name, notice }) => notice && chosen.includes(name));
    const notices = new Set(told.map(({ notice }) => notice));
    at("notices").replaceChildren(...[...notices].map((notice) => make("li", notice)));
  }

  /** What is missing, and where it belongs; null where nothing is. */
  #incomplete() {
    if (!this.picture.file) return ["Choose a picture first, or one of the samples.", at("file")];
    if (!at("question").value.trim()) return ["Type a question.", at("question")];
    const least = at("blind").checked ? 2 : 1;
    if (this.#chosen().length >= least) return null;
    const text = least === 1 ? "Choose at least one target." : "Choose at least two targets to compare blind.";
    return [text, at("targets").querySelector("input:enabled")];
  }

  #body() {
    const { file } = this.picture;
    const body = new FormData();
    body.append(fieldOf(file) ?? "image", file, file.name || "picture");
    body.append("prompt", at("question").value.trim());
    body.append("targets", this.#chosen().join(","));
    body.append("detail", at("detail").value);
    if (at("reference").value.trim()) body.append("reference", at("reference").value.trim());
    body.append("parallel", String(at("parallel").checked));
    body.append("stream", "true");
    if (at("blind").checked) body.append("blind", "true");
    return body;
  }

  async #compare() {
    if (this.#running) return;
    const missing = this.#incomplete();
    this.say(missing?.[0] ?? "");
    if (missing) return missing[1]?.focus();
    const [chosen, body] = [this.#chosen(), this.#body()];
    this.#running = new AbortController();
    if (!(await this.#mayLeave(chosen))) {
      this.#running = null;
      return;
    }
    this.answers.begin(chosen, { blind: at("blind").checked, picture: this.picture.shown() });
    this.#begun();
    try {
      const response = await this.ask("compare", { method: "POST", body, signal: this.#running.signal });
      const whole = await this.#read(response.body);
      this.answers.end(whole);
      at("status").textContent = "Done.";
      this.made(whole);
    } catch (error) {
      const stopped = error.name === "AbortError";
      if (!stopped) this.say(error.message);
      at("status").textContent = stopped ? "Stopped." : "";
      this.answers.stop();
    } finally {
      this.#running = null;
      this.#showButtons();
    }
  }

  async #read(stream) {
    for await (const { event, data } of readEvents(stream)) {
      const value = JSON.parse(data);
      if (event === "comparison") return value;
      this.answers.take(event, value);
      at("status").textContent = this.answers.progress;
    }
    throw new Error("The connection ended before the comparison was complete.");
  }

  /** Whether question and picture may go to those targets; where they may not, the page says so. */
  async #mayLeave(chosen) {
    const asked = this.#targets.filter(({ name }) => chosen.includes(name));
    const { sizes, unsaid } = this.picture;
    try {
      const allowed = await this.uploads.allowed(asked, at("question").value.trim(), sizes, unsaid);
      if (!allowed) this.say("Nothing was sent.");
      return allowed;
    } catch (error) {
      this.say(error.message);
      return false;
    }
  }

  #begun() {
    at("status").textContent = "Asking…";
    this.#showButtons();
    const { element } = this.answers;
    if (element.getBoundingClientRect().top > 0.6 * innerHeight) element.scrollIntoView();
  }

  #showButtons() {
    at("stop").hidden = !this.#running;
    at("ask").setAttribute("aria-disabled", String(Boolean(this.#running))); // not `disabled`: it would lose the focus
  }
}
