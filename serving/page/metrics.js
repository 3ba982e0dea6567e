// The service while it works: its own metrics, read every two seconds as long as they are looked at.

import { box, drawn, make, rowHead } from "./dom.js";
import { bytes, dollars, milliseconds, number, rate } from "./format.js";
import { histogram, parse, quantile, select, sum } from "./prometheus.js";

const EVERY_MS = 2000;
const KEPT_S = 120;
const STEPS = (KEPT_S * 1000) / EVERY_MS; // of a curve
const [WIDTH, HEIGHT] = [120, 28];
const DONE = { outcome: "finished" };

export class Metrics {
  #looks = []; // {at_s, samples}, the oldest first
  #timer = null;
  #shown = false;

  /** `parts`: tiles, table, rows, errors, message, text. */
  constructor(parts, { ask }) {
    Object.assign(this, { parts, ask });
    document.addEventListener("visibilitychange", () => this.#watch());
  }

  show() {
    this.#shown = true;
    this.#watch();
  }

  hide() {
    this.#shown = false;
    this.#watch();
  }

  /** Looks now and from now on, or no more: a page that nobody sees asks for nothing. */
  #watch() {
    clearInterval(this.#timer);
    this.#timer = null;
    if (!this.#shown || document.visibilityState !== "visible") return;
    this.#timer = setInterval(() => this.#look(), EVERY_MS);
    this.#look();
  }

  async #look() {
    if (this.looking) return;
    this.looking = true;
    try {
      const samples = parse(await (await this.ask("metrics")).text());
      const last = this.#looks.at(-1);
      // A counter that fell: the service was started anew.
      if (last && (total(samples) ?? 0) < (total(last.samples) ?? 0)) this.#looks = [];
      const at_s = performance.now() / 1000;
      // By their age, not their number: while nobody saw the page there were none.
      this.#looks = [...this.#looks.filter((look) => at_s - look.at_s <= KEPT_S), { at_s, samples }].slice(-STEPS - 1);
      this.parts.message.textContent = "";
      this.#draw();
    } catch (error) {
      this.parts.message.textContent = error.message;
    } finally {
      this.looking = false;
    }
  }

  #draw() {
    const { samples } = this.#looks.at(-1);
    this.parts.tiles.replaceChildren(...this.#tiles(samples));
    const targets = [...new Set(select(samples, "nearfar_answers_total").map(({ labels }) => labels.target))].sort();
    this.parts.table.hidden = !targets.length;
    this.parts.rows.replaceChildren(...targets.map((target) => targetRow(samples, target)));
    const errors = select(samples, "nearfar_errors_total").filter(({ value }) => value);
    this.parts.errors.textContent = errors.length
      ? `Errors since the service began: ${errors.map(({ labels, value }) => `${labels.type} ${number(value, 0)}`).join(", ")}.`
      : "No request has ended in an error since the service began.";
    this.parts.text.textContent = `Read every ${EVERY_MS / 1000} s while this view is seen. Curves: the last two minutes. `
      + "Medians and p95 come from a histogram's buckets and are as fine as those; a p95 is shown once a value lies beyond it.";
  }

  #tiles(samples) {
    const [running, waiting] = [sum(samples, "nearfar_requests_running"), sum(samples, "nearfar_requests_waiting")];
    const [slots, used] = [sum(samples, "nearfar_slots"), sum(samples, "nearfar_slots_in_use")];
    const first = this.#looks[0].samples;
    const recent = histogram(samples, "nearfar_time_to_first_token_seconds", {}, this.#looks.length > 1 ? first : samples);
    const ever = histogram(samples, "nearfar_time_to_first_token_seconds");
    const [spent, left] = [sum(samples, "nearfar_spent_today_dollars"), select(samples, "nearfar_budget_left_dollars")];
    const least = left.length ? Math.min(...left.map(({ value }) => value)) : null;
    return [
      tile("Answers a second", this.#now(total), `${number(total(samples) ?? 0, 0)} since the service began`, this.#rates(total)),
      tile("Tokens a second", this.#now(tokens), `${number(tokens(samples) ?? 0, 0)} since then`, this.#rates(tokens)),
      tile("First token, median", milliseconds(inMs(quantile(recent.n ? recent : ever, 0.5))),
        recent.n ? `n ${recent.n}, the last two minutes` : `n ${ever.n}, since the service began`),
      tile("Running", number(running ?? 0, 0), `${number(waiting ?? 0, 0)} waiting`, this.#values("nearfar_requests_running")),
      tile("Slots in use", `${number(used ?? 0, 0)} of ${number(slots ?? 0, 0)}`, "of the models in memory", this.#values("nearfar_slots_in_use"), slots),
      tile("Spent today", dollars(spent ?? 0), least === null ? "no budget is set" : `${dollars(Math.max(0, least))} left of the tightest budget`),
    ];
  }

  /** What a counter gained a second, from look to look. */
  #rates(read) {
    return this.#looks.slice(1).map(({ at_s, samples }, place) => {
      const before = this.#looks[place];
      return ((read(samples) ?? 0) - (read(before.samples) ?? 0)) / (at_s - before.at_s);
    });
  }

  #now(read) {
    return rate(this.#rates(read).at(-1) ?? null);
  }

  #values(name) {
    return this.#looks.map(({ samples }) => sum(samples, name) ?? 0);
  }
}

const total = (samples) => sum(samples, "nearfar_answers_total");
const tokens = (samples) => sum(samples, "nearfar_completion_tokens_total");
const inMs = (seconds) => (seconds === null ? null : seconds * 1000);

function tile(name, value, below, values = [], most = 0) {
  const shown = box("div", "stat", make("span", name, "stat_name"), value === null ? make("span", "…", "stat_value") : make("span", value, "stat_value"),
    make("span", below, "hint"));
  if (values.length > 1) shown.append(curve(values, most));
  return shown;
}

function curve(values, most) {
  const high = Math.max(most, ...values) || 1;
  const svg = drawn("svg", { class: "curve", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" });
  const step = WIDTH / STEPS;
  const from = WIDTH - (values.length - 1) * step;
  const points = values.map((value, place) => `${(from + place * step).toFixed(1)},${(HEIGHT - 2 - (value / high) * (HEIGHT - 4)).toFixed(1)}`);
  svg.append(drawn("line", { x1: 0, x2: WIDTH, y1: HEIGHT - 1, y2: HEIGHT - 1, class: "curve_ground" }));
  svg.append(drawn("polyline", { points: points.join(" "), class: "curve_line" }));
  return svg;
}

function targetRow(samples, target) {
  const done = sum(samples, "nearfar_answers_total", { target, ...DONE }) ?? 0;
  const others = select(samples, "nearfar_answers_total", { target }).filter(({ labels }) => labels.outcome !== "finished");
  const first = histogram(samples, "nearfar_time_to_first_token_seconds", { target });
  const whole = histogram(samples, "nearfar_answer_seconds", { target });
  const written = sum(samples, "nearfar_completion_tokens_total", { target });
  const decoding_s = sum(samples, "nearfar_stage_seconds_sum", { target, stage: "decode" });
  const sent = sum(samples, "nearfar_sent_bytes_total", { target, place: "elsewhere" });
  const answers = make("td", number(done, 0));
  const ended = others.map(({ labels, value }) => `${number(value, 0)} ${labels.outcome}`).join(", ");
  if (ended) answers.append(make("small", ended));
  const line = box("tr", "", rowHead(target), answers, spread(first), spread(whole));
  line.append(cell(decoding_s ? rate(written / decoding_s) : null), cell(dollars(sum(samples, "nearfar_answer_dollars_total", { target }))),
    sent === null ? make("td", "nothing") : cell(bytes(sent)));
  return line;
}

const cell = (text) => (text === null ? make("td", "–", "missing") : make("td", text));

function spread(found) {
  const [middle, high] = [quantile(found, 0.5), quantile(found, 0.95)].map((value) => milliseconds(inMs(value)));
  const made = cell(middle);
  if (middle) made.append(make("small", `${high ? `p95 ${high}, ` : ""}n ${found.n}`));
  return made;
}
