// What this browser keeps: chats, each under a key of its own (two tabs do not overwrite each other's),
// settings and colours. A browser that keeps nothing gives a page that forgets.

const CHAT = "nanochat.chat.";

export const store = { local: usable("localStorage"), session: usable("sessionStorage") };

function usable(name) {
  try {
    const storage = window[name];
    storage.setItem("nanochat.try", "1");
    storage.removeItem("nanochat.try");
    return storage;
  } catch {
    const kept = new Map();
    return {
      getItem: (key) => kept.get(key) ?? null,
      setItem: (key, value) => kept.set(key, value),
      removeItem: (key) => kept.delete(key),
      key: (index) => [...kept.keys()][index] ?? null,
      get length() { return kept.size; },
    };
  }
}

/** A kept value, or `otherwise` where there is none that can be read. */
export function read(key, otherwise) {
  try {
    return JSON.parse(store.local.getItem(key)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

export const write = (key, value) => store.local.setItem(key, JSON.stringify(value));

/** A chat is {id, columns, turns, updated}; a turn is {question, answers: one for each column}. */
export function newChat(columns) {
  return { id: crypto.getRandomValues(new Uint32Array(2)).join("-"), columns, turns: [], updated: Date.now() };
}

export const titleOf = (chat) => chat.turns[0].question.trim().replaceAll(/\s+/g, " ").slice(0, 80);

const isChat = (chat) => (chat?.columns === 1 || chat?.columns === 2) && Array.isArray(chat.turns) && chat.turns.length > 0
  && chat.turns.every((turn) => typeof turn.question === "string" && turn.answers?.length === chat.columns
    && turn.answers.every((answer) => Array.isArray(answer?.parts)));

/** All kept chats, the newest first. */
export function readChats() {
  const keys = Array.from({ length: store.local.length }, (_, index) => store.local.key(index));
  return keys.filter((key) => key.startsWith(CHAT)).map((key) => read(key, null)).filter(isChat)
    .sort((one, other) => other.updated - one.updated);
}

export function readChat(id) {
  const chat = read(CHAT + id, null);
  return isChat(chat) ? chat : null;
}

/** Keep a chat; where there is no more room, the oldest others go. Returns how many went. */
export function writeChat(chat) {
  let gone = 0;
  for (;;) {
    try {
      write(CHAT + chat.id, chat);
      return gone;
    } catch (error) {
      const oldest = readChats().filter((other) => other.id !== chat.id).at(-1);
      if (error.name !== "QuotaExceededError" || !oldest) throw error;
      removeChat(oldest.id);
      gone += 1;
    }
  }
}

export const removeChat = (id) => store.local.removeItem(CHAT + id);

/** Call `changed` when another tab has kept or removed a chat. */
export function watchChats(changed) {
  addEventListener("storage", (event) => {
    if (event.key === null || event.key.startsWith(CHAT)) changed();
  });
}
