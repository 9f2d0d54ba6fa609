// The live view: charts of throughput, latency, load and memory, while it is looked at.

import { Chart } from "./chart.js";
import { byId } from "./dom.js";
import { Scrape, quantile, rate, share } from "./metrics.js";

const INTERVAL_MS = 1000;
// Percentiles of one second would be those of a handful of requests.
const WINDOW_S = 30;

const count = (value) => (value >= 100 ? Math.round(value).toLocaleString("en") : String(Number(value.toFixed(1))));
const seconds = (value) => {
  const ms = value * 1000;
  if (ms >= 1000) return `${value.toFixed(2)} s`;
  return `${ms >= 10 ? ms.toFixed(0) : Number(ms.toFixed(2))} ms`;
};
const percent = (value) => `${(100 * value).toFixed(value > 0 && value < 0.1 ? 1 : 0)} %`;
const QUANTILES = [0.5, 0.9, 0.99];
const NAMES = ["p50", "p90", "p99"];

/** Six charts. `onError(error)`: a scrape failed. */
export class Live {
  constructor(api, onError) {
    this.api = api;
    this.onError = onError;
    this.scrapes = [];
    this.timer = null;
    this.charts = {
      tokens: new Chart("Tokens a second", ["generated", "prompt"], { format: count }),
      requests: new Chart("Requests", ["running", "waiting"], { format: count }),
      ttft: new Chart("Time to first token", NAMES, { format: seconds }),
      itl: new Chart("Between tokens", NAMES, { format: seconds }),
      kv: new Chart("KV cache in use", ["used"], { format: percent, top: 1 }),
      hits: new Chart("Prompt tokens found cached", ["hits"], { format: percent, top: 1 }),
    };
    byId("charts").append(...Object.values(this.charts).map((chart) => chart.element));
  }

  /** Begin or end to scrape. */
  show(isShown) {
    clearInterval(this.timer);
    this.timer = null;
    if (!isShown) return;
    const tick = () => document.visibilityState === "visible" && this.scrape();
    this.timer = setInterval(tick, INTERVAL_MS);
    tick();
  }

  async scrape() {
    if (this.isBusy) return;
    this.isBusy = true;
    try {
      this.take(new Scrape(await this.api.metrics(), performance.now() / 1000));
      this.onError(null);
    } catch (error) {
      this.onError(error);
    } finally {
      this.isBusy = false;
    }
  }

  take(now) {
    const last = this.scrapes.at(-1);
    this.scrapes.push(now);
    while (now.seconds - this.scrapes[0].seconds > WINDOW_S) this.scrapes.shift();
    if (!last) return;
    const [first] = this.scrapes;
    const { tokens, requests, ttft, itl, kv, hits } = this.charts;
    const quantiles = (name) => QUANTILES.map((q) => quantile(first, now, name, q));
    tokens.push([
      rate(last, now, "vllm:generation_tokens_total"),
      rate(last, now, "vllm:prompt_tokens_total"),
    ]);
    requests.push([now.value("vllm:num_requests_running"), now.value("vllm:num_requests_waiting")]);
    ttft.push(quantiles("vllm:time_to_first_token_seconds"));
    itl.push(quantiles("vllm:inter_token_latency_seconds"));
    kv.push([now.value("vllm:kv_cache_usage_perc")]);
    hits.push([share(first, now, "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total")]);
  }
}
