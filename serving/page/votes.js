// The vote on a blind comparison, which opens it.

import { plural } from "./format.js";
import { posted } from "./service.js";

const VOTER = "nearfar_voter";
const WORDS = { a: "for A", b: "for B", tie: "for equally good", both_bad: "for both bad" };

/** The same name at each vote from this browser; without storage, another at each visit. */
export function voter() {
  const fresh = () => `page-${[...crypto.getRandomValues(new Uint8Array(8))].map((byte) => byte.toString(16).padStart(2, "0")).join("")}`;
  try {
    if (!localStorage.getItem(VOTER)) localStorage.setItem(VOTER, fresh());
    return localStorage.getItem(VOTER);
  } catch {
    return (voter.here ??= fresh());
  }
}

export class Vote {
  /** `parts`: vote, vote_buttons, vote_text, vote_message. `opened` gets the comparison with everything that was hidden. */
  constructor(parts, { ask, opened }) {
    Object.assign(this, { parts, ask, opened });
    for (const button of parts.vote_buttons.querySelectorAll("button")) {
      button.addEventListener("click", () => this.cast(button.dataset.winner));
    }
  }

  hide() {
    this.parts.vote.hidden = true;
  }

  /** `votable` is said of a comparison that was just made; one that is kept and hidden is so. */
  offer({ id, votable = true }) {
    this.id = id;
    this.parts.vote.hidden = false;
    this.parts.vote_buttons.hidden = !votable;
    this.parts.vote_message.textContent = "";
    this.parts.vote_text.textContent = votable
      ? "Which side answered better? Names and figures come after your vote."
      : "A side gave no answer, so there is nothing to vote on.";
  }

  /** Who the sides were, once a vote has opened them. */
  tell({ sides, votes = {} }, before = "") {
    const given = Object.entries(votes).filter(([, count]) => count);
    const counts = before || !given.length ? "" : ` ${given.map(([name, count]) => `${plural(count, "vote")} ${WORDS[name]}`).join(", ")}.`;
    this.parts.vote.hidden = false;
    this.parts.vote_buttons.hidden = true;
    this.parts.vote_message.textContent = "";
    this.parts.vote_text.textContent = `${before}Side A was ${sides.a}, side B was ${sides.b}.${counts}`;
  }

  async cast(winner) {
    if (this.casting) return;
    this.casting = true;
    try {
      const whole = await (await this.ask(`compare/${this.id}/vote`, posted({ winner, voter: voter() }))).json();
      this.tell(whole, "Your vote is kept. ");
      this.opened(whole);
    } catch (error) {
      this.parts.vote_message.textContent = error.message;
    } finally {
      this.casting = false;
    }
  }
}
