// One card per target: its state, its answer as it streams, its figures. All text goes in as text, never as markup.

import { figure, make, pair, slotsOf } from "./dom.js";
import * as format from "./format.js";
import { errorText } from "./service.js";
import { tileFigure } from "./tiles.js";

const STATES = { waiting: "Waiting", answering: "Answering", done: "Done", failed: "Failed", stopped: "Stopped" };
const TURNS = ["first", "second", "third"];
const FINISH = {
  length: "The answer was cut at the token limit.",
  refusal: "The model refused to answer.",
};

const WIDE = "(min-width: 52rem)"; // on a phone the long list of a card's figures is folded

export class Card {
  totalMs = null;

  /** `picture`: a promise of what the tiles are drawn on, or of null. */
  constructor(template, target, picture) {
    this.slots = slotsOf(template);
    this.element = this.slots.element;
    this.picture = picture;
    this.slots.name.textContent = target;
    this.slots.more.open = matchMedia(WIDE).matches;
    this.element.setAttribute("aria-label", target);
    this.#state("waiting");
  }

  get settled() {
    return !["waiting", "answering"].includes(this.element.dataset.state);
  }

  delta(text) {
    this.#state("answering");
    this.slots.answer.append(text);
  }

  stop() {
    if (!this.settled) this.#state("stopped");
  }

  fail(error) {
    this.#state("failed");
    this.slots.error.textContent = errorText(error);
  }

  /** The whole answer of a side that is still hidden. */
  say(text) {
    this.#state("done");
    this.slots.answer.textContent = text || "(no text)";
    this.slots.answer.classList.toggle("missing", !text);
  }

  /** Who a hidden side was, with its figures. */
  reveal(result) {
    this.slots.name.textContent = result.target;
    this.element.setAttribute("aria-label", result.target);
    this.finish(result);
  }

  /** The whole answer with its figures replaces what was streamed. */
  finish(result) {
    this.#state("done");
    const { slots } = this;
    slots.answer.textContent = result.text || "(no text)";
    slots.answer.classList.toggle("missing", !result.text);
    if (typeof result.correct === "boolean") {
      slots.badge.hidden = false;
      slots.badge.textContent = result.correct ? "✓ Right" : "✗ Wrong";
      slots.badge.classList.add(result.correct ? "right" : "wrong");
    }
    slots.remarks.textContent = [
      FINISH[result.finish_reason],
      result.contended ? "Ran together with others: its times are no measurement." : null,
    ].filter(Boolean).join(" ");
    this.#badge(result.egress);
    this.#times(result.timings ?? {});
    this.#tiles(result.images ?? []);
    this.#facts(result);
    slots.figures.hidden = false;
  }

  /** Draws the total time on the scale that all cards share. */
  scaleTo(longestMs) {
    this.slots.total_bar.style.width = this.totalMs === null ? "0" : `${(100 * this.totalMs) / longestMs}%`;
  }

  #state(name) {
    this.element.dataset.state = name;
    this.slots.state.textContent = STATES[name];
    this.slots.answer.setAttribute("aria-busy", String(!this.settled)); // read aloud once it is whole
  }

  /** What left, in a word that stands beside the state. */
  #badge(egress) {
    const { egress: badge } = this.slots;
    if (!egress) return;
    badge.hidden = false;
    badge.textContent = format.egressBadge(egress);
    badge.classList.add(egress.left_device ? "went" : "stayed");
    badge.title = format.egress(egress);
  }

  async #tiles([report]) {
    const drawing = report && tileFigure(report, await this.picture);
    this.slots.tiles.replaceChildren(...(drawing ? [drawing] : []));
  }

  #times(timings) {
    const { slots } = this;
    this.totalMs = timings.total_ms ?? null;
    const headline = [
      ["First token", format.milliseconds(timings.ttft_ms)],
      ["Total", format.milliseconds(timings.total_ms)],
      ["Tokens/s", format.rate(timings.tokens_per_second)],
    ];
    slots.headline.replaceChildren(...headline.map(([name, text]) => pair(name, figure("dd", text))));
    const shares = format.stageShares(timings);
    slots.stages.replaceChildren(...shares.map(([key, share]) => {
      const part = make("span", "", "fill");
      part.dataset.stage = key;
      part.style.flexGrow = String(share);
      return part;
    }));
    slots.stages.hidden = slots.stages_label.hidden = !shares.length;
    const thinks = ([key]) => key !== "thinking_ms" || typeof timings[key] === "number"; // a local model does not
    slots.rows.replaceChildren(...format.STAGES.filter(thinks).map(([key, name]) => {
      const row = make("tr");
      const head = make("th");
      head.scope = "row";
      const swatch = make("span", "", "swatch");
      if (typeof timings[key] === "number") swatch.dataset.stage = key;
      head.append(swatch, name);
      row.append(head, figure("td", format.milliseconds(timings[key])));
      return row;
    }));
  }

  #facts(result) {
    const { images = [], memory = {}, egress, cost = {} } = result;
    const money = figure("dd", format.dollars(cost.usd), "not known");
    if (cost.basis) money.append(make("small", cost.basis));
    const energy = figure("dd", format.joules(result.energy));
    if (result.energy?.basis) energy.append(make("small", result.energy.basis));
    const sent = figure("dd", egress ? format.egress(egress) : null);
    sent.classList.toggle("left", Boolean(egress?.left_device));
    const rows = [
      ["Picture", images.length ? make("dd", format.imageReports(images)) : figure("dd", null)],
      ["Tokens", figure("dd", format.tokens(result.usage))],
      ["Queued", figure("dd", format.milliseconds(result.timings?.queue_ms))],
      ["Model size", figure("dd", format.bytes(memory.model_bytes))],
      ["Process peak", figure("dd", format.bytes(memory.process_peak_bytes))],
      ["Cost", money],
      ["Energy", energy],
      ["Sent", sent],
      ...(result.attempts?.length ? [["Tried", figure("dd", format.attempts(result.attempts))]] : []),
      ["Turn", figure("dd", TURNS[result.order] ?? `number ${result.order + 1}`)],
    ];
    this.slots.facts.replaceChildren(...rows.map(([name, value]) => pair(name, value)));
  }
}
