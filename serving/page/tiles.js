// What a model saw of a picture: the tiles that it was cut into, drawn over it, and the global tile beside them.

import { box, make } from "./dom.js";

const MAX_PX = 512; // of the drawing: more than a card shows
const COARSE_PX = 160; // up to here a tile's own pixels can be seen, and are shown as they are

/**
 * The grid of a report: `{rows, cols, tile_px}`, 0 x 0 for the global tile alone; null where it does not tell.
 * The used size is that of the grid's own pixels, its tiles are square, and one of `tiles` is the global one.
 */
export function gridOf({ used_width: width, used_height: height, tiles }) {
  if (!(width > 0 && height > 0 && tiles > 0)) return null;
  if (tiles === 1) return { rows: 0, cols: 0, tile_px: width };
  const tile_px = Math.sqrt((width * height) / (tiles - 1));
  const [rows, cols] = [height / tile_px, width / tile_px];
  return [rows, cols, tile_px].every(Number.isInteger) ? { rows, cols, tile_px } : null;
}

/** Whether that picture is what the report is about: a frame, a later page or a crop would be drawn wrongly. */
export function fits(report, { width, height }, reduced) {
  if ("timestamp_s" in report || (report.page ?? 1) > 1 || report.reduced) return false;
  if (!reduced) return report.width === width && report.height === height;
  return Math.abs(report.width / report.height / (width / height) - 1) < 1.5 / Math.min(width, height);
}

/** "2 × 2 tiles of 64 px, and the global tile" */
export function gridText({ rows, cols, tile_px }) {
  const size = `${tile_px} × ${tile_px} px`;
  return rows ? `${cols} × ${rows} tiles of ${size}, row by row, and last the global tile: all of it in ${size}`
    : `The global tile alone: all of it in ${size}`;
}

/** The picture behind that address, as a promise; null where it cannot be read. Of one that is kept, `reduced`. */
export async function pictureAt(url, { reduced = false } = {}) {
  const image = new Image();
  image.src = url;
  try {
    await image.decode();
  } catch {
    return null;
  }
  return { image, width: image.naturalWidth, height: image.naturalHeight, reduced };
}

/** A figure of both; null where there is nothing to draw. `picture` is what pictureAt found. */
export function tileFigure(report, picture) {
  const grid = gridOf(report);
  if (!grid || !picture || !fits(report, picture, picture.reduced)) return null;
  const { image } = picture;
  const { rows, cols, tile_px } = grid;
  const shown = box("div", "seen");
  if (rows) {
    const cells = Array.from({ length: rows * cols }, (_, place) => box("span", "", make("b", String(place + 1))));
    const over = box("div", "tile_grid", ...cells);
    over.style.gridTemplateColumns = `repeat(${cols}, 1fr)`;
    const whole = box("div", "tiled", canvas(image, cols * tile_px, rows * tile_px, tile_px), over);
    whole.style.aspectRatio = `${picture.width} / ${picture.height}`;
    shown.append(whole);
  }
  shown.append(box("div", "tiled global", canvas(image, tile_px, tile_px, tile_px), make("b", "global")));
  const text = gridText(grid);
  shown.setAttribute("role", "img");
  shown.setAttribute("aria-label", text);
  return box("figure", "tiles", make("figcaption", "What the model saw"), shown,
    make("p", picture.reduced ? `${text}. Drawn on the stored thumbnail.` : `${text}.`, "hint"));
}

/** The picture scaled to the model's own pixels, as far as a card can show them. */
function canvas(image, width, height, tile_px) {
  const scale = Math.min(1, MAX_PX / Math.max(width, height));
  const drawing = make("canvas", "", tile_px <= COARSE_PX ? "coarse" : "");
  Object.assign(drawing, { width: Math.round(width * scale), height: Math.round(height * scale) });
  const context = drawing.getContext("2d");
  Object.assign(context, { imageSmoothingQuality: "high", fillStyle: "white" }); // what is transparent lies over white
  context.fillRect(0, 0, drawing.width, drawing.height);
  context.drawImage(image, 0, 0, drawing.width, drawing.height);
  return drawing;
}
