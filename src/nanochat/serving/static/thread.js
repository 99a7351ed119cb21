// A conversation on the screen: questions, and answers side by side.

import { isOpen, rateOf, textOf } from "./asking.js";
import { byId, el, icon, iconButton, replaceChanged } from "./dom.js";
import { render } from "./markdown.js";

export class Thread {
  /** actions: retry(turn, column), edit(turn, question), hurry(answer), newChat(). */
  constructor(actions) {
    this.root = byId("thread");
    this.scroller = byId("scroll");
    this.actions = actions;
    this.elements = new WeakMap();
    this.stale = new Set();
    this.scroller.addEventListener("scroll", () => this.showWay());
  }

  /** Show a chat from its beginning. */
  show(chat) {
    this.chat = chat;
    this.root.dataset.columns = chat.columns;
    this.root.replaceChildren();
    chat.turns.forEach((_, turn) => this.addTurn(turn));
    this.toEnd();
  }

  /** Show a turn that has come at the end. */
  addTurn(turn) {
    const { question, answers } = this.chat.turns[turn];
    const column = el("div", { class: "answers" }, ...answers.map((answer, index) => this.answer(answer, turn, index)));
    this.root.append(el("article", { class: "turn", "aria-label": `Turn ${turn + 1}` }, this.question(question, turn), column));
    // Those before are no longer the newest.
    for (const answer of [...(this.chat.turns[turn - 1]?.answers ?? []), ...answers]) this.refresh(answer);
    this.toEnd();
  }

  /** Show an answer in the place of an earlier one. */
  replaceAnswer(turn, column) {
    const answer = this.chat.turns[turn].answers[column];
    const places = this.root.children[turn].querySelector(".answers").children;
    places[column].replaceWith(this.answer(answer, turn, column));
    this.refresh(answer);
  }

  /** Forget the turns from one on. */
  cut(turn) {
    while (this.root.children.length > turn) this.root.lastChild.remove();
  }

  /** An answer has changed: show it with the next frame. */
  touch(answer) {
    if (this.stale.size === 0) requestAnimationFrame(() => {
      const pinned = this.atEnd;
      const answers = [...this.stale];
      this.stale.clear();
      for (const each of answers) this.refresh(each);
      if (pinned) this.toEnd();
      else this.showWay();
    });
    this.stale.add(answer);
  }

