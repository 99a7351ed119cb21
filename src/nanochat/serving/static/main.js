// The page: which chat is shown, what is asked, and what the keys and buttons do.

import { ask, contextUsed, isOpen, messagesBefore, newAnswer, textOf } from "./asking.js";
import { AnswerError, fetchModels, hasKey, keepKey } from "./api.js";
import { byId, el, icon, iconButton } from "./dom.js";
import { askForSettings, summary } from "./settings.js";
import { newChat, read, readChat, readChats, removeChat, store, titleOf, watchChats, write, writeChat } from "./storage.js";
import { Thread } from "./thread.js";

const COLUMNS = "nanochat.columns";
const EXAMPLES = {
  chat: ["What is your name?", "What is 12 + 30?", "How do you spell “garden”?"],
  base: ["Once upon a time", "The function returns"],
};
const UNDO_MS = 8000;

let models = [];
let chat = newChat(1);
const jobs = new Map(); // by answer: {chat, controller, …} of those that are being written
const removed = new Set(); // ids of chats that are not to be kept
let left = false; // the page is being closed, or loaded anew
const message = byId("message");

const thread = new Thread({
  retry,
  edit: (turn, question) => send(question, turn),
  hurry: (answer) => jobs.get(answer)?.hurry?.(),
  newChat: () => show(newChat(chat.columns)),
});

// -- models and their settings ---------------------------------------------------------------------

/** What each column of a chat with one, and with two, asks: {model, settings}, as it was left the last time. */
const columns = { 1: columnsAsLeft(1), 2: columnsAsLeft(2) };

function columnsAsLeft(count) {
  const left = read(COLUMNS, {})[count];
  const usable = Array.isArray(left) && left.length === count && left.every((each) => each instanceof Object);
  return usable ? left : Array.from({ length: count }, () => ({}));
}

/** The model that a column was given, if it is served; else the first that no other column has. */
function modelOf(column) {
  const given = columns[chat.columns].map(({ model }) => models.find((each) => each.name === model));
  const free = models.filter((model) => !given.includes(model));
  return given[column] ?? free[column] ?? free[0] ?? models[0];
}

const settingsOf = (column) => columns[chat.columns][column].settings ?? {};

async function loadModels() {
  try {
    models = await fetchModels();
    trouble(null);
  } catch (error) {
    if (!(error instanceof AnswerError)) throw error;
    if (error.kind === "key" && (await askForKey())) return loadModels();
    trouble(error.message);
  }
  byId("send").disabled = models.length === 0;
  showPickers();
  showWelcome();
}

function showPickers() {
  byId("pickers").dataset.columns = chat.columns;
  byId("pickers").replaceChildren(...columns[chat.columns].map((_, column) => picker(column)));
}

function picker(column) {
  const model = modelOf(column);
  if (!model) return "";
  const name = chat.columns === 1 ? "Model" : `Model ${"AB"[column]}`;
  const options = models.map((each) => el("option", { value: each.name, selected: each === model }, each.name));
  const choose = el("select", { "aria-label": name, onchange: () => change({ model: choose.value }) }, ...options);
  const settings = el("button", { type: "button", class: "settings", title: "Settings (Alt+S)", "aria-label": `Settings of ${name.toLowerCase()}: ${summary(settingsOf(column), model.defaults)}`, onclick: openSettings },
    icon("settings"), el("span", {}, summary(settingsOf(column), model.defaults)));
  return el("div", { class: "picker" }, choose, settings, el("span", { class: "used", title: "Tokens of this chat, of those that the model reads" }, used(column)));

  function change(wishes) {
    Object.assign(columns[chat.columns][column], wishes);
    write(COLUMNS, columns);
    showPickers();
    showWelcome();
  }

  async function openSettings() {
    const chosen = await askForSettings(`Settings of ${model.name}`, settingsOf(column), model);
    if (chosen) change({ settings: chosen });
    byId("pickers").children[column].querySelector(".settings").focus();
  }
}

