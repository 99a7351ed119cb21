// What a column asks of its model: the fields of a request, and the dialog that sets them.

import { byId, el } from "./dom.js";

const NUMBERS = [
  { name: "temperature", label: "Temperature", min: 0, max: 5, step: 0.01, help: "0 takes the likeliest token, always" },
  { name: "top_k", label: "Top-k", min: 1, step: 1, help: "draw among the k likeliest" },
  { name: "top_p", label: "Top-p", min: 0.01, max: 1, step: 0.01, help: "draw among the likeliest of this share", server: 1 },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.01, max: 10, step: 0.01, help: "above 1 repeats less", server: 1 },
  { name: "max_tokens", label: "Max tokens", min: 1, step: 1, help: "of an answer" },
  { name: "seed", label: "Seed", min: 0, max: Number.MAX_SAFE_INTEGER, step: 1, help: "the same one draws the same answer", server: "random" },
];
const MOST_STOPS = 4;

/** The fields of a request. */
export function requestFields(settings) {
  const { system, ...fields } = settings;
  return fields;
}

/** In a few words, for a button. */
export function summary(settings, defaults) {
  const wishes = { ...defaults, ...settings };
  const others = Object.keys(settings).filter((name) => name !== "temperature").length;
  return `temperature ${wishes.temperature}${others ? ` +${others}` : ""}`;
}

/** Ask for a column's settings; resolves to the new ones, or to null where they stay. */
export function askForSettings(title, settings, model) {
  const dialog = byId("settings");
  const form = dialog.querySelector("form");
  byId("settings-title").textContent = title;
  const inputs = NUMBERS.map(({ name, label, help, server, ...limits }) => {
    const max = name === "max_tokens" ? model.defaults.max_tokens : limits.max;
    const placeholder = model.defaults[name] ?? server ?? "all";
    return field(label, help, el("input", { type: "number", inputmode: "decimal", name, placeholder, ...limits, max }));
  });
  const stop = field("Stop at", `the answer ends before one of these: up to ${MOST_STOPS}, one a line`,
    el("textarea", { name: "stop", rows: 2 }));
  const system = field("System message", model.chat ? "goes before the first question" : "a base model has none",
    el("textarea", { name: "system", rows: 2, disabled: !model.chat }));
  form.querySelector(".fields").replaceChildren(...inputs, stop, system);
  show(form, settings);
  byId("reset-settings").onclick = () => show(form, {});
  form.elements.stop.oninput = ({ target }) =>
    target.setCustomValidity(stopsOf(target.value).length > MOST_STOPS ? `At most ${MOST_STOPS} lines.` : "");
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.onclose = () => resolve(dialog.returnValue === "save" ? read(form) : null);
  });
}

function field(label, help, input) {
  const id = `setting-${input.name}`;
  input.setAttribute("aria-describedby", id);
  return el("div", { class: `field ${input.tagName.toLowerCase()}` },
    el("label", {}, el("span", {}, label), input), el("small", { id }, help));
}

const stopsOf = (text) => text.split("\n").filter((line) => line !== "");

function show(form, settings) {
  for (const { name } of NUMBERS) form.elements[name].value = settings[name] ?? "";
  form.elements.stop.value = (settings.stop ?? []).join("\n");
  form.elements.system.value = settings.system ?? "";
}

function read(form) {
  const settings = {};
  for (const { name } of NUMBERS) {
    const { value } = form.elements[name];
    if (value !== "") settings[name] = Number(value);
  }
  const stop = stopsOf(form.elements.stop.value);
  if (stop.length) settings.stop = stop;
  if (form.elements.system.value.trim()) settings.system = form.elements.system.value;
  return settings;
}
