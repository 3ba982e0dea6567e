// The one way to the service: fetch with the key that was given, and errors in the service's own words.

/** An error of the service as one line. */
export function errorText(error) {
  const message = error?.message || "The service gave no reason.";
  return error?.request_id ? `${message} (request ${error.request_id})` : message;
}

/** `key()` is the API key or "", `locked()` is called when one is needed. Gives `ask(url, options)`, which is fetch. */
export function service({ key, locked }) {
  return async function ask(url, options = {}) {
    const headers = { ...options.headers, ...(key() && { Authorization: `Bearer ${key()}` }) };
    let response;
    try {
      response = await fetch(url, { ...options, headers });
    } catch (error) {
      throw error.name === "AbortError" ? error : new Error("The service cannot be reached.");
    }
    if (response.ok) return response;
    if (response.status === 401) locked();
    const body = await response.json().catch(() => ({}));
    const text = body.error ? errorText(body.error) : `The service answered with status ${response.status}.`;
    throw Object.assign(new Error(text), { status: response.status });
  };
}

/** The options of a POST of that object. */
export function posted(body) {
  return { method: "POST", body: JSON.stringify(body), headers: { "content-type": "application/json" } };
}
