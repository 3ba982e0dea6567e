// Elements made of text, never of markup.

const SVG = "http://www.w3.org/2000/svg";

export const at = (id) => document.getElementById(id);

/** A new element with that text and class. */
export function make(tag, text = "", className = "") {
  const element = document.createElement(tag);
  element.textContent = text;
  if (className) element.className = className;
  return element;
}

/** A new element with those inside. */
export function box(tag, className, ...inside) {
  const element = make(tag, "", className);
  element.append(...inside);
  return element;
}

/** A figure as text; where there is none, `missing` says so. */
export function figure(tag, text, missing = "not measured") {
  return text === null ? make(tag, missing, "missing") : make(tag, text);
}

/** A name and its value for a list of them. */
export function pair(name, value) {
  return box("div", "", make("dt", name), value);
}

/** The head of a table's row. */
export function rowHead(text) {
  const head = make("th", text);
  head.scope = "row";
  return head;
}

/** A new element of a drawing. */
export function drawn(tag, attributes = {}, text = "") {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== "") made.setAttribute(name, value);
  made.textContent = text;
  return made;
}

/** The parts of a copy of a template, by their data-slot, with the copy itself as `element`. */
export function slotsOf(template) {
  const element = template.content.firstElementChild.cloneNode(true);
  const slots = [...element.querySelectorAll("[data-slot]")].map((each) => [each.dataset.slot, each]);
  return { element, ...Object.fromEntries(slots) };
}

/** Asks in a dialog whose buttons have values; the value of the one that was pressed, "" for Escape. */
export function asked(dialog) {
  if (!dialog.dataset.ready) {
    dialog.dataset.ready = "yes";
    for (const button of dialog.querySelectorAll("button[value]")) {
      button.addEventListener("click", () => dialog.close(button.value));
    }
  }
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((settle) => dialog.addEventListener("close", () => settle(dialog.returnValue), { once: true }));
}
