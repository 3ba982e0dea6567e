// The models of the catalog that can be fetched: a button each, its size and a question first, then how far it is.

import { make } from "./dom.js";
import { bytes } from "./format.js";

const POLL_MS = 700;

export class Models {
  /** `ask` is fetch with the key; `served` is called when a model has become a target. */
  constructor(parts, { ask, served }) {
    Object.assign(this, { parts, ask, served, polling: false });
  }

  async load() {
    const { catalog, pulling } = await (await this.ask("models")).json();
    const absent = catalog.filter((row) => fileBytes(row) && !row.installed.length);
    this.parts.list.replaceChildren(...absent.map((row) => this.item(row)));
    this.parts.box.hidden = !absent.length && !pulling;
    if (pulling && pulling.state !== "done") this.show(pulling);
    return pulling;
  }

  item(row) {
    const size = `about ${bytes(fileBytes(row))}`;
    const item = make("li");
    const button = make("button", `Fetch ${row.name}`);
    button.type = "button";
    button.addEventListener("click", () => {
      if (confirm(`Fetch ${row.name} from ${row.source}? ${size}, ${row.license}, ${row.verification}.`)) this.fetch(row.name);
    });
    item.append(button, make("span", `${size}, ${row.license}, ${row.verification}`, "hint"));
    return item;
  }

  async fetch(name) {
    try {
      this.show((await (await this.ask(`models/${encodeURIComponent(name)}/pull`, { method: "POST" })).json()).pulling);
    } catch (error) {
      this.parts.status.textContent = error.message;
    }
  }

  show({ model, state, bytes: there, total_bytes: total, error }) {
    const { status, progress, box } = this.parts;
    const busy = state === "fetching" || state === "loading";
    box.open = true;
    progress.hidden = !busy;
    if (busy && total && state === "fetching") Object.assign(progress, { max: total, value: there });
    else progress.removeAttribute("value");
    const far = total ? `: ${bytes(there)} of ${bytes(total)}` : "";
    status.textContent = {
      fetching: `Fetching ${model}${far}`,
      loading: `Loading ${model}…`,
      done: `${model} is served now.`,
      failed: `${model} was not fetched: ${error}`,
    }[state];
    if (busy && !this.polling) this.poll();
  }

  async poll() {
    this.polling = true;
    try {
      for (;;) {
        await new Promise((wake) => setTimeout(wake, POLL_MS));
        const pulling = await this.load();
        if (pulling?.state === "fetching" || pulling?.state === "loading") continue;
        if (pulling?.state === "done") {
          this.show(pulling);
          await this.served();
        }
        return;
      }
    } catch (error) {
      this.parts.status.textContent = error.message;
    } finally {
      this.polling = false;
    }
  }
}

/** Of the recipe that a fetch takes; nothing where there are no published ONNX files for it. */
function fileBytes(row) {
  const recipe = row.recipes?.int4;
  return recipe && Object.keys(recipe.published_files).length ? recipe.file_bytes : null;
}
