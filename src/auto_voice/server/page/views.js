// Pieces of the page that are made from data; text only ever enters as text.

import { api } from "./api.js";
import { decode, draw } from "./audio.js";

export const $ = (id) => document.getElementById(id);

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export function say(place, error) {
  place.textContent = error ? error.message || String(error) : "";
  place.hidden = !error;
}

export const time = (seconds) =>
  seconds >= 60
    ? `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")} min`
    : `${seconds.toFixed(1)} s`;

const percent = (value) => `${Math.round(100 * value)} %`;

// A recording with its picture, which is drawn on the time axis that all share.
export async function showSound(place, title, blob, sounds) {
  const audio = make("audio", { controls: true, src: URL.createObjectURL(blob) });
  audio.setAttribute("aria-label", title);
  const length = make("span");
  const canvas = make("canvas");
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `Waveform and spectrogram: ${title}`);
  const cursor = make("div", { className: "cursor", hidden: true });
  const picture = make("div", { className: "picture" }, canvas, cursor);
  const old = place.querySelector("audio");
  if (old) URL.revokeObjectURL(old.src);
  place.replaceChildren(make("figcaption", {}, title, length), picture, audio);
  place.hidden = false;
  let buffer;
  try {
    buffer = await decode(blob);
  } catch {
    picture.hidden = true; // a format that this browser does not play
    return;
  }
  length.textContent = time(buffer.duration);
  sounds.set(place, { canvas, buffer });
  const longest = () => Math.max(...[...sounds.values()].map((sound) => sound.buffer.duration));
  picture.onclick = (event) => {
    const share = event.offsetX / picture.clientWidth;
    audio.currentTime = Math.min(buffer.duration, share * longest());
    audio.play();
  };
  audio.ontimeupdate = () => {
    cursor.hidden = false;
    cursor.style.left = `${(100 * audio.currentTime) / longest()}%`;
  };
}

export function drawAll(sounds) {
  const longest = Math.max(...[...sounds.values()].map((sound) => sound.buffer.duration));
  for (const { canvas, buffer } of sounds.values()) draw(canvas, buffer, longest);
}

export function figures(result) {
  const { summary, figures: measured } = result;
  const found = [];
  const add = (value, ...texts) => found.push(make("div", { className: "figure" }, make("b", { textContent: value }), ...texts.map((text) => make("span", { textContent: text }))));
  if (measured) {
    add(measured.similarity.toFixed(2), "similarity to the voice", `${measured.similarity_before.toFixed(2)} before · 1 is the same`);
    if (measured.words_kept !== undefined) add(percent(measured.words_kept), "of the words kept", "by a speech recogniser");
  }
  const sign = summary.semitones > 0 ? "+" : summary.semitones < 0 ? "−" : "";
  add(`${sign}${Math.abs(summary.semitones).toFixed(1)}`, "semitones moved");
  // What was stopped and taken up again knows the time of its end only.
  const spent = summary.seconds_per_second * summary.seconds;
  if (!result.resumed) add(time(spent), "of work", `for ${time(summary.seconds)} of sound`);
  return found;
}

// The recordings of a batch: each with its state, and what can be done with it.
export function showItems(place, job, show) {
  place.replaceChildren(
    ...job.items.map((item) => {
      const kind = { done: "good", failed: "bad" }[item.state] ?? "";
      const what = make("div", { className: "what" }, make("span", { className: "name", textContent: item.name }), make("span", { className: `badge ${kind}`, textContent: item.state }));
      if (item.error) what.append(make("small", { textContent: item.error.message }));
      const todo = make("div", { className: "do" });
      if (item.state === "done") {
        const open = button("Show", () => show(item));
        open.setAttribute("aria-label", `Show ${item.name}`);
        const save = make("a", { className: "button small", textContent: "Download", href: api.resultUrl(job.id, item.index), download: item.result.name });
        save.setAttribute("aria-label", `Download ${item.result.name}`);
        todo.append(open, save);
      }
      const row = make("li", {}, make("div", { className: "entry" }, what, todo));
      row.dataset.index = item.index;
      return row;
    }),
  );
}

export function account(result) {
  const { summary, figures: measured } = result;
  const rows = Object.entries(summary.models).map(([stage, model]) => [stage, model]);
  rows.push(["sound", `${time(summary.seconds)} at ${summary.sample_rate} Hz, ${Math.round(result.bytes / 1000)} kB`]);
  summary.notes.forEach((note) => rows.push(["note", note]));
  if (measured?.note) rows.push(["note", measured.note]);
  return rows.flatMap(([name, text]) => [make("dt", { textContent: name }), make("dd", { textContent: text })]);
}

