// The page: what is chosen, what runs, what came out.

import { Refused, api, onTokenNeeded, persistently } from "./api.js";
import { Recorder } from "./audio.js";
import { openLive } from "./live.js";
import * as originals from "./originals.js";
import { $, account, drawAll, figures, make, say, showItems, showModels, showSound, showVoices, time } from "./views.js";

const HISTORY = "auto_voice.history";
const POLL_MS = 300;
const HISTORY_POLL_MS = 3000;
const HISTORY_LENGTH = 30;
const finished = (job) => ["done", "failed", "cancelled"].includes(job.state);
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

let server = null;
let running = null;
const sounds = new Map();

// Tabs

const tabs = [...document.querySelectorAll("[role=tab]")];

async function openTab(tab) {
  for (const other of tabs) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", chosen);
    other.tabIndex = chosen ? 0 : -1;
    $(other.getAttribute("aria-controls")).hidden = !chosen;
  }
  if (tab.id === "tab-voices") await refreshVoices();
  if (tab.id === "tab-live") {
    await refreshVoices();
    await openLive(voices);
  }
  if (tab.id === "tab-models") await refreshModels();
}

tabs.forEach((tab, index) => {
  tab.onclick = () => openTab(tab);
  tab.onkeydown = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const goal = event.key === "Home" ? 0 : event.key === "End" ? tabs.length - 1 : step === undefined ? -1 : (index + step + tabs.length) % tabs.length;
    if (goal < 0) return;
    event.preventDefault();
    tabs[goal].focus();
    openTab(tabs[goal]);
  };
});

// Choosing recordings

const player = new Audio();
let playing = null;

// Plays what `load` gives, or stops it if it plays already.
async function preview(load, button) {
  const again = playing === button;
  player.pause();
  if (playing) playing.textContent = "Play";
  playing = null;
  if (again) return;
  const sound = await load();
  if (player.src) URL.revokeObjectURL(player.src);
  player.src = URL.createObjectURL(sound);
  const over = () => {
    button.textContent = "Play";
    if (playing === button) playing = null;
  };
  player.onended = over;
  player.onerror = over;
  playing = button;
  button.textContent = "Stop";
  player.play().catch(over);
}

// One sound at a time.
document.addEventListener("play", (event) => {
  for (const other of document.querySelectorAll("audio")) if (other !== event.target) other.pause();
}, true);

function picker(name, changed) {
  const files = [];
  const list = $(`${name}-list`);
  const drop = $(`${name}-drop`);
  const input = $(`${name}-file`);
  const record = $(`${name}-record`);
  let recorder = null;
  let ticking = null;

  const show = () => {
    list.replaceChildren(
      ...files.map((file, index) => {
        const remove = make("button", { type: "button", className: "small", textContent: "Remove" });
        remove.setAttribute("aria-label", `Remove ${file.name}`);
        remove.onclick = () => {
          files.splice(index, 1);
          show();
          record.focus();
        };
        const listen = make("button", { type: "button", className: "small", textContent: "Play" });
        listen.setAttribute("aria-label", `Play ${file.name}`);
        listen.onclick = () => preview(() => file, listen);
        const size = make("span", { className: "hint", textContent: `${Math.max(1, Math.round(file.size / 1000))} kB` });
        return make("li", {}, make("span", { className: "name", textContent: file.name, title: file.name }), size, listen, remove);
      }),
    );
    changed(files);
  };
  const add = (chosen) => {
    say($("error"), null);
    files.push(...chosen);
    show();
  };
  input.onchange = () => {
    add([...input.files]);
    input.value = "";
  };
  drop.ondragover = (event) => {
    event.preventDefault();
    drop.classList.add("over");
  };
  drop.ondragleave = () => drop.classList.remove("over");
  drop.ondrop = (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    add([...event.dataTransfer.files]);
  };
  const label = record.querySelector(".text");
  record.onclick = async () => {
    try {
      if (recorder) {
        clearInterval(ticking);
        const done = recorder;
        recorder = null;
        record.classList.remove("on");
        label.textContent = "Record";
        files.push(await done.stop(`recording ${new Date().toTimeString().slice(0, 8).replaceAll(":", ".")}.wav`));
        show();
        return;
      }
      const begun = new Recorder();
      await begun.start();
      recorder = begun;
      record.classList.add("on");
      const tick = () => (label.textContent = `Stop (${time(begun.seconds)})`);
      tick();
      ticking = setInterval(tick, 200);
    } catch (error) {
      const blocked = !navigator.mediaDevices || error.name === "NotAllowedError";
      say($("error"), blocked ? "The browser does not let this page use the microphone; allow it, or choose a file." : error);
    }
  };
  return { files, add };
}

