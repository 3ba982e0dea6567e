// The leaderboard of all blind votes, beside what each target's answers cost, took and sent.

import { make, rowHead } from "./dom.js";
import { bytes, dollars, milliseconds, plural } from "./format.js";

export class Leaderboard {
  /** `parts`: table, rows, text, message. */
  constructor(parts, { ask }) {
    Object.assign(this, { parts, ask });
  }

  async load() {
    try {
      const { targets, votes, comparisons, basis } = await (await this.ask("leaderboard")).json();
      this.parts.rows.replaceChildren(...targets.map(row));
      this.parts.table.hidden = !targets.length;
      this.parts.text.textContent = targets.length
        ? `${plural(votes, "vote")} on ${plural(comparisons, "comparison")}: ${basis}.`
        : "No votes yet: compare blind, then vote.";
      this.parts.message.textContent = "";
    } catch (error) {
      this.parts.message.textContent = error.message;
    }
  }
}

function row({ target, share, note, comparisons, wins, losses, ties, both_bad, medians, left_device }) {
  const line = make("tr");
  line.append(rowHead(target), shareCell(share, note, comparisons));
  line.append(make("td", `${wins} won, ${losses} lost, ${ties} tied, ${both_bad} both bad`));
  line.append(median(medians.usd, dollars), median(medians.total_ms, milliseconds));
  const sent = median(medians.bytes_sent, bytes);
  if (left_device) sent.append(make("small", "left the device", "left"));
  line.append(sent);
  return line;
}

/** The share as words, and below as a mark within its interval on a scale from 0 to 1. */
function shareCell(share, note, comparisons) {
  const cell = make("td", share ? `${(share.value * 100).toFixed(0)} %` : "");
  if (!share) {
    cell.append(make("small", note ?? ""));
    return cell;
  }
  cell.append(make("small", `${(share.low * 100).toFixed(0)} to ${(share.high * 100).toFixed(0)} %, n ${comparisons}`));
  const scale = make("span", "", "scale");
  const [interval, mark] = [make("span", "", "interval"), make("span", "", "mark")];
  Object.assign(interval.style, { left: `${share.low * 100}%`, width: `${(share.high - share.low) * 100}%` });
  mark.style.left = `${share.value * 100}%`;
  scale.setAttribute("aria-hidden", "true");
  scale.append(interval, mark);
  cell.append(scale);
  return cell;
}

function median({ value, n }, show) {
  const cell = make("td", value === null ? "not known" : show(value), value === null ? "missing" : "");
  if (value !== null) cell.append(make("small", `n ${n}`));
  return cell;
}