function button(text, action, extra = "") {
  return make("button", { type: "button", className: `small ${extra}`, textContent: text, onclick: action });
}

export async function showVoices(place, problem, { use, listen, changed }) {
  const told = (action) => async (event) => {
    try {
      say(problem, null);
      await action(event);
    } catch (error) {
      say(problem, error);
    }
  };
  const guarded = (action) =>
    told(async () => {
      await action();
      await changed();
    });
  const voices = await api.voices();
  place.replaceChildren(
    ...voices.map((voice) => {
      const facts = [`${time(voice.speech_seconds)} of speech`];
      if (voice.pitch_hz) facts.push(`pitch ${Math.round(voice.pitch_hz)} Hz`);
      if (voice.quality?.snr_db) facts.push(`${Math.round(voice.quality.snr_db)} dB above the noise`);
      facts.push(voice.encoder);
      if (voice.consent) facts.push(`agreed: ${voice.consent}`);
      const about = make("small", { textContent: facts.join(" · ") });
      const what = make("div", { className: "what" }, make("span", { className: "name", textContent: voice.name }), about);
      const rename = guarded(async () => {
        const name = prompt("New name of the voice", voice.name);
        if (name && name !== voice.name) await api.renameVoice(voice.name, name);
      });
      const remove = guarded(async () => {
        if (confirm(`Delete the voice ${voice.name}?`)) await api.removeVoice(voice.name);
      });
      const save = make("a", { className: "button small", textContent: "Export", href: api.voiceUrl(voice.name), download: `${voice.name}.safetensors` });
      const todo = make("div", { className: "do" }, button("Use", () => use(voice.name)));
      if (voice.has_recording) {
        const play = button("Play", told((event) => listen(voice.name, event.target)));
        play.setAttribute("aria-label", `Play the voice ${voice.name}`);
        todo.append(play);
      }
      todo.append(button("Rename", rename), save, button("Delete", remove, "danger"));
      const notes = [
        ...voice.notes.map((note) => make("p", { className: "warning", textContent: note })),
        ...voice.remarks.map((remark) => make("p", { className: "hint", textContent: remark })),
      ];
      return make("li", {}, make("div", { className: "entry" }, what, todo), ...notes);
    }),
  );
  if (!voices.length) place.append(make("li", { className: "empty", textContent: "No voice is kept yet. Keep one in the tab Convert, or import one." }));
  return voices;
}

export async function showModels(place, problem, mayChange, changed) {
  const models = await api.models();
  const act = (model, action) => async (event) => {
    event.target.disabled = true;
    try {
      say(problem, null);
      let job = await api.changeModel(model.name, model.version, action);
      while (job && !["done", "failed", "cancelled"].includes(job.state)) {
        await new Promise((resolve) => setTimeout(resolve, 500));
        job = await api.job(job.id);
      }
      if (job?.items[0].error) throw new Error(job.items[0].error.message);
      await changed();
    } catch (error) {
      say(problem, error);
    } finally {
      event.target.disabled = false;
    }
  };
  place.replaceChildren(
    ...models.map((model) => {
      const size = model.bytes ? `${(model.bytes / 1e6).toFixed(1)} MB` : "no files";
      const badge = (text, kind) => make("span", { className: `badge ${kind}`, textContent: text });
      const name = make("span", { className: "name", textContent: `${model.name}@${model.version}` });
      const what = make("div", { className: "what" }, name, badge(model.installed ? "installed" : "not installed", model.installed ? "good" : ""));
      if (model.loaded) what.append(badge("in memory", "good"));
      what.append(make("small", { textContent: `${model.kind} · ${size} · ${model.licence} · ${model.description}` }));
      const todo = make("div", { className: "do" });
      if (mayChange) {
        if (!model.installed) todo.append(button("Fetch", act(model, "pull")));
        todo.append(model.loaded ? button("Unload", act(model, "unload")) : button("Load", act(model, "warm")));
      }
      const row = make("li", {}, make("div", { className: "entry" }, what, todo));
      if (model.problem) row.append(make("p", { className: "warning", textContent: model.problem }));
      return row;
    }),
  );
}
