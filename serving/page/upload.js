// Before the first upload to a destination: what goes there and what it costs at most, to be confirmed once each.

import { asked, make } from "./dom.js";
import * as format from "./format.js";
import { posted } from "./service.js";

const places = ({ destination }) => (destination ? destination.split(", ") : ["an unknown address"]); // a route has several

export class Uploads {
  #confirmed = new Set(); // destinations, as long as the page is open

  /** `ask` is a fetch from the service. */
  constructor(dialog, ask) {
    this.dialog = dialog;
    this.ask = ask;
    this.list = dialog.querySelector("ul");
    this.more = dialog.querySelector("#upload_more");
  }

  /**
   * Whether this may be sent to those targets. Asks about every destination that was not confirmed yet, and tells the
   * service sizes alone for it. `pictures`: width, height and bytes each; `more`: what they do not tell, or "".
   */
  async allowed(targets, text, pictures, more) {
    const leaving = targets.filter((target) => target.leaves_device && this.#unconfirmed(target));
    if (!leaving.length) return true;
    const sizes = {
      targets: leaving.map(({ name }) => name),
      text_bytes: new TextEncoder().encode(text).length,
      pictures,
    };
    const { estimates } = await (await this.ask("estimate", posted(sizes))).json();
    const going = estimates.filter((each) => each.leaves_device); // not a route of which only what is here may be asked
    if (!going.length) return true;
    const agreed = await this.#confirm(going, pictures, more);
    if (agreed) for (const each of going) for (const place of places(each)) this.#confirmed.add(place);
    return agreed;
  }

  #unconfirmed(target) {
    return places(target).some((place) => !this.#confirmed.has(place));
  }

  async #confirm(estimates, pictures, more) {
    this.list.replaceChildren(...estimates.map((each) => {
      const what = pictures.length ? "your question and picture" : "your question";
      const price = format.dollars(each.usd);
      const cost = price === null ? "The price is not known." : `At most ${price}, estimated.`;
      const item = make("li");
      item.append(make("strong", `${each.target}, at ${places(each).join(" and ")}`));
      item.append(make("span", `About ${format.bytes(each.bytes)}: ${what}.`), make("span", cost));
      return item;
    }));
    this.more.textContent = more;
    this.more.hidden = !more;
    return (await asked(this.dialog)) === "send";
  }
}
