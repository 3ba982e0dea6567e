// Figures as words, all pure. A figure that was not measured stays null; whoever shows it says so.

export const STAGES = [
  ["image_decode_ms", "Decode image"],
  ["preprocess_ms", "Preprocess"],
  ["vision_ms", "Vision"],
  ["prefill_ms", "Prefill"],
  ["thinking_ms", "Thinking"],
  ["decode_ms", "Decode text"],
];

/** A number as an English reader has it. */
export const number = (value, digits) => value.toLocaleString("en", { maximumFractionDigits: digits });
const known = (value) => typeof value === "number" && Number.isFinite(value);
export const plural = (count, word) => `${number(count, 0)} ${word}${count === 1 ? "" : "s"}`;

export function milliseconds(value) {
  if (!known(value)) return null;
  if (value >= 999.5) return `${(value / 1000).toFixed(2)} s`;
  return `${number(value, value < 9.995 ? 2 : value < 99.95 ? 1 : 0)} ms`;
}

export function rate(tokensPerSecond) {
  return known(tokensPerSecond) ? number(tokensPerSecond, tokensPerSecond < 100 ? 1 : 0) : null;
}

/** Of a route: each target that was tried, and what came of it. */
export function attempts(list) {
  return (list ?? []).map(({ target, outcome, error_type }) => `${target} ${error_type ?? outcome}`).join(", ");
}

/** Decimal units: 1 MB is 1,000,000 bytes. */
export function bytes(value) {
  if (!known(value)) return null;
  if (value < 1000) return plural(value, "byte");
  const units = ["kB", "MB", "GB"];
  let scaled = value / 1000;
  for (; scaled >= 999.5 && units.length > 1; scaled /= 1000) units.shift();
  return `${number(scaled, scaled < 99.95 ? 1 : 0)} ${units[0]}`;
}

export function dollars(value) {
  if (!known(value)) return null;
  if (value === 0) return "$0";
  return `$${value.toLocaleString("en", value < 0.995 ? { maximumSignificantDigits: 3 } : { minimumFractionDigits: 2, maximumFractionDigits: 2 })}`;
}

/** "3.2 J, beyond 11 J of idling"; null where nothing measured it. */
export function joules(energy) {
  if (!known(energy?.joules)) return null;
  const [own, idle] = [energy.joules, energy.idle_joules].map((value) => value.toLocaleString("en", { maximumSignificantDigits: 2 }));
  return `${own} J, beyond ${idle} J of idling`;
}

/** All that was shown: the frames of a video as one, anything else one by one. */
export function imageReports(images) {
  const frames = images.filter((image) => known(image.timestamp_s));
  const said = images.filter((image) => !known(image.timestamp_s)).map(imageReport);
  if (frames.length) said.push(`${plural(frames.length, "frame")} of ${imageReport(frames[0])} each`);
  return said.join("; ");
}

/** "128 × 96 used as 64 × 64, 1 tile, 16 tokens"; what a hosted model does not tell is said to be unreported. */
export function imageReport(image) {
  const used = known(image.used_width) ? ` used as ${image.used_width} × ${image.used_height}` : "";
  const tiles = known(image.tiles) ? `, ${plural(image.tiles, "tile")}` : "";
  const tokens = known(image.tokens) ? `, ${plural(image.tokens, "token")}` : "";
  const page = known(image.page) ? `page ${image.page} of ${image.pages}: ` : "";
  return `${page}${image.width} × ${image.height}${used + tiles + tokens || ", what was used of it is not reported"}`;
}

/** The same in a word or two. */
export function egressBadge({ left_device, bytes_sent }) {
  if (left_device) return `↗ ${known(bytes_sent) ? bytes(bytes_sent) : "Unknown size"} left`;
  return "⌂ Stayed here";
}

export function egress({ left_device, bytes_sent, destination, withheld: kept }) {
  if (!left_device && bytes_sent === 0) return "nothing; the input stayed on this device";
  const sent = known(bytes_sent) ? bytes(bytes_sent) : "an unmeasured number of bytes";
  const body = `${sent} of request body${destination ? ` to ${destination}` : ""}`;
  const stayed = kept && withheld(kept);
  const place = left_device ? `${body}; the input left this device` : `${body}, on this device; the input did not leave it`;
  return stayed ? `${place}; ${stayed} stayed here` : place;
}

/** What of the pictures does not go along; null where all of it does. */
export function withheld({ pixels, metadata_bytes: metadata }) {
  const parts = [];
  if (pixels > 0) parts.push(plural(pixels, "pixel"));
  if (metadata > 0) parts.push(`${bytes(metadata)} of metadata`);
  return parts.length ? parts.join(" and ") : null;
}

export function tokens(usage) {
  if (!known(usage?.prompt_tokens)) return null;
  const parts = [];
  if (known(usage.image_tokens)) parts.push(`${number(usage.image_tokens, 0)} of the picture`);
  if (known(usage.cached_tokens)) parts.push(`${number(usage.cached_tokens, 0)} cached`);
  if (known(usage.cache_write_tokens)) parts.push(`${number(usage.cache_write_tokens, 0)} written to a cache`);
  const thought = usage.thinking_tokens ? ` (${number(usage.thinking_tokens, 0)} of thinking)` : "";
  const answer = known(usage.completion_tokens) ? `, ${number(usage.completion_tokens, 0)} in the answer${thought}` : "";
  return `${number(usage.prompt_tokens, 0)} in the prompt${parts.length ? ` (${parts.join(", ")})` : ""}${answer}`;
}

/** The measured stages with their share of their sum, 0 to 1. */
export function stageShares(timings) {
  const measured = STAGES.filter(([key]) => known(timings[key])).map(([key]) => [key, timings[key]]);
  const sum = measured.reduce((total, [, value]) => total + value, 0);
  return measured.map(([key, value]) => [key, sum > 0 ? value / sum : 0]);
}

/** "21 Nov 2026, 22:40", in the reader's own zone. */
export function moment(text) {
  return new Date(text).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
}

export function percent(share, digits = 0) {
  return known(share) ? `${(share * 100).toFixed(digits)} %` : null;
}
