// One comparison that was kept: what is known of it, its answers, the vote where it is still open, deletion.

import { make, pair } from "./dom.js";
import { bytes, moment } from "./format.js";
import { address, deleted } from "./history.js";
import { pictureAt } from "./tiles.js";
import { voter } from "./votes.js";

export class Recorded {
  /** `parts`: box, picture, title, facts, again, remove, message. `answers` shows them, `gone()` follows deletion. */
  constructor(parts, { ask, answers, gone }) {
    Object.assign(this, { parts, ask, answers });
    parts.remove.addEventListener("click", async () => {
      try {
        if (await deleted(this.id, ask)) gone();
      } catch (error) {
        parts.message.textContent = error.message;
      }
    });
  }

  async show(id) {
    const { box, message } = this.parts;
    this.id = id;
    this.answers.element.hidden = box.hidden = true;
    message.textContent = "";
    try {
      const record = await (await this.ask(`${address(id)}?voter=${encodeURIComponent(voter())}`)).json();
      if (id !== this.id) return;
      this.#head(record);
      const { thumbnail } = record.input;
      const targets = record.results.map(({ target }) => target);
      const blind = record.results.some(({ side }) => side);
      const picture = thumbnail ? pictureAt(thumbnail, { reduced: true }) : null;
      this.answers.begin(targets, { blind, picture });
      this.answers.end(record);
    } catch (error) {
      if (id === this.id) message.textContent = error.message;
    }
  }

  #head({ id, created_at, task, input, settings, reference, blind }) {
    const { parts } = this;
    parts.box.hidden = false;
    parts.picture.hidden = !input.thumbnail;
    if (input.thumbnail) parts.picture.src = input.thumbnail;
    parts.title.textContent = input.prompt ?? "The question was not kept, only its hash";
    const files = input.files.map(({ kind, bytes: size }) => `${kind} of ${bytes(size)}`).join(", ");
    const terms = [`detail ${settings.detail}`, settings.repeats > 1 ? `${settings.repeats} rounds` : "", settings.parallel ? "run together" : "", blind ? "blind" : ""];
    const rows = [
      ["Asked", `${moment(created_at)}, ${task}`],
      ["Right answer", reference],
      ["Input", `${files || "words alone"}, sha256 ${input.sha256.slice(0, 12)}…`],
      ["Terms", terms.filter(Boolean).join(", ")],
    ];
    parts.facts.replaceChildren(...rows.filter(([, text]) => text).map(([name, text]) => pair(name, make("dd", text))));
    parts.again.textContent = `nearfar replay ${id}${input.kept ? "" : " FILE QUESTION"}`;
  }
}