const { files: sources, add: addSources } = picker("source", () => {});
const { files: references, add: addReferences } = picker("reference", (files) => {
  $("keep-part").hidden = !files.length;
  say($("enrol-error"), null);
});

// A visitor with nothing at hand

$("try").onclick = async () => {
  $("try").disabled = true;
  $("try-status").textContent = "Fetching the samples…";
  say($("error"), null);
  try {
    const [recording, voice] = await Promise.all([api.sample("recording"), api.sample("voice")]);
    sources.length = references.length = 0;
    chooseVoice("");
    addSources([recording]);
    addReferences([voice]);
    $("try-status").textContent = "Both are filled in: listen to them, then press Convert.";
    $("convert").focus({ preventScroll: true });
  } catch (error) {
    $("try-status").textContent = "";
    say($("error"), error);
  } finally {
    $("try").disabled = false;
  }
};

document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => event.preventDefault());

// Voices

let voices = [];

async function refreshVoices(choose) {
  const use = (name) => {
    chooseVoice(name);
    openTab($("tab-convert"));
    $("voice").focus();
  };
  const listen = (name, button) => preview(() => api.voiceSound(name), button);
  voices = await showVoices($("voices"), $("voices-error"), { use, listen, changed: () => refreshVoices() });
  const before = choose ?? $("voice").value;
  const fresh = make("option", { value: "", textContent: "From recordings…" });
  $("voice").replaceChildren(fresh, ...voices.map((v) => make("option", { value: v.name, textContent: v.name })));
  chooseVoice(voices.some((voice) => voice.name === before) ? before : "");
}

function chooseVoice(name) {
  $("voice").value = name;
  $("reference-part").hidden = name !== "";
  $("voice-listen").hidden = !voices.find((voice) => voice.name === name)?.has_recording;
}

$("voice").onchange = () => {
  chooseVoice($("voice").value);
  $("voice-notes").replaceChildren();
};

$("voice-listen").onclick = () =>
  preview(() => api.voiceSound($("voice").value), $("voice-listen")).catch((error) => say($("error"), error));

$("new-voice").onclick = () => {
  chooseVoice("");
  openTab($("tab-convert"));
  $("reference-record").focus();
};

let enrolling = null;

function enrolBusy(on) {
  $("enrol").hidden = on;
  $("enrol-cancel").hidden = $("enrol-progress").hidden = !on;
  $("enrol-cancel").disabled = false;
  $("enrol-progress").removeAttribute("value");
  if (!on) enrolling = null;
}

$("enrol").onclick = async () => {
  const name = $("voice-name").value.trim();
  const problem = name ? tooLarge(references) : "Give the voice a name to keep it.";
  say($("enrol-error"), problem);
  if (problem) return $("voice-name").focus();
  enrolBusy(true);
  $("enrol-status").textContent = "Sending…";
  try {
    let job = await api.enrol(name, references, $("voice-consent").value.trim());
    enrolling = job.id;
    while (!finished(job)) {
      if (job.progress > 0) $("enrol-progress").value = job.progress;
      $("enrol-status").textContent = progressText(job, "Learning the voice");
      await pause(POLL_MS);
      job = await persistently(() => api.job(job.id), away($("enrol-status")));
    }
    $("enrol-status").textContent = job.state === "cancelled" ? "Cancelled; the voice was not kept." : "";
    const [item] = job.items;
    if (item.error) throw new Refused(item.error.message, item.error.status);
    if (item.result) {
      await refreshVoices(item.result.name);
      showKept(item.result);
      $("voice-name").value = $("voice-consent").value = "";
    }
  } catch (error) {
    $("enrol-status").textContent = "";
    say($("enrol-error"), error);
    $("enrol-error").scrollIntoView({ block: "nearest" });
  } finally {
    enrolBusy(false);
  }
};

