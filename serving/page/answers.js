// The answers to one question: a card for each target or side, the vote on a blind one, the verdict on this input.

import { Card } from "./cards.js";
import { make, slotsOf } from "./dom.js";
import { errorText } from "./service.js";
import { Vote } from "./votes.js";

const SIDES = ["a", "b"];

export class Answers {
  #cards = new Map();

  /** `voted` gets the comparison that a vote has opened. */
  constructor(template, cardTemplate, { ask, voted }) {
    const parts = slotsOf(template);
    Object.assign(this, { element: parts.element, parts, cardTemplate });
    this.vote = new Vote(parts, { ask, opened: (whole) => this.#opened(whole, voted) });
  }

  /** Cards that wait for those targets, or for two sides where `blind`. `picture`: a promise of it, or null. */
  begin(targets, { blind, picture }) {
    const names = blind ? SIDES.map((side) => [side, `Side ${side.toUpperCase()}`]) : targets.map((name) => [name, name]);
    this.#cards = new Map(names.map(([key, name]) => [key, new Card(this.cardTemplate, name, picture)]));
    this.parts.cards.replaceChildren(...[...this.#cards.values()].map(({ element }) => element));
    this.parts.verdict.hidden = true;
    this.vote.hide();
    this.element.hidden = false;
  }

  /** One event of one target or hidden side. Without either, an error is the whole comparison's. */
  take(event, value) {
    const name = value.side ?? value.target;
    const card = this.#cards.get(name);
    if (event === "error" && !name) throw new Error(errorText(value.error));
    if (!card || card.settled) return;
    if (event === "delta") return card.delta(value.text);
    if (event === "error") card.fail(value.error);
    if (event === "finished") {
      if (value.side) card.say(value.text);
      else card.finish(value);
      this.#scale();
    }
  }

  /** The whole comparison, as it was answered or as it was kept. */
  end(whole) {
    for (const result of whole.results) this.take(result.ok ? "finished" : "error", result);
    if (whole.results.some(({ side }) => side)) return this.vote.offer(whole);
    if (whole.sides) this.vote.tell(whole);
    this.#verdict(whole);
  }

  stop() {
    for (const card of this.#cards.values()) card.stop();
  }

  /** "1 of 2 answered" */
  get progress() {
    const cards = [...this.#cards.values()];
    return `${cards.filter(({ settled }) => settled).length} of ${cards.length} answered`;
  }

  #opened(whole, voted) {
    whole.results.forEach((result, place) => this.#cards.get(SIDES[place]).reveal(result));
    this.#scale();
    this.#verdict(whole);
    voted?.(whole);
  }

  #scale() {
    const cards = [...this.#cards.values()];
    const longest = Math.max(...cards.map(({ totalMs }) => totalMs ?? 0));
    for (const card of cards) card.scaleTo(longest || 1);
  }

  #verdict({ id, verdict }) {
    const { parts } = this;
    parts.choice.textContent = verdict.choice;
    parts.verdict_text.textContent = verdict.text;
    parts.reasons.replaceChildren(...(verdict.reasons ?? []).map((reason) => make("li", reason)));
    const link = make("a", `Comparison ${id}`);
    link.href = `#/compare/${encodeURIComponent(id)}`;
    parts.comparison_id.replaceChildren(link);
    parts.verdict.hidden = false;
  }
}
