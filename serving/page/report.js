// The report of what a view shows: as a page of its own beside this one, or as a file.

const NAME = "nearfar-report.html";

/** What a button for the report does. `terms()`: records and weights, as the service takes them. `say(text)`: in the view. */
export function offerReport(button, { ask, key, terms, say }) {
  const label = button.textContent;
  let busy = false;
  button.addEventListener("click", async () => {
    if (busy) return;
    busy = true;
    button.textContent = "Making the report…";
    try {
      const address = `report?${terms()}`;
      const page = await (await ask(address)).blob();
      say("");
      if (key() || !open(address)) save(page);
    } catch (error) {
      say(error.message);
    } finally {
      busy = false;
      button.textContent = label;
    }
  });
}

/**
 * As a file, for a service with a key, which no address can carry, and where a new tab is blocked. A tab with the blob itself
 * would be under this page's content policy, which takes the report's styles away.
 */
function save(page) {
  const link = document.createElement("a");
  const href = URL.createObjectURL(page);
  Object.assign(link, { href, download: NAME });
  link.click();
  setTimeout(() => URL.revokeObjectURL(href), 60_000);
}
