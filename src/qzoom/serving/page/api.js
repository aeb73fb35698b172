// The server's HTTP interface: models, streamed and plain answers, and the gate and regions alone.

/** What the server or the connection said; `message` is shown as it is. */
export class ServerError extends Error {
  constructor(message, status, wait) {
    super(message);
    this.status = status;
    this.wait = wait;
  }
}

let key = "";

/** The key is held in this variable and nowhere else. */
export function setKey(value) {
  key = value.trim();
}

export const hasKey = () => key !== "";

/** The models that the server lists, each as it describes it. */
export async function models() {
  const answer = await (await call("v1/models")).json();
  return Array.isArray(answer.data) ? answer.data : [];
}

export async function version() {
  const answer = await (await call("version")).json();
  return typeof answer.version === "string" ? answer.version : "";
}

/** One answer at once. */
export async function complete(body, signal) {
  return (await call("v1/chat/completions", body, signal)).json();
}

/** Gate, regions and heat map, without an answer. */
export async function perceive(body, signal) {
  return (await call("v1/perceive", body, signal)).json();
}

/** The pages of a PDF (or a picture that the browser cannot show) as JPEGs. */
export async function pages(body, signal) {
  return (await call("v1/pages", body, signal)).json();
}

/** The chunks of a streamed answer. */
export async function* stream(body, signal) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await call("v1/chat/completions", asked, signal);
  let rest = "";
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      throw lost(error);
    }
    rest += part.done ? "\n" : part.value;
    const lines = rest.split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(chunk.error.message, response.status);
      yield chunk;
    }
    if (part.done) throw new ServerError("The answer broke off: the server closed the connection.", 0);
  }
}

async function call(path, body, signal) {
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body ? "POST" : "GET",
      headers,
      body: body && JSON.stringify(body),
      signal,
    });
  } catch (error) {
    throw lost(error);
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

function lost(error) {
  if (error.name === "AbortError" || error instanceof ServerError) return error;
  return new ServerError("The server does not answer. Is it still running?", 0);
}

async function refusal(response) {
  let message = "";
  try {
    message = (await response.json()).error.message;
  } catch {
    message = `The server answered with status ${response.status} and no explanation.`;
  }
  return new ServerError(message, response.status, Number(response.headers.get("Retry-After")) || 0);
}