function used(column) {
  const model = modelOf(column);
  const tokens = model.chat ? contextUsed(chat.turns.at(-1)?.answers[column]) : null;
  return tokens === null ? `reads ${model.context} tokens` : `${tokens} of ${model.context} tokens`;
}

let asking = null; // one dialog, however many answers wait for the key
function askForKey() {
  asking ??= new Promise((resolve) => {
    const dialog = byId("key");
    const input = dialog.querySelector("input");
    byId("key-wrong").hidden = !hasKey();
    input.value = "";
    dialog.returnValue = "";
    dialog.onclose = () => {
      asking = null;
      if (dialog.returnValue === "save") keepKey(input.value);
      resolve(dialog.returnValue === "save");
    };
    dialog.showModal();
  });
  return asking;
}

// -- asking ----------------------------------------------------------------------------------------

/** Put a question to every column: a new turn at the end, or in the place of the turns from `turn` on. */
function send(question, turn = chat.turns.length) {
  if (!models.length || running().length && turn === chat.turns.length) return;
  for (const each of chat.turns.slice(turn).flatMap((gone) => gone.answers)) jobs.get(each)?.controller.abort();
  chat.turns.length = turn;
  thread.cut(turn);
  const answers = columns[chat.columns].map((_, column) => newAnswer(modelOf(column)));
  chat.turns.push({ question: question.trim(), answers });
  showWelcome();
  thread.addTurn(turn);
  if (location.hash.slice(1) !== chat.id) history.pushState(null, "", `./#${chat.id}`);
  answers.forEach((_, column) => begin(turn, column));
  message.focus();
}

function retry(turn, column) {
  const { answers } = chat.turns[turn];
  if (isOpen(answers[column])) return;
  answers[column] = newAnswer(modelOf(column));
  thread.replaceAnswer(turn, column);
  begin(turn, column);
  message.focus();
}

async function begin(turn, column) {
  const asked = chat;
  const answer = asked.turns[turn].answers[column];
  const model = modelOf(column);
  const controller = new AbortController();
  const messages = [...messagesBefore(asked, turn, column), { role: "user", content: asked.turns[turn].question }];
  const previous = asked.turns[turn - 1]?.answers[column];
  const job = { chat: asked, answer, model, messages, previous, settings: settingsOf(column), controller, signal: controller.signal };
  jobs.set(answer, job);
  keep(asked);
  showRunning();
  announce(`${model.name} is answering.`);
  try {
    await ask(job, { changed: () => thread.touch(answer), askForKey });
  } finally {
    jobs.delete(answer);
    keep(asked);
    if (asked === chat) {
      showRunning();
      showPickers();
      announce(answer.state === "failed" ? answer.error.message : `${model.name}: ${textOf(answer)}`);
    }
  }
}

const running = () => chat.turns.at(-1)?.answers.filter((answer) => jobs.has(answer)) ?? [];

function stop() {
  for (const answer of running()) jobs.get(answer).controller.abort();
  message.focus();
}

function showRunning() {
  const busy = running().length > 0;
  byId("send").hidden = busy;
  byId("stop").hidden = !busy;
}

// -- chats -----------------------------------------------------------------------------------------

function show(next) {
  chat = next;
  thread.show(chat);
  showPickers();
  showWelcome();
  showRunning();
  showChats();
  closeSidebar();
  if (!matchMedia("(pointer: coarse)").matches) message.focus();
}

/** Go to a new chat, or to a kept one. */
function go(next) {
  const address = next.turns.length ? `./#${next.id}` : next.columns === 2 ? "./?compare" : "./";
  history.pushState(null, "", address);
  show(next);
}

/** What the address says. */
function open() {
  const id = location.hash.slice(1);
  const live = [...jobs.values()].find((job) => job.chat.id === id)?.chat;
  const kept = live ?? (id ? readChat(id) : null);
  if (kept) settle(kept);
  show(kept ?? newChat(new URLSearchParams(location.search).has("compare") ? 2 : 1));
}