  get atEnd() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    return scrollHeight - scrollTop - clientHeight < 48;
  }

  toEnd() {
    this.scroller.scrollTop = this.scroller.scrollHeight;
    this.showWay();
  }

  showWay() {
    byId("to-end").hidden = this.atEnd;
  }

  editQuestion(turn) {
    const element = this.root.children[turn].querySelector(".question");
    const { question } = this.chat.turns[turn];
    const input = el("textarea", { rows: Math.min(question.split("\n").length + 1, 8), "aria-label": "Edit the question" });
    input.value = question;
    const back = () => {
      const shown = this.question(question, turn);
      form.replaceWith(shown);
      shown.querySelector("[data-action=edit]").focus();
    };
    const later = this.chat.turns.length - turn - 1;
    const form = el("form", { class: "question editing" }, input,
      el("div", { class: "buttons" },
        later ? el("span", { class: "soft" }, later === 1 ? "The turn below goes." : `The ${later} turns below go.`) : null,
        el("button", { type: "button", onclick: back }, "Cancel"),
        el("button", { type: "submit", class: "primary" }, "Send")));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (input.value.trim()) this.actions.edit(turn, input.value);
    });
    input.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Escape") {
        event.stopPropagation();
        back();
      } else if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        form.requestSubmit();
      }
    });
    element.replaceWith(form);
    input.focus();
  }

  // -- making ----------------------------------------------------------------------------------------

  question(question, turn) {
    return el("section", { class: "question", "aria-label": "You" },
      el("div", { class: "bubble" }, question),
      el("div", { class: "actions" },
        iconButton("edit", "Edit the question", { "data-action": "edit", onclick: () => this.editQuestion(turn) }),
        iconButton("copy", "Copy the question", { "data-action": "copy-question" })));
  }

  answer(answer, turn, column) {
    const element = el("section", { class: "answer", "aria-label": `Answer of ${answer.model}` },
      el("h2", { class: "who" }, answer.model),
      el("div", { class: "body" }),
      el("div", { class: "notices" }),
      el("div", { class: "foot" },
        el("span", { class: "stats" }),
        el("span", { class: "actions" },
          iconButton("copy", "Copy the answer", { "data-action": "copy-answer" }),
          iconButton("retry", "Answer again", { "data-action": "retry", onclick: () => this.actions.retry(turn, column) }))));
    element.text = () => textOf(answer);
    element.retry = () => this.actions.retry(turn, column);
    this.elements.set(answer, element);
    return element;
  }

  refresh(answer) {
    const element = this.elements.get(answer);
    if (!element?.isConnected) return;
    const open = isOpen(answer);
    element.dataset.state = answer.state;
    element.setAttribute("aria-busy", open);
    const nodes = answer.parts.flatMap((part, index) => {
      if (part.type === "text") return render(part.text);
      if (part.type === "python") return [call(part.text, answer.parts[index + 1], open)];
      return answer.parts[index - 1]?.type === "python" ? [] : [call("", part, open)];
    });
    if (!nodes.length && answer.state === "running") nodes.push(el("p", { class: "dots", "aria-hidden": "true" }, el("i"), el("i"), el("i")));
    replaceChanged(element.querySelector(".body"), nodes);
    replaceChanged(element.querySelector(".notices"), this.notices(answer, element));
    element.querySelector(".stats").textContent = stats(answer);
    // Only the newest answers are made anew: what came after the others belongs to them.
    element.querySelector("[data-action=retry]").hidden = open || answer.state === "failed" || !this.isLast(answer);
    element.querySelector("[data-action=copy-answer]").hidden = open || !textOf(answer);
  }

  notices(answer, element) {
    const { context } = answer;
    const made = [];
    if (answer.omitted) {
      made.push(notice("soft", `${earliest(answer.omitted / 2)} longer fit in the model's context of ${context} tokens: it has not read them.`));
    }
    if (answer.state === "waiting" && answer.waiting) {
      const { message, seconds } = answer.waiting;
      made.push(notice("busy", `${message} Asking again in ${seconds} s.`, button("Now", () => this.actions.hurry(answer))));
    } else if (answer.state === "failed") {
      made.push(notice("error", answer.error.message, ...(this.isLast(answer) ? [button("Try again", () => element.retry())] : [])));
    } else if (answer.state === "stopped") {
      made.push(notice("soft", "Stopped."));
    } else if (answer.finish === "length") {
      const full = answer.promptTokens + answer.tokens >= context;
      made.push(full
        ? notice("limit", `The model's context of ${context} tokens is full, so the answer ends here.`, button("New chat", () => this.actions.newChat()))
        : notice("limit", `The answer was cut after ${answer.tokens} tokens, which is as long as it may be.`));
    }
    return made;
  }

  isLast(answer) {
    return this.chat.turns.at(-1).answers.includes(answer);
  }
}

const earliest = (turns) => (turns === 1 ? "The first question and its answer no" : `The first ${turns} questions and their answers no`);

const button = (label, onclick) => el("button", { type: "button", onclick }, label);

function notice(kind, text, ...buttons) {
  const urgent = kind === "error" || kind === "limit";
  return el("div", { class: `notice ${kind}`, role: urgent ? "alert" : false }, el("span", {}, text), ...buttons);
}

/** What the calculator was asked and said. */
function call(asked, output, open) {
  const answered = output?.type === "python_output";
  const failed = answered && output.text === "error";
  const said = answered ? output.text : open ? "…" : "no result";
  return el("div", { class: `call${failed ? " failed" : ""}`, role: "group", "aria-label": "Calculator" }, icon("sum"),
    el("span", { class: "call-name" }, "Calculator"), el("code", {}, asked), el("span", { class: "equals" }, "="), el("samp", {}, said));
}

function stats(answer) {
  if (!answer.tokens) return "";
  const rate = rateOf(answer);
  // Until the server has told, tokens that came together count as one.
  const about = answer.promptTokens === undefined ? "about " : "";
  return [
    answer.tokens === 1 ? `${about}1 token` : `${about}${answer.tokens} tokens`,
    rate === null ? null : `${rate < 10 ? rate.toFixed(1) : Math.round(rate)} tokens/s`,
    answer.firstMs === undefined ? null : `first after ${time(answer.firstMs)}`,
  ].filter(Boolean).join(" · ");
}

const time = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);
