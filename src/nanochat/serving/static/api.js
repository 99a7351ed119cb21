// The server's own interface: which models there are, and their answers as they come.

import { store } from "./storage.js";

const KEY = "nanochat.key";

/** Why there is no answer.
 *
 * kind: "unreachable", "key" (it is missing or wrong), "busy" (`waitS` says when to come again), "context"
 * (more than the model reads), "refused", "failed", or "broken" (the answer ended in the middle).
 */
export class AnswerError extends Error {
  constructor(kind, message, waitS = null) {
    super(message);
    this.kind = kind;
    this.waitS = waitS;
  }
}

/** The key goes with the tab: it is in no storage that outlives it. */
export const keepKey = (key) => store.session.setItem(KEY, key);
export const hasKey = () => store.session.getItem(KEY) !== null;

export async function fetchModels() {
  const response = await call("v1/models");
  return (await response.json()).data.map((card) => ({
    name: card.id,
    context: card.context_length,
    chat: card.nanochat.chat,
    defaults: card.nanochat.defaults,
  }));
}

/** The answer of a model, event by event: {parts}, {finish}, {usage}. Throws AnswerError, or AbortError. */
export async function* streamAnswer(model, messages, settings, signal) {
  const asked = { model: model.name, ...settings, stream: true, stream_options: { include_usage: true } };
  if (model.chat) asked.messages = messages;
  else asked.prompt = messages.at(-1).content;
  const response = await call(model.chat ? "v1/chat/completions" : "v1/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(asked),
    signal,
  });
  for await (const data of serverSentEvents(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new AnswerError("failed", sentence(chunk.error.message));
    if (chunk.usage) yield { usage: chunk.usage };
    const choice = chunk.choices[0];
    if (!choice) continue;
    if (choice.finish_reason) yield { finish: choice.finish_reason };
    // The opening chunk is no token; every other one is, be it without text.
    else if (choice.delta?.role !== "assistant") yield { parts: partsOf(choice) };
  }
  throw new AnswerError("broken", "The connection broke off in the middle of the answer.");
}

function partsOf(choice) {
  const text = choice.delta ? choice.delta.content : choice.text;
  return [...(text ? [{ type: "text", text }] : []), ...(choice.delta?.nanochat?.parts ?? [])];
}

async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (hasKey()) headers.Authorization = `Bearer ${store.session.getItem(KEY)}`;
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new AnswerError("unreachable", "The server cannot be reached. Is it still running?");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  let told = {};
  try {
    told = (await response.json()).error ?? {};
  } catch {
    // What stands before the server (a proxy, say) answers in a language of its own: the status must do.
  }
  const message = sentence(told.message ?? `the server answered ${response.status} ${response.statusText}`);
  if (response.status === 401) return new AnswerError("key", message);
  if (response.status === 429 || response.status === 503) {
    const waitS = Number.parseInt(response.headers.get("Retry-After"), 10);
    return new AnswerError("busy", message, Number.isNaN(waitS) ? 5 : waitS);
  }
  if (told.code === "context_length_exceeded") return new AnswerError("context", message);
  return new AnswerError(response.status < 500 ? "refused" : "failed", message);
}

/** The data of each event of a stream (https://html.spec.whatwg.org/multipage/server-sent-events.html). */
async function* serverSentEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const events = (held + value).split("\n\n");
      held = events.pop();
      for (const event of events) {
        const lines = event.split("\n").filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new AnswerError("broken", "The connection broke off in the middle of the answer.");
  } finally {
    // Also where nobody reads on: the server stops writing.
    reader.cancel().catch(() => {});
  }
}

function sentence(text) {
  const ended = /[.!?…]$/.test(text) ? text : `${text}.`;
  return ended[0].toUpperCase() + ended.slice(1);
}
