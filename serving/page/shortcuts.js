// The keyboard: letters that go to a view or a field. Off while one types, and for good where one wants them off.

import { at, asked, make, pair } from "./dom.js";

const OFF = "nearfar_no_shortcuts";
const VIEWS = { c: "compare", h: "history", l: "leaderboard", v: "verdict", b: "break-even", m: "metrics" };

export class Shortcuts {
  /** `go(view)` shows a view, `seek()` puts the focus into the field that the view begins with. */
  constructor({ go, seek, names }) {
    Object.assign(this, { go, seek, behind: null });
    const keys = [["?", "this list"], ["/", "to the question, or to the filter"],
      ...Object.entries(VIEWS).map(([key, view]) => [`g ${key}`, names[view]]),
      ["Enter", "in the question: compare; with Shift: a new line"], ["Esc", "close a dialog, sending and deleting nothing"]];
    at("shortcut_list").replaceChildren(...keys.map(([key, text]) => {
      const row = pair("", make("dd", text));
      row.firstElementChild.append(...key.split(" ").map((each) => make("kbd", each)));
      return row;
    }));
    at("shortcuts_on").checked = !stored();
    at("shortcuts_on").addEventListener("change", ({ target }) => store(!target.checked));
    at("help").addEventListener("click", () => asked(at("shortcuts")));
    document.addEventListener("keydown", (event) => this.#press(event));
  }

  #press(event) {
    const { key, target } = event;
    const typing = target.isContentEditable || target.matches?.("textarea, select, input:not([type=checkbox], [type=range], [type=file])");
    if (typing || event.ctrlKey || event.metaKey || event.altKey || !at("shortcuts_on").checked) return;
    if (document.querySelector("dialog[open]")) return;
    const before = this.behind;
    this.behind = key === "g" ? "g" : null;
    if (before === "g" && VIEWS[key]) this.go(VIEWS[key]);
    else if (key === "?") asked(at("shortcuts"));
    else if (key === "/") this.seek();
    else return;
    event.preventDefault();
  }
}

function stored() {
  try {
    return localStorage.getItem(OFF) === "yes";
  } catch {
    return false;
  }
}

function store(off) {
  try {
    localStorage.setItem(OFF, off ? "yes" : "");
  } catch {
    // Without storage it holds until the page is closed.
  }
}