/** An answer that nobody works on any more (the page was left) has stopped. */
function settle(kept) {
  for (const answer of kept.turns.flatMap((turn) => turn.answers)) {
    if (isOpen(answer) && !jobs.has(answer)) answer.state = "stopped";
  }
}

/** Keep what is being written. The browser breaks it off now, which is no fault of the server's. */
function leave() {
  for (const job of jobs.values()) keep(job.chat);
  left = jobs.size > 0;
}

function keep(written) {
  if (left || removed.has(written.id)) return;
  written.updated = Date.now();
  try {
    const gone = writeChat(written);
    if (gone) toast("This browser's room was full: the oldest chats went.");
  } catch (error) {
    toast(`This chat cannot be kept: ${error.message}`);
  }
  showChats();
}

function showChats() {
  byId("chats").replaceChildren(...readChats().map((each) => {
    const title = titleOf(each);
    const when = new Date(each.updated).toLocaleString();
    return el("li", {},
      el("a", { href: `./#${each.id}`, title: when, "aria-current": each.id === chat.id ? "page" : false, onclick: (event) => {
        event.preventDefault();
        history.pushState(null, "", `./#${each.id}`);
        open();
      } }, each.columns === 2 ? icon("compare") : null, el("span", {}, title)),
      iconButton("delete", `Delete “${title}”`, { onclick: () => remove([each]) }));
  }));
  byId("delete-all").hidden = byId("chats").children.length === 0;
}

function remove(gone) {
  for (const each of gone) {
    removed.add(each.id);
    removeChat(each.id);
  }
  for (const job of jobs.values()) if (removed.has(job.chat.id)) job.controller.abort();
  if (removed.has(chat.id)) go(newChat(1));
  else showChats();
  toast(gone.length === 1 ? "The chat is deleted." : `${gone.length} chats are deleted.`, () => {
    for (const each of gone) {
      removed.delete(each.id);
      settle(each);
      writeChat(each);
    }
    showChats();
  });
}

function showWelcome() {
  const welcome = byId("welcome");
  const asked = columns[chat.columns].map((_, column) => modelOf(column)).filter(Boolean);
  welcome.hidden = chat.turns.length > 0 || asked.length === 0;
  const chatting = asked.every((model) => model.chat);
  message.placeholder = chatting ? "Ask something" : "Begin a text";
  if (welcome.hidden) return;
  const names = asked.map((model) => model.name).join(" and ");
  welcome.querySelector("h1").textContent = chat.columns === 2 ? "One question, two answers" : chatting ? `Talk to ${names}` : `${names} continues your text`;
  welcome.querySelector("p").textContent = chat.columns === 2
    ? `Everything is asked of ${asked[0] === asked[1] ? `${asked[0].name} twice` : names}, each with settings of its own.`
    : chatting ? "It was trained from scratch, and what you say stays between this page and its server." : "It is a base model: every text is continued on its own, without what came before.";
  welcome.querySelector(".examples").replaceChildren(...EXAMPLES[chatting ? "chat" : "base"].map((text) =>
    el("button", { type: "button", onclick: () => send(text) }, text)));
}

// -- telling ---------------------------------------------------------------------------------------

/** For those who hear the page: answers once they are whole, not piece by piece. */
const announce = (text) => (byId("announce").textContent = text);

function trouble(text) {
  const place = byId("trouble");
  place.hidden = text === null;
  place.replaceChildren(...(text === null ? [] : [text, " ", el("button", { type: "button", onclick: loadModels }, "Try again")]));
}