function showKept(voice) {
  const line = (className, textContent) => make("p", { className, textContent });
  $("voice-notes").replaceChildren(
    line("good", `Kept: ${time(voice.speech_seconds)} of speech.`),
    ...voice.notes.map((note) => line("warning", note)),
    ...voice.remarks.map((remark) => line("hint", remark)),
  );
}

$("enrol-cancel").onclick = async () => {
  $("enrol-cancel").disabled = true;
  if (enrolling) await api.cancel(enrolling).catch((error) => say($("enrol-error"), error));
};

$("import-file").onchange = async () => {
  try {
    say($("voices-error"), null);
    await api.importVoice($("import-file").files[0]);
    await refreshVoices();
  } catch (error) {
    say($("voices-error"), error);
  }
  $("import-file").value = "";
};

async function refreshModels() {
  $("models-hint").textContent = server.may_change_models
    ? "Fetch puts a model on the server's disk, Load into its memory."
    : "To change models here, start the server with a token; or use “autovoice models” on its machine.";
  await showModels($("models"), $("models-error"), server.may_change_models, refreshModels);
}

// Options

const shown = {
  semitones: (v) => (v > 0 ? `+${v}` : `${v}`),
  formants: (v) => (v > 0 ? `+${v}` : `${v}`),
  strength: (v) => `${Math.round(100 * v)} %`,
  pitch_range: (v) => `${Math.round(100 * v)} %`,
  breathiness: (v) => `${Math.round(100 * v)} %`,
  denoise_db: (v) => `${v} dB`,
};
for (const [name, text] of Object.entries(shown)) {
  const update = () => ($(`${name}-out`).textContent = text(Number($(name).value)));
  $(name).addEventListener("input", update);
  update();
}

function options() {
  const fields = { voice: $("voice").value, format: $("format").value };
  for (const name of Object.keys(shown)) fields[name] = $(name).value;
  for (const name of ["keep_pitch", "singing", "trim", "measure"]) fields[name] = $(name).checked;
  return fields;
}

// Converting

$("convert-form").onsubmit = async (event) => {
  event.preventDefault();
  const problem = !sources.length
    ? "Choose, drop or record what shall be said."
    : !$("voice").value && !references.length
      ? "Choose a voice, or a recording of one."
      : tooLarge([...sources, ...references]);
  say($("error"), problem);
  if (problem || running) return;
  const files = [...sources];
  busy(true, "Sending…");
  let ended = "";
  try {
    const job = await api.submit(options(), files, $("voice").value ? [] : references);
    await originals.keep(job.id, files);
    remember({ id: job.id, name: files.map((file) => file.name).join(", "), voice: $("voice").value || references[0].name, when: Date.now(), state: job.state });
    ended = await follow(job);
  } catch (error) {
    say($("error"), error);
  } finally {
    busy(false, ended);
  }
};

// What is too large is refused by the server before it is read, which a browser shows as a broken
// connection.
function tooLarge(files) {
  const size = files.reduce((sum, file) => sum + file.size, 0) / 1e6;
  const most = server.limits.upload_mb;
  return size > most ? `These files have ${Math.round(size)} MB and the server takes ${most} MB at once; send fewer, or FLAC or MP3.` : null;
}

$("cancel").onclick = async () => {
  $("cancel").disabled = true;
  try {
    await api.cancel(running);
  } catch (error) {
    say($("error"), error);
  }
};

function busy(on, text = "") {
  $("convert").disabled = on;
  $("progress").hidden = !on;
  $("progress").removeAttribute("value");
  $("cancel").hidden = true;
  $("cancel").disabled = false;
  $("status").textContent = text;
  if (!on) running = null;
}

