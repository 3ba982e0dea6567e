// Views by what stands behind "#": "#/history", "#/compare/ID", "#/verdict?cost=1". Back, forward and reload work.

const HOME = "compare";

export class Router {
  /** `views`: by name `{section, link, show(rest, query), hide()}`; `rest` is what follows the name, `query` its terms. */
  constructor(views) {
    this.views = views;
    addEventListener("hashchange", () => this.#follow(true));
  }

  start() {
    this.#follow(false);
  }

  /** The address of what is shown already: nothing is shown anew. */
  replace(path) {
    history.replaceState(null, "", `#/${path}`);
  }

  go(path) {
    location.hash = `#/${path}`;
  }

  /** A view came by a link: the focus goes to its heading, so that it is read out and Tab goes on from there. */
  #follow(moved) {
    if (location.hash && !location.hash.startsWith("#/")) return;
    const [path, query = ""] = location.hash.slice(2).split("?");
    const [asked, ...rest] = path.split("/").map(decoded);
    const name = Object.hasOwn(this.views, asked) ? asked : HOME;
    if (this.current !== name) this.views[this.current]?.hide?.();
    const place = [name, ...rest].join("/");
    const same = this.place === place;
    Object.assign(this, { current: name, place });
    for (const [each, { section, link }] of Object.entries(this.views)) {
      section.hidden = each !== name;
      if (each === name) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    const { section, link, show } = this.views[name];
    document.title = `${link.textContent} · nearfar`;
    show?.(rest.join("/"), new URLSearchParams(query));
    if (!moved || same) return;
    scrollTo(0, 0);
    headingOf(section).focus({ preventScroll: true });
  }
}

/** The heading that a view shows now. */
export function headingOf(section) {
  return [...section.querySelectorAll("h1")].find((heading) => heading.checkVisibility());
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // a broken escape is no name of anything
  }
}
