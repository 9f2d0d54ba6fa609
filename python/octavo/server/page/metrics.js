// Metrics: Prometheus' text taken apart, and what changed between two scrapes of it.

const LINE = /^([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)/;
const LE = /(?:^|,)le="([^"]+)"/;

/** One scrape: sums by name over all labels, and histograms' cumulative buckets by name. */
export class Scrape {
  constructor(text, seconds) {
    this.seconds = seconds;
    this.values = new Map();
    this.buckets = new Map();
    for (const line of text.split("\n")) {
      const match = line.match(LINE);
      if (!match) continue;
      const [, name, labels, number] = match;
      const value = Number(number);
      const bound = name.endsWith("_bucket") ? labels?.match(LE)?.[1] : undefined;
      if (bound === undefined) {
        this.values.set(name, (this.values.get(name) ?? 0) + value);
        continue;
      }
      const base = name.slice(0, -"_bucket".length);
      if (!this.buckets.has(base)) this.buckets.set(base, new Map());
      const ofName = this.buckets.get(base);
      const le = bound === "+Inf" ? Infinity : Number(bound);
      ofName.set(le, (ofName.get(le) ?? 0) + value);
    }
  }

  /** A gauge or counter; 0 where there is none. */
  value(name) {
    return this.values.get(name) ?? 0;
  }
}

/** Growth of a counter per second between two scrapes. */
export function rate(before, now, name) {
  const seconds = now.seconds - before.seconds;
  // A server that was started anew counts from zero.
  return seconds > 0 ? Math.max(0, now.value(name) - before.value(name)) / seconds : 0;
}

/** Part of one counter's growth in another's; null where nothing grew. */
export function share(before, now, part, whole) {
  const total = now.value(whole) - before.value(whole);
  return total > 0 ? (now.value(part) - before.value(part)) / total : null;
}

/**
 * A quantile of what a histogram observed between two scrapes; null where it observed nothing.
 * Linear within a bucket, as Prometheus' histogram_quantile.
 */
export function quantile(before, now, name, q) {
  const buckets = now.buckets.get(name);
  if (!buckets) return null;
  const old = before.buckets.get(name);
  const grown = [...buckets].sort(([a], [b]) => a - b).map(([le, n]) => [le, n - (old?.get(le) ?? 0)]);
  const total = grown.at(-1)[1];
  if (total <= 0) return null;
  const rank = q * total;
  let [lower, below] = [0, 0];
  for (const [le, count] of grown) {
    if (count >= rank && count > below) {
      if (le === Infinity) return lower;
      return lower + ((le - lower) * (rank - below)) / (count - below);
    }
    [lower, below] = [le === Infinity ? lower : le, count];
  }
  return lower;
}
