// The comparisons that were kept: a list to filter, open and delete from.

import { asked, at, box, make } from "./dom.js";
import { dollars, milliseconds, moment } from "./format.js";
import { offerReport } from "./report.js";

const PAGE = 24;
const MARKS = new Map([[true, ["✓", "right"]], [false, ["✗", "wrong"]]]);
export const address = (id) => `compare/${encodeURIComponent(id)}`;

/** Asks first; whether it is gone. Raises Error with the service's own words. */
export async function deleted(id, ask) {
  at("delete_id").textContent = id;
  if ((await asked(at("delete"))) !== "delete") return false;
  await ask(address(id), { method: "DELETE" });
  return true;
}

export class History {
  #next = null;

  /** `parts`: form, list, more, message, text, targets, report. */
  constructor(parts, { ask, key, filtered }) {
    Object.assign(this, { parts, ask, filtered });
    parts.form.addEventListener("submit", (event) => event.preventDefault());
    parts.form.addEventListener("change", () => {
      filtered(this.#filter().toString());
      this.load();
    });
    parts.more.addEventListener("click", () => this.#page());
    const say = (text) => (parts.message.textContent = text);
    offerReport(parts.report, { ask, key, terms: () => this.#terms(), say });
  }

  /** `query`: the filter as the address has it. */
  async show(query) {
    await this.#offerTargets(query.get("target"));
    for (const field of this.parts.form.elements) if (field.name) field.value = query.get(field.name) ?? "";
    await this.load();
  }

  /** The first page in the place of what stands there. */
  async load() {
    this.#next = null;
    await this.#page();
  }

  #filter() {
    return new URLSearchParams([...new FormData(this.parts.form)].filter(([, value]) => value));
  }

  /** The filter as the service takes it: a day that is chosen is one of the reader's own zone. */
  #terms() {
    const query = this.#filter();
    if (query.has("since")) query.set("since", new Date(`${query.get("since")}T00:00`).toISOString());
    return query;
  }

  async #page() {
    const { list, more, message, text } = this.parts;
    const query = this.#terms();
    query.set("limit", PAGE);
    query.set("thumbnails", "true");
    const first = !this.#next;
    if (!first) query.set("cursor", this.#next);
    const wanted = (this.wanted = query);
    try {
      const found = await (await this.ask(`compare?${query}`)).json();
      if (wanted !== this.wanted) return;
      if (first) list.replaceChildren();
      list.append(...found.comparisons.map((row) => this.#item(row)));
      this.#next = found.next;
      message.textContent = "";
      const narrowed = this.#filter().size ? "No comparison fits that." : "Nothing is kept yet: make a comparison first.";
      text.textContent = list.childElementCount ? "" : narrowed;
    } catch (error) {
      message.textContent = error.message;
    }
    more.hidden = !this.#next;
  }

  async #offerTargets(chosen) {
    const select = this.parts.targets;
    const names = new Set(chosen ? [chosen] : []);
    try {
      for (const { name } of (await (await this.ask("targets")).json()).targets) names.add(name);
    } catch {
      // The list itself says what is wrong.
    }
    const any = make("option", "any");
    any.value = "";
    select.replaceChildren(any, ...[...names].map((name) => make("option", name)));
  }

  #item(row) {
    const link = make("a", "", "kept");
    link.href = `#/${address(row.id)}`;
    const picture = row.thumbnail ? make("img", "", "thumbnail") : make("span", row.task, "thumbnail none");
    if (row.thumbnail) Object.assign(picture, { src: row.thumbnail, alt: "", loading: "lazy" });
    const head = make("span", row.prompt ?? (row.reference ? `Right answer: ${row.reference}` : `A question (${row.task}) that was not kept`), "kept_name");
    const facts = [moment(row.created_at), row.blind ? "blind" : "", row.prompt && row.reference ? `right: ${row.reference}` : ""];
    link.append(picture, box("span", "kept_head", head, make("span", facts.filter(Boolean).join(" · "), "hint")), box("span", "kept_answers", ...row.results.map(answer)));
    const button = make("button", "Delete", "quiet");
    button.type = "button";
    button.setAttribute("aria-label", `Delete the comparison of ${moment(row.created_at)}`);
    const item = box("li", "kept_row", link, button);
    button.addEventListener("click", () => this.#delete(row.id, item));
    return item;
  }

  async #delete(id, item) {
    try {
      if (!(await deleted(id, this.ask))) return;
      const next = item.nextElementSibling ?? item.previousElementSibling;
      item.remove();
      (next?.querySelector("a") ?? this.parts.form.querySelector("select")).focus();
    } catch (error) {
      this.parts.message.textContent = error.message;
    }
  }
}

/** One target or hidden side in a line: whether it was right, who, what it said, what it took. */
function answer(result) {
  const [mark, kind] = MARKS.get(result.correct) ?? ["", ""];
  const name = result.target ?? `Side ${result.side.toUpperCase()}`;
  const took = [milliseconds(result.total_ms), dollars(result.usd)].filter(Boolean).join(", ");
  const said = result.ok ? make("span", result.text || "(no text)", "kept_text") : make("span", "failed", "kept_text wrong");
  const sign = make("span", mark, `kept_mark ${kind}`);
  if (mark) sign.setAttribute("aria-label", kind);
  return box("span", "kept_answer", sign, make("span", name, "hint kept_target"), said, make("span", took, "hint kept_took"));
}
