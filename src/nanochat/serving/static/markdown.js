// Markdown as a model writes it, to nodes. The text is nobody's word but the model's: there is no markup in
// it, every node is made here and filled with text, a link leads to http(s) or is not one, and a picture
// is a link. The time is linear in the text, and nothing nests without end.

import { el, iconButton } from "./dom.js";

const DEEPEST = 8;
const MOST_OPEN = 20;

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`]{0,100})$/;
const HEADING = /^ {0,3}(#{1,6})([ \t].*)?$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;
const TABLE_LINE = /^[ \t]*\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;

const LINK = /!?\[((?:[^[\]\\]|\\.){0,500})\]\([ \t]*<?((?:[^\s<>()]|\([^\s<>()]{0,300}\)){1,2000})>?(?:[ \t]+"[^"]{0,300}")?[ \t]*\)/y;
const ADDRESS = /https?:\/\/[^\s<>"'`]{1,2000}/y;
const PUNCTUATION = /[!-/:-@[-`{-~]/;
const WORD = /[\p{L}\p{N}]/u;

/** The nodes of a text, one for each block. */
export function render(text) {
  return blocks(text.replaceAll("\r\n", "\n").split("\n"), 0);
}

/** The address, if it is one that may be followed. */
export function safeAddress(text) {
  try {
    const url = new URL(text);
    return url.protocol === "http:" || url.protocol === "https:" ? url.href : null;
  } catch {
    return null;
  }
}

// -- blocks ----------------------------------------------------------------------------------------

function blocks(lines, depth) {
  const nodes = [];
  let paragraph = [];
  const endParagraph = () => {
    if (paragraph.length) nodes.push(el("p", {}, ...inline(paragraph.join("\n"))));
    paragraph = [];
  };
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    let match;
    if (!line.trim()) {
      endParagraph();
      at += 1;
    } else if ((match = FENCE.exec(line))) {
      endParagraph();
      let end = at + 1;
      while (end < lines.length && !closes(lines[end], match[1])) end += 1;
      nodes.push(code(lines.slice(at + 1, end).join("\n"), match[2].trim()));
      at = end + 1;
    } else if ((match = HEADING.exec(line))) {
      endParagraph();
      const title = (match[2] ?? "").trim().replace(/[ \t]#+$/, "");
      // The page has its own h1.
      nodes.push(el(`h${Math.min(match[1].length + 1, 6)}`, {}, ...inline(title)));
      at += 1;
    } else if (RULE.test(line)) {
      endParagraph();
      nodes.push(el("hr"));
      at += 1;
    } else if (QUOTE.test(line) && depth < DEEPEST) {
      endParagraph();
      let end = at;
      while (end < lines.length && QUOTE.test(lines[end])) end += 1;
      const quoted = lines.slice(at, end).map((each) => each.replace(QUOTE, ""));
      nodes.push(el("blockquote", {}, ...blocks(quoted, depth + 1)));
      at = end;
    } else if ((match = ITEM.exec(line)) && depth < DEEPEST && (!paragraph.length || interrupts(match))) {
      endParagraph();
      const [node, end] = list(lines, at, depth);
      nodes.push(node);
      at = end;
    } else if (!paragraph.length && line.includes("|") && TABLE_LINE.test(lines[at + 1] ?? "")
        && cells(line).length === cells(lines[at + 1]).length) {
      let end = at + 2;
      while (end < lines.length && lines[end].includes("|")) end += 1;
      nodes.push(table(cells(line), lines.slice(at + 2, end).map(cells)));
      at = end;
    } else {
      paragraph.push(line.trim());
      at += 1;
    }
  }
  endParagraph();
  return nodes;
}

/** Whether a list may begin in the middle of a paragraph: not by "1984. It was a year." */
const interrupts = ([, , marker, space]) => Boolean(space) && (Number.parseInt(marker, 10) || 1) === 1;

function closes(line, fence) {
  const mark = line.trim();
  return mark.length >= fence.length && mark === fence[0].repeat(mark.length);
}

function code(text, language) {
  const name = language.split(/\s/)[0];
  const label = name ? `Code, ${name}` : "Code";
  return el("div", { class: "code" },
    el("div", { class: "code-head" }, el("span", {}, name || "code"),
      iconButton("copy", "Copy the code", { "data-action": "copy-code" })),
    el("pre", { tabindex: "0", role: "group", "aria-label": label }, el("code", {}, text)));
}

/** The list that begins at a line, and the line behind it. */
function list(lines, start, depth) {
  const first = ITEM.exec(lines[start]);
  const ordered = /\d/.test(first[2]);
  const indent = first[1].length;
  const items = [];
  let loose = false;
  let blank = false;
  let at = start;
  for (; at < lines.length; at += 1) {
    const line = lines[at];
    if (!line.trim()) {
      blank = true;
      continue;
    }
    const spaces = line.length - line.trimStart().length;
    const match = ITEM.exec(line);
    const current = items.at(-1);
    if (match && spaces <= indent + 1 && /\d/.test(match[2]) === ordered && !RULE.test(line)) {
      if (spaces < indent) break;
      loose ||= blank && items.length > 0;
      items.push({ width: match[0].length, lines: [line.slice(match[0].length)] });
    } else if (current && spaces >= Math.min(current.width, indent + 2)) {
      if (blank) current.lines.push("");
      loose ||= blank;
      current.lines.push(line.slice(Math.min(spaces, current.width)));
    } else if (current && !blank && !match && !FENCE.test(line) && !HEADING.test(line) && !QUOTE.test(line) && !RULE.test(line)) {
      current.lines.push(line.trim());
    } else {
      break;
    }
    blank = false;
  }
  const number = Number.parseInt(first[2], 10);
  const node = el(ordered ? "ol" : "ul", ordered && number !== 1 ? { start: number } : {});
  for (const item of items) {
    const content = blocks(item.lines, depth + 1);
    node.append(el("li", {}, ...(loose ? content : content.flatMap((block) => block.tagName === "P" ? [...block.childNodes] : [block]))));
  }
  return [node, at];
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  return inner.split("|").map((cell) => cell.trim());
}

function table(head, rows) {
  const row = (tag, texts) => el("tr", {}, ...head.map((_, column) => el(tag, {}, ...inline(texts[column] ?? ""))));
  return el("div", { class: "table", tabindex: "0", role: "group", "aria-label": "Table" },
    el("table", {}, el("thead", {}, row("th", head)), el("tbody", {}, ...rows.map((texts) => row("td", texts)))));
}

// -- inside a block --------------------------------------------------------------------------------

/** What stands in a paragraph: marks that are open wait on a stack, and what never closes is text. */
function inline(text) {
  const stack = [{ mark: "", nodes: [] }];
  const unclosedTicks = new Set();
  let plain = "";
  const nodes = () => stack.at(-1).nodes;
  const flush = () => {
    if (plain) nodes().push(document.createTextNode(plain));
    plain = "";
  };
  const add = (node) => {
    flush();
    nodes().push(node);
  };
  const giveUp = () => {
    const { mark, nodes: inner } = stack.pop();
    nodes().push(document.createTextNode(mark), ...inner);
  };

  let at = 0;
  while (at < text.length) {
    const character = text[at];
    if (character === "\\" && PUNCTUATION.test(text[at + 1] ?? "")) {
      plain += text[at + 1];
      at += 2;
    } else if (character === "\n") {
      add(el("br"));
      at += 1;
    } else if (character === "`") {
      const ticks = runAt(text, at);
      const end = unclosedTicks.has(ticks) ? -1 : closingTicks(text, at + ticks, ticks);
      if (end < 0) {
        unclosedTicks.add(ticks);
        plain += "`".repeat(ticks);
        at += ticks;
      } else {
        add(el("code", {}, text.slice(at + ticks, end).replaceAll("\n", " ").replace(/^ (.*[^ ].*) $/, "$1")));
        at = end + ticks;
      }
    } else if (character === "[" || (character === "!" && text[at + 1] === "[")) {
      LINK.lastIndex = at;
      const match = LINK.exec(text);
      const address = match && safeAddress(match[2]);
      if (address) {
        const label = match[1].replace(/\\([!-/:-@[-`{-~])/g, "$1");
        add(link(address, label.trim() || address));
        at += match[0].length;
      } else {
        plain += character;
        at += 1;
      }
    } else if (character === "h" && !WORD.test(text[at - 1] ?? "") && (ADDRESS.lastIndex = at, ADDRESS.test(text))) {
      const found = trimmed(text.slice(at, ADDRESS.lastIndex));
      const address = safeAddress(found);
      if (address) add(link(address, found));
      else plain += found;
      at += found.length;
    } else if (character === "*" || character === "_" || character === "~") {
      const length = runAt(text, at);
      mark(character, length, text[at - 1] ?? " ", text[at + length] ?? " ");
      at += length;
    } else {
      plain += character;
      at += 1;
    }
  }
  flush();
  while (stack.length > 1) giveUp();
  return stack[0].nodes;

  /** A run of the marks * _ ~ between two characters. */
  function mark(character, length, before, after) {
    const inWord = character === "_" && WORD.test(before) && WORD.test(after);
    const possible = character === "~" ? length === 2 : length <= 3;
    let left = length;
    if (possible && !inWord) {
      if (!/\s/.test(before)) left = close(character, left);
      if (left && !/\s/.test(after) && stack.length < MOST_OPEN) {
        flush();
        if (left >= 2) stack.push({ mark: character.repeat(2), nodes: [] });
        if (left % 2) stack.push({ mark: character, nodes: [] });
        left = 0;
      }
    }
    plain += character.repeat(left);
  }

  /** End what is open and these marks can end; how many of them are left. */
  function close(character, length) {
    let left = length;
    while (left) {
      const opened = (possible) => stack.findLastIndex(({ mark }) => mark[0] === character && possible(mark.length));
      const exact = opened((length) => length === left);
      const at = exact < 0 ? opened((length) => length <= left) : exact;
      if (at < 0) break;
      flush();
      while (stack.length > at + 1) giveUp();
      const { mark: ended, nodes: inner } = stack.pop();
      const tag = character === "~" ? "del" : ended.length === 2 ? "strong" : "em";
      nodes().push(el(tag, {}, ...inner));
      left -= ended.length;
    }
    return left;
  }
}

function runAt(text, at) {
  let end = at;
  while (text[end] === text[at]) end += 1;
  return end - at;
}

function closingTicks(text, from, ticks) {
  let at = text.indexOf("`", from);
  while (at >= 0) {
    const length = runAt(text, at);
    if (length === ticks) return at;
    at = text.indexOf("`", at + length);
  }
  return -1;
}

/** An address without the punctuation of the sentence around it. */
function trimmed(address) {
  let end = address.length;
  while (end && (/[.,;:!?*_~\]]/.test(address[end - 1]) || (address[end - 1] === ")" && !address.includes("(")))) end -= 1;
  return address.slice(0, end);
}

const link = (href, label) => el("a", { href, target: "_blank", rel: "noopener noreferrer nofollow" }, label);
