// Puts the page together: the views with what they need, the address, the keyboard.

import { Answers } from "./answers.js";
import { BreakEven } from "./break_even.js";
import { Compare } from "./compare.js";
import { at } from "./dom.js";
import { address, History } from "./history.js";
import { Leaderboard } from "./leaderboard.js";
import { Metrics } from "./metrics.js";
import { Models } from "./models.js";
import { Recorded } from "./record.js";
import { headingOf, Router } from "./router.js";
import { Samples } from "./samples.js";
import { service } from "./service.js";
import { Shortcuts } from "./shortcuts.js";
import { Uploads } from "./upload.js";
import { Verdict } from "./verdict.js";

/** Elements by the name of what they are for; their ids begin with the prefix. */
const partsOf = (prefix, ...names) => Object.fromEntries(names.map((name) => [name, at(`${prefix}_${name}`)]));
const link = (view) => document.querySelector(`nav a[href="#/${view}"]`);

const key = () => at("key").value;
const ask = service({
  key,
  locked() {
    at("key_box").hidden = false;
  },
});
const answers = () => new Answers(at("answers"), at("card"), { ask });
const [live, kept] = [answers(), answers()];
at("live").append(live.element);
at("kept_answers").append(kept.element);

const compare = new Compare({
  ask,
  answers: live,
  uploads: new Uploads(at("upload"), ask),
  samples: new Samples({ ask, failed: (text) => compare.say(text) }),
  made({ id }) {
    live.id = id;
    if (router.current === "compare" && at("record").hidden) router.replace(address(id)); // so that a reload shows it again
  },
});
const models = new Models(partsOf("models", "box", "list", "status", "progress"), { ask, served: load });
const recorded = new Recorded(partsOf("record", "box", "picture", "title", "facts", "again", "remove", "message"), {
  ask,
  answers: kept,
  gone: () => router.go("history"),
});
const leaderboard = new Leaderboard(partsOf("leaderboard", "table", "rows", "text", "message"), { ask });
const history = new History(partsOf("history", "form", "list", "more", "message", "text", "targets", "report"), {
  ask,
  key,
  filtered: (query) => router.replace(query ? `history?${query}` : "history"),
});
const verdict = new Verdict(
  partsOf("verdict", "sliders", "first", "second", "reset", "report", "message", "result", "choice", "text", "dissent", "sides", "rows", "reasons", "lenses", "formulas"),
  { ask, key, chosen: (query) => router.replace(query ? `verdict?${query}` : "verdict") },
);
const breakEven = new BreakEven(
  partsOf("even", "sliders", "mode", "measured", "message", "plot", "heading", "rows", "method", "inputs"), { ask },
);
const metrics = new Metrics(partsOf("metrics", "tiles", "table", "rows", "errors", "message", "text"), { ask });

/** The form, or in its place the comparison of that id; one that the form has just made stands below it. */
function showCompare(id) {
  const own = !id || id === live.id;
  at("own").hidden = !own;
  at("record").hidden = own;
  if (!own) recorded.show(id);
}

const router = new Router({
  compare: { section: at("view_compare"), link: link("compare"), show: showCompare },
  history: { section: at("view_history"), link: link("history"), show: (_, query) => history.show(query) },
  leaderboard: { section: at("view_leaderboard"), link: link("leaderboard"), show: () => leaderboard.load() },
  verdict: { section: at("view_verdict"), link: link("verdict"), show: (_, query) => verdict.show(query), hide: () => verdict.hide() },
  "break-even": { section: at("view_break_even"), link: link("break-even"), show: () => breakEven.show() },
  metrics: { section: at("view_metrics"), link: link("metrics"), show: () => metrics.show(), hide: () => metrics.hide() },
});

new Shortcuts({
  go: (view) => router.go(view),
  seek: () => document.querySelector("section:not([hidden]) > :not([hidden]) [data-seek], section:not([hidden]) [data-seek]")?.focus(),
  names: Object.fromEntries(Object.entries(router.views).map(([name, { link: { textContent } }]) => [name, textContent])),
});

async function load() {
  if (await compare.load()) await models.load().catch((error) => compare.say(error.message));
}

at("skip").addEventListener("click", (event) => {
  event.preventDefault();
  headingOf(at("main")).focus();
});
at("use_key").addEventListener("click", () => {
  router.start();
  load();
});
router.start();
load();
