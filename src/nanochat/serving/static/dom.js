// Making elements. Text becomes text nodes, never markup.

/** el("p", {class: "soft", onclick: f}, "text", node): `class`, attributes, and listeners by `on…`. */
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export const byId = (id) => document.getElementById(id);

/** One of the symbols at the end of index.html. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

/** A button that shows a symbol; `label` is its name and its tooltip. */
export const iconButton = (name, label, properties = {}) =>
  el("button", { type: "button", class: "icon", "aria-label": label, title: label, ...properties }, icon(name));

/** Show `fresh` in `parent`, leaving alone the children at the beginning that would be the same. */
export function replaceChanged(parent, fresh) {
  let same = 0;
  while (same < fresh.length && parent.childNodes[same]?.isEqualNode(fresh[same])) same += 1;
  while (parent.childNodes.length > same) parent.lastChild.remove();
  parent.append(...fresh.slice(same));
}
