// The server's API: every answer is JSON or a file, every refusal one sentence.

export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
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
    throw new Refused("The server cannot be reached; is it still running?", 0);
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
  resultUrl: (id) => `/v1/jobs/${part(id)}/result`,
  voices: async () => (await call("GET", "/v1/voices")).voices,
  enrol: (name, references, consent) =>
    call("POST", "/v1/voices", { body: form({ name, consent }, references.map((f) => ["reference", f])) }),
  renameVoice: (name, to) => call("PATCH", `/v1/voices/${part(name)}`, { json: { name: to } }),
  removeVoice: (name) => call("DELETE", `/v1/voices/${part(name)}`),
  voiceUrl: (name) => `/v1/voices/${part(name)}/file`,
  importVoice: (file) => call("POST", "/v1/voices/import", { body: form({}, [["file", file]]) }),
  models: async () => (await call("GET", "/v1/models")).models,
  changeModel: (name, version, action) =>
    call("POST", `/v1/models/${part(name)}/${action}?version=${part(version)}`),
};
