// The server's interface: one place that knows paths, the key, and the form of errors.

import { events } from "./sse.js";

const KEY = "octavo.key";

/** An answer that is not the one asked for; `status` is HTTP's. */
export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** Requests to this server. `askKey(message)` is called where a key is missing or wrong. */
export class Api {
  constructor(askKey) {
    this.askKey = askKey;
    this.key = sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY) ?? "";
  }

  /** Use a key from now on; `keeps`: in later visits too. */
  setKey(key, keeps) {
    this.key = key;
    localStorage.removeItem(KEY);
    (keeps ? localStorage : sessionStorage).setItem(KEY, key);
  }

  /** A response of status 200. A missing key is asked for, and the request made again. */
  async request(path, { body, signal } = {}) {
    for (;;) {
      const headers = {};
      if (this.key) headers.authorization = `Bearer ${this.key}`;
      if (body !== undefined) headers["content-type"] = "application/json";
      // Relative to the page: a proxy may have put both under a prefix.
      const response = await fetch(path, {
        method: body === undefined ? "GET" : "POST",
        headers,
        body: body === undefined ? undefined : JSON.stringify(body),
        signal,
        cache: "no-store",
      });
      if (response.ok) return response;
      const error = await failure(response);
      if (response.status !== 401) throw error;
      await this.askKey(this.key ? error.message : "");
    }
  }

  /** The models: id, task, max_model_len. */
  async models() {
    return (await (await this.request("v1/models")).json()).data;
  }

  /** Prometheus' text. */
  async metrics() {
    return (await this.request("metrics")).text();
  }

  /** JSON to JSON. */
  async post(path, body) {
    return (await this.request(path, { body })).json();
  }

  /** Chunks of a chat's answer. An error in the middle of the stream is thrown. */
  async *chat(body, signal) {
    const response = await this.request("v1/chat/completions", { body, signal });
    for await (const data of events(response)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message, response.status);
      yield chunk;
    }
  }
}

async function failure(response) {
  try {
    return new ApiError((await response.json()).error.message, response.status);
  } catch {
    return new ApiError(`${response.status} ${response.statusText}`, response.status);
  }
}