async function follow(job) {
  running = job.id;
  $("cancel").hidden = false;
  let shownState = "";
  while (!finished(job)) {
    if (job.state !== shownState) remember({ id: job.id, state: (shownState = job.state) });
    // A short recording is one piece: nothing is known of its progress until it is done.
    if (job.progress > 0) $("progress").value = job.progress;
    else $("progress").removeAttribute("value");
    $("status").textContent = progressText(job, "Converting");
    await pause(POLL_MS);
    job = await persistently(() => api.job(job.id), away($("status")));
  }
  remember({ id: job.id, state: job.state });
  if (job.state === "cancelled") return "Cancelled.";
  await showJob(job);
  return "";
}

// Says in `place` that the server is away, and that the page waits for it.
const away = (place) => (error) => (place.textContent = `${error.message} Trying again…`);

function progressText(job, doing) {
  const share = job.progress > 0 ? `${Math.round(100 * job.progress)} %` : "";
  if (job.state === "queued") return share ? `Waiting at ${share}…` : "Waiting…";
  const spent = job.started ? Math.max(0, (Date.now() - Date.parse(job.started)) / 1000) : 0;
  return `${doing}… ${share || (spent >= 1 ? `${Math.floor(spent)} s` : "")}`;
}

async function showJob(job) {
  const several = job.items.length > 1;
  const failed = job.items.filter((item) => item.error);
  const told = several ? [] : failed.map((item) => `${item.name}: ${item.error.message}`);
  say($("error"), told.length ? told.join(" · ") : null);
  const first = job.items.find((one) => one.state === "done");
  $("result").hidden = !first && !several;
  if ($("result").hidden) return;
  $("items").hidden = !several;
  $("result-title").textContent = several ? `${job.items.length} recordings` : first.result.name;
  $("download").hidden = !first;
  if (several) {
    const done = job.items.filter((item) => item.state === "done").length;
    $("download").href = api.resultUrl(job.id);
    $("download").download = "converted.zip";
    $("download").textContent = `Download all ${done}`;
    showItems($("items"), job, (item) => showItem(job, item, several));
  }
  if (first) await showItem(job, first, several);
  else showNoItem();
  $("result").focus({ preventScroll: true });
  $("result").scrollIntoView({ block: "nearest", behavior: "smooth" });
}

function showNoItem() {
  $("figures").replaceChildren();
  $("item-title").hidden = $("before").hidden = $("after").hidden = $("account-part").hidden = true;
}

async function showItem(job, item, several) {
  const made = await api.sound(job.id, item.index);
  for (const row of $("items").children) row.toggleAttribute("aria-current", Number(row.dataset.index) === item.index);
  $("item-title").hidden = !several;
  $("item-title").textContent = item.result.name;
  if (!several) {
    $("download").href = URL.createObjectURL(made);
    $("download").download = item.result.name;
    $("download").textContent = "Download";
  }
  $("figures").replaceChildren(...figures(item.result));
  $("account").replaceChildren(...account(item.result));
  $("account-part").hidden = false;
  sounds.clear();
  const original = (await originals.of(job.id))?.[item.index];
  $("before").hidden = true;
  if (original) await showSound($("before"), "Before", original, sounds);
  await showSound($("after"), "After", made, sounds);
  if (sounds.size) drawAll(sounds);
}

