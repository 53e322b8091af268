// What was converted, kept in this browser so that it can be heard beside the result after a reload.

const LARGEST_BYTES = 100_000_000; // of one job

let opened = null;

function database() {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open("auto_voice", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("originals");
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opened;
}

async function ask(mode, change) {
  const store = (await database()).transaction("originals", mode).objectStore("originals");
  return new Promise((resolve, reject) => {
    const request = change(store);
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

// A private window may have no database, and a disk no room: the page then shows the result alone.
const quietly = (doing) => doing.catch(() => undefined);

export function keep(id, files) {
  const size = files.reduce((sum, file) => sum + file.size, 0);
  if (size > LARGEST_BYTES) return Promise.resolve();
  return quietly(ask("readwrite", (store) => store.put(files, id)));
}

export const of = (id) => quietly(ask("readonly", (store) => store.get(id)));

export const drop = (id) => quietly(ask("readwrite", (store) => store.delete(id)));
