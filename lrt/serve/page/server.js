// Talking to the server.
import { $ } from "./dom.js";

/** A refusal, with the parameter that it is about. */
export class Refusal extends Error {
  constructor(message, param) { super(message); this.param = param; }
}

/** The answer to a GET, or with a body to a POST; Refusal where the server does not give one. */
export const ask = async (path, body, signal) => {
  const headers = { "Content-Type": "application/json" };
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  const answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  if (answer.ok) return answer;
  if (answer.status === 401) $("key-field").hidden = false;
  const error = (await answer.json().catch(() => null))?.error;
  throw new Refusal(error?.message ?? `the server answered ${answer.status}`, error?.param);
};

/** The server-sent events of an answer, as they come. */
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let held = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) yield JSON.parse(part.slice(6));
  }
}
