// The server's API: every answer is JSON or a file, every refusal one sentence.

export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }

  // Whether the same request may well succeed in a moment: a restart, a full queue, a lost network.
  get passes() {
    return this.status === 0 || this.status === 429 || this.status >= 500;
  }
}

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const FIRST_WAIT_MS = 500;
const LONGEST_WAIT_MS = 10_000;

// What `look` gives, tried again with growing pauses while the server is away.
export async function persistently(look, waiting = () => {}) {
  for (let wait = FIRST_WAIT_MS; ; wait = Math.min(2 * wait, LONGEST_WAIT_MS)) {
    try {
      return await look();
    } catch (error) {
      if (!(error instanceof Refused) || !error.passes) throw error;
      waiting(error);
      await pause(wait);
    }
  }
}

let askForToken = null;

export function onTokenNeeded(ask) {
  askForToken = ask;
}

async function call(method, path, { body, json, raw = false } = {}) {
  const options = { method, credentials: "same-origin" };
  if (json !== undefined) {
    options.body = JSON.stringify(json);
    options.headers = { "content-type": "application/json" };
  } else if (body !== undefined) {
    options.body = body;
  }
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Refused("The server cannot be reached.", 0);
  }
  if (answer.status === 401 && askForToken && path !== "/v1/session") {
    await askForToken();
    return call(method, path, { body, json, raw });
  }
  if (!answer.ok) {
    let message = `The server answered ${answer.status}.`;
    try {
      message = (await answer.json()).error.message;
    } catch {
      // Not one of the server's own answers: the status must do.
    }
    throw new Refused(message, answer.status);
  }
  if (answer.status === 204) return null;
  return raw ? answer : answer.json();
}

const part = encodeURIComponent;

function form(fields, files) {
  const data = new FormData();
  for (const [name, value] of Object.entries(fields)) {
    if (value !== "" && value !== undefined) data.append(name, String(value));
  }
  for (const [name, file] of files) data.append(name, file, file.name);
  return data;
}

export const api = {
  server: () => call("GET", "/v1/server"),
  leave: () => call("DELETE", "/v1/session"),
  sample: async (name) => {
    const sound = await (await call("GET", `/v1/samples/${part(name)}`, { raw: true })).blob();
    return new File([sound], `sample_${name}.wav`, { type: "audio/wav" });
  },
  enter: (token) => call("POST", "/v1/session", { json: { token } }),
  submit: (fields, sources, references) =>
    call("POST", "/v1/jobs", {
      body: form(fields, [
        ...sources.map((file) => ["source", file]),
        ...references.map((file) => ["reference", file]),
      ]),
    }),
  job: (id) => call("GET", `/v1/jobs/${part(id)}`),
  cancel: (id) => call("POST", `/v1/jobs/${part(id)}/cancel`),
  remove: (id) => call("DELETE", `/v1/jobs/${part(id)}`),
  sound: async (id, index) =>
    (await call("GET", `/v1/jobs/${part(id)}/results/${index}`, { raw: true })).blob(),
  resultUrl: (id, index) => `/v1/jobs/${part(id)}/` + (index === undefined ? "result" : `results/${index}`),
  voices: async () => (await call("GET", "/v1/voices")).voices,
  enrol: (name, references, consent) =>
    call("POST", "/v1/voices", { body: form({ name, consent, wait: false }, references.map((f) => ["reference", f])) }),
  renameVoice: (name, to) => call("PATCH", `/v1/voices/${part(name)}`, { json: { name: to } }),
  removeVoice: (name) => call("DELETE", `/v1/voices/${part(name)}`),
  voiceSound: async (name) => (await call("GET", `/v1/voices/${part(name)}/sound`, { raw: true })).blob(),
  voiceUrl: (name) => `/v1/voices/${part(name)}/file`,
  importVoice: (file) => call("POST", "/v1/voices/import", { body: form({}, [["file", file]]) }),
  models: async () => (await call("GET", "/v1/models")).models,
  changeModel: (name, version, action) =>
    call("POST", `/v1/models/${part(name)}/${action}?version=${part(version)}`),
};
