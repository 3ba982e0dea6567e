// Prometheus' text format as samples, and what can be read from them: sums and quantiles of histograms.

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)/;
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g;
const ESCAPES = { n: "\n", "\\": "\\", '"': '"' };

/** The samples of a text: `[{name, labels, value}]`. Lines that are none are left out. */
export function parse(text) {
  return text.split("\n").flatMap((line) => {
    const found = LINE.exec(line);
    if (!found) return [];
    const [, name, inside = "", value] = found;
    const labels = Object.fromEntries([...inside.matchAll(LABEL)].map(([, key, told]) => [key, told.replace(/\\(.)/g, (_, each) => ESCAPES[each] ?? each)]));
    return [{ name, labels, value: value === "+Inf" ? Infinity : value === "-Inf" ? -Infinity : Number(value) }];
  });
}

/** Those of that name whose labels are as said. */
export function select(samples, name, labels = {}) {
  const said = Object.entries(labels);
  return samples.filter((sample) => sample.name === name && said.every(([key, value]) => sample.labels[key] === value));
}

/** Their sum; null where there are none, which is not 0. */
export function sum(samples, name, labels = {}) {
  const found = select(samples, name, labels);
  return found.length ? found.reduce((total, { value }) => total + value, 0) : null;
}

/** A histogram, whatever its other labels: `{n, buckets: [[bound, so many up to there]]}`; `since` is taken off it. */
export function histogram(samples, name, labels = {}, since = []) {
  const counts = new Map();
  for (const [sign, from] of [[1, samples], [-1, since]]) {
    for (const { labels: { le }, value } of select(from, `${name}_bucket`, labels)) {
      const bound = le === "+Inf" ? Infinity : Number(le);
      counts.set(bound, (counts.get(bound) ?? 0) + sign * value);
    }
  }
  const buckets = [...counts].sort(([one], [other]) => one - other);
  return { n: buckets.at(-1)?.[1] ?? 0, buckets };
}

/** The nearest rank's bucket, straight between its bounds; null where not one value lies beyond that rank, or of none. */
export function quantile({ n, buckets }, share) {
  const rank = Math.ceil(share * n);
  if (!n || (share > 0.5 && rank === n)) return null;
  let [bound, below] = [0, 0];
  for (const [upto, count] of buckets) {
    if (count >= rank) return upto === Infinity ? bound : bound + ((upto - bound) * (rank - below)) / (count - below);
    [bound, below] = [upto, count];
  }
  return null;
}