let toastTimer;
function toast(text, undo = null) {
  const place = byId("toast");
  const button = place.querySelector("button");
  place.querySelector("span").textContent = text;
  button.hidden = undo === null;
  button.onclick = () => {
    place.hidden = true;
    undo();
  };
  place.hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => (place.hidden = true), undo ? UNDO_MS : 2500);
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without https, or refused: the old way.
    const area = el("textarea", { class: "hidden" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  toast("Copied.");
}

// -- buttons, keys, addresses ----------------------------------------------------------------------

function submit() {
  if (!message.value.trim() || running().length || !models.length) return;
  const question = message.value;
  message.value = "";
  fitMessage();
  send(question);
}

function fitMessage() {
  message.style.height = "auto";
  message.style.height = `${message.scrollHeight}px`;
}

function openSidebar() {
  document.body.classList.add("sidebar-open");
  document.querySelector("main").inert = true;
  byId("shade").hidden = false;
  byId("open-sidebar").setAttribute("aria-expanded", "true");
  byId("close-sidebar").focus();
}

function closeSidebar() {
  if (!document.body.classList.contains("sidebar-open")) return;
  document.body.classList.remove("sidebar-open");
  document.querySelector("main").inert = false;
  byId("shade").hidden = true;
  byId("open-sidebar").setAttribute("aria-expanded", "false");
  byId("open-sidebar").focus();
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
message.addEventListener("input", fitMessage);
message.addEventListener("keydown", (event) => {
  // Enter that ends the writing of a Chinese or Japanese word does not send.
  if (event.isComposing) return;
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    submit();
  } else if (event.key === "ArrowUp" && !message.value && chat.turns.length && !running().length) {
    event.preventDefault();
    thread.editQuestion(chat.turns.length - 1);
  }
});
byId("stop").addEventListener("click", stop);
byId("new-chat").addEventListener("click", () => go(newChat(1)));
byId("new-compare").addEventListener("click", () => go(newChat(2)));
byId("to-end").addEventListener("click", () => thread.toEnd());
byId("open-sidebar").addEventListener("click", openSidebar);
byId("close-sidebar").addEventListener("click", closeSidebar);
byId("shade").addEventListener("click", closeSidebar);
byId("delete-all").addEventListener("click", () => remove(readChats()));
byId("show-shortcuts").addEventListener("click", () => byId("shortcuts").showModal());
for (const button of document.querySelectorAll("[data-close]")) {
  button.addEventListener("click", () => button.closest("dialog").close(""));
}

thread.root.addEventListener("click", (event) => {
  const button = event.target.closest("[data-action]");
  const action = button?.dataset.action;
  if (action === "copy-code") copy(button.closest(".code").querySelector("code").textContent);
  else if (action === "copy-answer") copy(button.closest(".answer").text());
  else if (action === "copy-question") copy(button.closest(".question").querySelector(".bubble").textContent);
});

const SHORTCUTS = {
  KeyR: () => chat.turns.at(-1)?.answers.forEach((_, column) => retry(chat.turns.length - 1, column)),
  KeyN: () => go(newChat(1)),
  KeyC: () => go(newChat(2)),
  KeyS: () => byId("pickers").querySelector(".settings")?.click(),
};
document.addEventListener("keydown", (event) => {
  if (event.isComposing || document.querySelector("dialog[open]")) return;
  if (event.key === "Escape") {
    if (document.body.classList.contains("sidebar-open")) closeSidebar();
    else if (running().length) stop();
  } else if (event.altKey && !event.ctrlKey && !event.metaKey && SHORTCUTS[event.code]) {
    event.preventDefault();
    SHORTCUTS[event.code]();
  } else if (!event.target.matches("input, textarea, select") && !event.ctrlKey && !event.metaKey && !event.altKey) {
    if (event.key === "/") {
      event.preventDefault();
      message.focus();
    } else if (event.key === "?") {
      byId("shortcuts").showModal();
    }
  }
});

for (const input of document.querySelectorAll("#theme input")) {
  input.checked = input.value === (document.documentElement.dataset.theme ?? "system");
  input.addEventListener("change", () => {
    if (input.value === "system") {
      delete document.documentElement.dataset.theme;
      store.local.removeItem("nanochat.theme");
    } else {
      document.documentElement.dataset.theme = input.value;
      store.local.setItem("nanochat.theme", input.value);
    }
  });
}

addEventListener("popstate", open);
for (const leaving of ["beforeunload", "pagehide"]) addEventListener(leaving, leave);
addEventListener("pageshow", () => (left = false));
watchChats(showChats);

open();
loadModels();
