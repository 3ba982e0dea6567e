// Reads server-sent events from a response body: UTF-8 and events may be cut anywhere. Knows no event by name.

/** Turns pieces of text into events `{event, data}`. An event that is not closed by an empty line is never given out. */
export class EventParser {
  #rest = "";
  #event = "";
  #data = [];

  /** The events that this piece completes. */
  push(text) {
    // A carriage return that ends the piece stays in the rest: a line feed may follow in the next.
    const lines = (this.#rest + text).split(/\r\n|\n|\r(?!$)/);
    this.#rest = lines.pop();
    return lines.map((line) => this.#line(line)).filter(Boolean);
  }

  /** The event that the end of the stream completes: no line feed can follow a last carriage return any more. */
  end() {
    return this.#rest.endsWith("\r") ? this.push("\n") : [];
  }

  #line(line) {
    if (line === "") {
      const done = this.#data.length ? { event: this.#event || "message", data: this.#data.join("\n") } : null;
      this.#event = "";
      this.#data = [];
      return done;
    }
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon); // a comment's field is empty
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (field === "event") this.#event = value;
    if (field === "data") this.#data.push(value);
    return null;
  }
}

/** The events of a ReadableStream of bytes, as they come. */
export async function* readEvents(stream) {
  const parser = new EventParser();
  const decoder = new TextDecoder();
  const reader = stream.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return yield* parser.end();
      yield* parser.push(decoder.decode(value, { stream: true }));
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}