let resizing = null;
new ResizeObserver(() => {
  clearTimeout(resizing);
  resizing = setTimeout(() => sounds.size && drawAll(sounds), 150);
}).observe($("result"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => sounds.size && drawAll(sounds));

// History

function past() {
  try {
    return JSON.parse(localStorage.getItem(HISTORY)) ?? [];
  } catch {
    return [];
  }
}

function remember(entry) {
  const all = past();
  const known = all.find((one) => one.id === entry.id);
  if (known) Object.assign(known, entry);
  else all.unshift(entry);
  for (const old of all.slice(HISTORY_LENGTH)) originals.drop(old.id);
  localStorage.setItem(HISTORY, JSON.stringify(all.slice(0, HISTORY_LENGTH)));
  showHistory();
}

function drop(id) {
  originals.drop(id);
  localStorage.setItem(HISTORY, JSON.stringify(past().filter((one) => one.id !== id)));
  showHistory();
}

function showHistory() {
  const all = past();
  $("history").replaceChildren(
    ...all.map((entry) => {
      const kind = { done: "good", failed: "bad" }[entry.state] ?? "";
      const name = make("span", { className: "name", textContent: entry.name });
      const badge = make("span", { className: `badge ${kind}`, textContent: entry.state });
      const about = make("small", { textContent: `as ${entry.voice} · ${new Date(entry.when).toLocaleString()}` });
      const open = make("button", { type: "button", className: "small", textContent: "Open", disabled: entry.state !== "done" });
      open.setAttribute("aria-label", `Open ${entry.name}`);
      open.onclick = () => reopen(entry);
      const remove = make("button", { type: "button", className: "small danger", textContent: "Delete" });
      remove.setAttribute("aria-label", `Delete ${entry.name}`);
      remove.onclick = async () => {
        await api.remove(entry.id).catch(() => {});
        drop(entry.id);
      };
      const what = make("div", { className: "what" }, name, badge, about);
      return make("li", {}, make("div", { className: "entry" }, what, make("div", { className: "do" }, open, remove)));
    }),
  );
  $("forget").hidden = !all.length;
  if (!all.length) $("history").append(make("li", { className: "empty", textContent: "Nothing yet." }));
}

$("forget").onclick = () => {
  past().forEach((entry) => originals.drop(entry.id));
  localStorage.removeItem(HISTORY);
  showHistory();
};

async function reopen(entry) {
  try {
    await showJob(await api.job(entry.id));
  } catch (error) {
    if (error instanceof Refused && error.status === 404) {
      say($("error"), "This result has expired.");
      remember({ id: entry.id, state: "expired" });
    } else say($("error"), error);
  }
}

// Jobs outlive this page and the server: the newest that runs is followed, the others are looked
// after until they are finished, however often the server is away.
const isOpen = (entry) => ["queued", "running"].includes(entry.state);

async function resume() {
  const entry = past().find(isOpen);
  if (entry) {
    busy(true, "Waiting…");
    let ended = "";
    try {
      const job = await persistently(() => api.job(entry.id), away($("status")));
      if (finished(job)) remember({ id: job.id, state: job.state });
      else ended = await follow(job);
    } catch (error) {
      lost(entry, error);
    } finally {
      busy(false, ended);
    }
  }
}

async function lookAfterHistory() {
  for (;;) {
    await pause(HISTORY_POLL_MS);
    for (const entry of past().filter((one) => isOpen(one) && one.id !== running)) {
      try {
        const job = await persistently(() => api.job(entry.id));
        if (job.state !== entry.state) remember({ id: job.id, state: job.state });
      } catch (error) {
        lost(entry, error);
      }
    }
  }
}

function lost(entry, error) {
  if (error instanceof Refused && error.status === 404) remember({ id: entry.id, state: "expired" });
  else say($("error"), error);
}

// Token

let entering = null;
onTokenNeeded(() => {
  entering ??= new Promise((resolve) => {
    const dialog = $("token-dialog");
    dialog.oncancel = (event) => event.preventDefault();
    $("token-form").onsubmit = async (event) => {
      event.preventDefault();
      try {
        await api.enter($("token").value);
        $("token").value = "";
        dialog.close();
        entering = null;
        resolve();
      } catch (error) {
        say($("token-error"), error);
      }
    };
    dialog.showModal();
  });
  return entering;
});

$("leave").onclick = async () => {
  await api.leave().catch(() => {});
  location.reload();
};

// Start

async function start() {
  showHistory();
  try {
    server = await persistently(api.server, (error) => say($("error"), `${error.message} Trying again…`));
    say($("error"), null);
    $("leave").hidden = !server.has_session;
    $("mock-banner").hidden = !server.mock;
    $("format").replaceChildren(...server.formats.map((f) => make("option", { value: f, textContent: f })));
    const { longest_seconds: longest, upload_mb: most, keep_hours: hours } = server.limits;
    $("source-hint").textContent = `Speech in any usual format, up to ${Math.round(longest / 60)} minutes and ${most} MB. Several files are converted one after the other. The server keeps results for ${hours} hours.`;
    await refreshVoices();
    document.body.dataset.ready = "yes";
    await resume();
    await lookAfterHistory();
  } catch (error) {
    say($("error"), error);
  }
}

start();
