// The picture, video or document to ask about: chosen as a file, dropped, pasted or taken from the samples; checked and previewed.

import { bytes } from "./format.js";
import { pictureAt } from "./tiles.js";

const FIELDS = {
  image: ["image/jpeg", "image/png", "image/webp", "image/gif"],
  video: ["video/mp4", "video/webm", "video/quicktime"],
  document: ["application/pdf", "image/tiff"],
};
const UNSAID = {
  file: "The frames or pages of your file come on top: how many bytes and dollars is not known here.",
  converted: "A WebP or GIF leaves as PNG, with more bytes: how many is not known here.",
};
const MAX_BYTES = { image: 20_000_000, video: 48_000_000, document: 48_000_000 };

/** The field of a request that takes this file; undefined where none does. */
export function fieldOf(file) {
  return Object.keys(FIELDS).find((field) => FIELDS[field].includes(file.type));
}

/** Why this file cannot be sent; null where it can. */
export function refusal(file) {
  const name = file.name || "This file";
  const field = fieldOf(file);
  if (!field) return `${name} is ${file.type || "of an unknown type"}. Choose a JPEG, PNG, WebP or GIF picture.`;
  const most = MAX_BYTES[field];
  if (file.size > most) return `${name} has ${bytes(file.size)}. ${field === "image" ? "A picture" : `A ${field}`} may have at most ${bytes(most)}.`;
  return file.size ? null : `${name} is empty.`;
}

/** The drop zone. `changed(file)` follows every new picture of the user's own, `refused(text)` every one not taken. */
export class Picture {
  file = null;

  constructor({ drop, input, preview, title }, { changed, refused }) {
    Object.assign(this, { drop, input, preview, title, changed, refused });
    input.addEventListener("change", () => this.#take(input.files));
    for (const type of ["dragenter", "dragover", "dragleave", "drop"]) {
      document.addEventListener(type, (event) => this.#drag(event)); // a picture that misses the zone must not leave the page
    }
    document.addEventListener("paste", (event) => {
      const files = event.clipboardData?.files;
      if (!files?.length) return; // text goes into the field that has the focus
      event.preventDefault();
      this.#take(files);
    });
    preview.addEventListener("error", () => {
      this.refused(`${this.file?.name ?? "This file"} could not be read as a picture.`);
      this.#show(null);
    });
  }

  /** Width, height and bytes of what a model would be shown; of a video or document, whose pictures are not known, none. */
  get sizes() {
    const { preview, file } = this;
    if (fieldOf(file) !== "image") return [];
    return [{ width: preview.naturalWidth, height: preview.naturalHeight, bytes: file.size }];
  }

  /** A promise of what tiles can be drawn on; of null for a video or document. */
  async shown() {
    return fieldOf(this.file) === "image" ? pictureAt(this.preview.src) : null;
  }

  /** What the sizes do not tell of what leaves for a hosted model; empty where they tell all. */
  get unsaid() {
    if (fieldOf(this.file) !== "image") return UNSAID.file;
    return ["image/webp", "image/gif"].includes(this.file.type) ? UNSAID.converted : "";
  }

  /** Shows that file without a check, as for a sample. */
  set(file) {
    this.input.value = "";
    this.#show(file);
  }

  #drag(event) {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    const inside = this.drop.contains(event.target);
    this.drop.classList.toggle("over", inside && (event.type === "dragenter" || event.type === "dragover"));
    if (event.type === "drop") this.#take(event.dataTransfer.files);
  }

  #take(files) {
    if (!files.length) return; // the file dialog was cancelled: the picture stays
    const reason = files.length > 1 ? "Choose one picture at a time." : refusal(files[0]);
    const file = files[0];
    this.input.value = ""; // choosing the same file again is then a change
    if (reason) return this.refused(reason);
    this.#show(file);
    this.changed(file);
  }

  #show(file) {
    URL.revokeObjectURL(this.preview.src);
    this.file = file;
    const shown = file && fieldOf(file) === "image";
    this.preview.hidden = !shown;
    if (shown) this.preview.src = URL.createObjectURL(file);
    else this.preview.removeAttribute("src");
    this.preview.alt = file ? `Chosen picture: ${file.name || "pasted"}` : "";
    this.title.textContent = !file ? "Choose a picture" : shown ? "Choose another" : `${file.name}: choose another`;
    this.drop.classList.toggle("filled", Boolean(shown));
  }
}
