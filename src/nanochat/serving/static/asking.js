// One question to one model: what it is sent, how its answer grows, and what is done where there is none.

import { AnswerError, streamAnswer } from "./api.js";
import { requestFields } from "./settings.js";

const MOST_TRIES = 5;
const LONGEST_WAIT_S = 60;
// As in the terminal: so much of the context is left for an answer, at least.
const ANSWER_SHARE = 0.25;
// Until an answer has told how many tokens its conversation had.
const TOKENS_PER_CHARACTER = 0.3;

/** An answer: whose it is, what it has said, and how it went. `state` is running, waiting (for a server that
 * is busy), done, stopped or failed. */
export const newAnswer = ({ name, context }) => ({ model: name, context, state: "running", parts: [], tokens: 0 });

export const isOpen = (answer) => answer.state === "running" || answer.state === "waiting";

/** What a model said to the user, without its calculator. */
export const textOf = (answer) =>
  answer.parts.filter((part) => part.type === "text").map((part) => part.text).join("");

/** The messages that lead to a turn's answer. A turn without an answer is left out: roles alternate. */
export function messagesBefore(chat, turn, column) {
  const answered = chat.turns.slice(0, turn).filter((each) => textOf(each.answers[column]).trim());
  return answered.flatMap((each) => [
    { role: "user", content: each.question },
    { role: "assistant", content: textOf(each.answers[column]) },
  ]);
}

/** Fill in `answer`. changed() is called after every change; askForKey() resolves to whether one was given;
 * `job.hurry` ends a wait for a busy server. Does not throw but for mistakes of this page.
 */
export async function ask(job, { changed, askForKey }) {
  const { answer, model, messages, settings, signal } = job;
  answer.omitted = model.chat ? omittedMessages(job) : 0;
  let tries = 0;
  for (;;) {
    try {
      await readAnswer();
      break;
    } catch (error) {
      if (error.name === "AbortError") {
        answer.state = "stopped";
        break;
      }
      if (!(error instanceof AnswerError)) {
        fail(answer, "failed", "This page made a mistake; its console tells more.");
        changed();
        throw error;
      }
      const nothingSaid = answer.parts.length === 0;
      if (error.kind === "context" && answer.omitted + 2 < messages.length) {
        answer.omitted += 2;
      } else if (error.kind === "busy" && nothingSaid && tries < MOST_TRIES) {
        tries += 1;
        await wait(job, error, changed);
        if (signal.aborted) {
          answer.state = "stopped";
          break;
        }
      } else if (!(error.kind === "key" && nothingSaid && (await askForKey()))) {
        fail(answer, error.kind, error.message);
        break;
      }
    }
  }
  changed();

  async function readAnswer() {
    const system = settings.system && model.chat ? [{ role: "system", content: settings.system }] : [];
    const asked = [...system, ...messages.slice(answer.omitted)];
    const started = performance.now();
    let first = null;
    for await (const event of streamAnswer(model, asked, requestFields(settings), signal)) {
      if (event.parts) {
        const now = performance.now();
        first ??= now;
        answer.tokens += 1;
        answer.firstMs = first - started;
        answer.seconds = (now - first) / 1000;
        for (const part of event.parts) append(answer.parts, part);
      }
      if (event.finish) answer.finish = event.finish;
      if (event.usage) {
        answer.promptTokens = event.usage.prompt_tokens;
        answer.tokens = event.usage.completion_tokens;
        answer.characters = lengthOf(asked) + textOf(answer).length;
      }
      changed();
    }
    answer.state = "done";
  }
}

/** Tokens a second, from the first to the last; null where there are too few to tell. */
export const rateOf = (answer) => (answer.tokens > 1 && answer.seconds > 0 ? (answer.tokens - 1) / answer.seconds : null);

/** Tokens of its context that a conversation took, the answer included; null where it is not known. */
export const contextUsed = (answer) => (answer?.promptTokens ? answer.promptTokens + answer.tokens : null);

function append(parts, part) {
  if (parts.at(-1)?.type === part.type) parts.at(-1).text += part.text;
  else parts.push({ type: part.type, text: part.text });
}

function fail(answer, kind, message) {
  answer.state = "failed";
  answer.error = { kind, message };
}

const lengthOf = (messages) => messages.reduce((sum, message) => sum + message.content.length, 0);

/** How many messages at the beginning have no room any more, by what earlier ones took. */
function omittedMessages({ model, messages, settings, previous }) {
  const known = contextUsed(previous);
  const density = known ? known / previous.characters : TOKENS_PER_CHARACTER;
  const wished = settings.max_tokens ?? model.defaults.max_tokens;
  const room = model.context - Math.min(wished, model.context * ANSWER_SHARE);
  let omitted = 0;
  while (omitted + 2 < messages.length && lengthOf(messages.slice(omitted)) * density > room) omitted += 2;
  return omitted;
}

/** Until a busy server may be asked again, told second by second. */
async function wait(job, { message, waitS }, changed) {
  const { answer, signal } = job;
  answer.state = "waiting";
  for (let left = Math.min(waitS, LONGEST_WAIT_S); left > 0 && !signal.aborted && !job.hurried; left -= 1) {
    answer.waiting = { message, seconds: left };
    changed();
    await new Promise((resolve) => {
      job.hurry = () => {
        job.hurried = true;
        resolve();
      };
      signal.addEventListener("abort", resolve, { once: true });
      setTimeout(resolve, 1000);
    });
  }
  job.hurried = false;
  delete answer.waiting;
  answer.state = "running";
  changed();
}
