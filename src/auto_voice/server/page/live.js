// The Live tab: the microphone goes to the server, what comes back in another voice is played.

import { api } from "./api.js";
import { PCM, toPcm, wavOf } from "./audio.js";
import { $, make, say } from "./views.js";

// What lies in the connection at most; what cannot leave is left out, as it would only come late.
const MOST_WAITING_BYTES = 1 << 19;
const LOWEST_DB = -60;
// Longest recording of both sides, in seconds.
const LONGEST_SECONDS = 1800;

const decibels = (peak) => Math.max(LOWEST_DB, 20 * Math.log10(Math.max(peak, 1e-6)));

class Live {
  constructor(told, ended) {
    this.told = told;
    this.ended = ended;
    // Parts as they come and go, in 16 bits: half an hour of both sides takes 350 MB.
    this.sides = [[], []];
    this.kept = 0;
    this.recording = false;
  }

  async start(chosen) {
    try {
      return await this.open(chosen);
    } finally {
      // It may have been stopped meanwhile.
      if (this.over) this.release();
    }
  }

  async open({ voice, microphone, loudspeaker, controls }) {
    // A session that has ended asks for the token before the microphone is opened.
    await api.server();
    this.stream = await navigator.mediaDevices.getUserMedia({
      audio: {
        deviceId: microphone ? { exact: microphone } : undefined,
        channelCount: 1,
        echoCancellation: false,
        noiseSuppression: false,
        autoGainControl: false,
      },
    });
    this.context = new AudioContext({ latencyHint: "interactive" });
    if (loudspeaker && this.context.setSinkId) await this.context.setSinkId(loudspeaker);
    await this.context.audioWorklet.addModule("/page/worklet.js");
    const ready = await this.connect(voice, controls);
    this.node = new AudioWorkletNode(this.context, "exchange", {
      outputChannelCount: [1],
      channelCount: 1,
      channelCountMode: "explicit",
    });
    this.node.port.onmessage = ({ data }) => this.fromDevice(data);
    this.context.createMediaStreamSource(this.stream).connect(this.node);
    this.node.connect(this.context.destination);
    // A microphone that is unplugged ends it, too.
    this.stream.getTracks()[0].onended = () => this.stop("The microphone is gone.");
    await this.context.resume();
    return ready;
  }

  connect(voice, controls) {
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    this.socket = new WebSocket(`${scheme}://${location.host}/v1/live`);
    this.socket.binaryType = "arraybuffer";
    this.socket.onopen = () =>
      this.say({ voice, controls, sample_rate: this.context.sampleRate, format: "pcm16" });
    return new Promise((resolve, reject) => {
      this.socket.onmessage = ({ data }) => this.fromServer(data, resolve, reject);
      this.socket.onclose = () => {
        const error = new Error("The server ended the connection.");
        reject(error);
        this.stop(error);
      };
    });
  }

  say(message) {
    if (this.socket?.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(message));
  }

  fromServer(data, resolve, reject) {
    if (data instanceof ArrayBuffer) {
      const pcm = new Int16Array(data);
      this.keep(1, pcm);
      const result = Float32Array.from(pcm, (value) => value / PCM);
      this.node?.port.postMessage({ result });
      return;
    }
    const message = JSON.parse(data);
    if (message.type === "ready") resolve(message);
    if (message.type === "dropped") {
      this.node?.port.postMessage({ lost: message.samples });
      // So that both sides stay in step.
      this.keep(1, new Int16Array(message.samples));
      this.told({ lost: message.samples / this.context.sampleRate });
    }
    if (message.type === "error") {
      const error = new Error(message.message);
      reject(error);
      this.stop(error);
    }
  }

  fromDevice({ spoken, told }) {
    if (told) this.told(told);
    if (!spoken || this.socket.readyState !== WebSocket.OPEN) return;
    if (this.socket.bufferedAmount > MOST_WAITING_BYTES) {
      this.node.port.postMessage({ lost: spoken.length });
      this.told({ lost: spoken.length / this.context.sampleRate });
      return;
    }
    const pcm = toPcm(spoken);
    this.keep(0, pcm);
    this.socket.send(pcm.buffer);
  }

  keep(side, pcm) {
    if (!this.recording || this.kept >= LONGEST_SECONDS * this.context.sampleRate) return;
    this.sides[side].push(pcm);
    if (side === 0) this.kept += pcm.length;
  }

  bypass(bypassed) {
    this.node?.port.postMessage({ bypassed });
  }

  // What was recorded: what was spoken on the left, its result in step with it on the right.
  recorded(name) {
    return this.kept ? wavOf(this.sides, this.context.sampleRate, name) : null;
  }

  stop(error = null) {
    if (this.over) return;
    this.over = true;
    this.release();
    this.ended(error);
  }

  release() {
    this.socket?.close();
    this.node?.port.postMessage({ stop: true });
    this.stream?.getTracks().forEach((track) => track.stop());
    if (this.context?.state !== "closed") this.context?.close();
  }
}

// The tab

let live = null;
let lost = 0;

async function showDevices() {
  const devices = await (navigator.mediaDevices?.enumerateDevices() ?? []);
  for (const [id, kind, usual] of [
    ["live-microphone", "audioinput", "The usual microphone"],
    ["live-loudspeaker", "audiooutput", "The usual loudspeaker"],
  ]) {
    const chosen = $(id).value;
    const named = devices.filter((device) => device.kind === kind && device.deviceId && device.label);
    const options = named.filter((device) => device.deviceId !== "default");
    $(id).replaceChildren(
      make("option", { value: "", textContent: usual }),
      ...options.map((device) => make("option", { value: device.deviceId, textContent: device.label })),
    );
    if (options.some((device) => device.deviceId === chosen)) $(id).value = chosen;
  }
  $("live-loudspeaker-part").hidden = !("setSinkId" in AudioContext.prototype);
}

export async function openLive(voices) {
  const before = $("live-voice").value;
  $("live-voice").replaceChildren(...voices.map(({ name }) => make("option", { value: name, textContent: name })));
  if (voices.some(({ name }) => name === before)) $("live-voice").value = before;
  $("live-none").hidden = voices.length > 0;
  $("live-start").disabled = !voices.length;
  await showDevices();
}

function controls() {
  return { semitones: Number($("live-semitones").value) };
}

function show({ peaks, delay, dropouts, lost: more }) {
  if (more) {
    lost += more;
    $("live-lost").textContent = `${lost.toFixed(1)} s were left out, because the server or the network is too slow.`;
  }
  if (!peaks) return;
  $("live-in").value = decibels(peaks[0]);
  $("live-out").value = decibels(peaks[1]);
  if (delay === null) return;
  $("live-delay").textContent = `${Math.round(1000 * delay)} ms`;
  $("live-dropouts").textContent = dropouts;
}

function busy(on) {
  for (const id of ["live-microphone", "live-loudspeaker", "live-record"]) $(id).disabled = on;
  $("live-start").textContent = on ? "Stop" : "Start";
  $("live-start").classList.toggle("on", on);
  $("live-figures").hidden = !on;
}

function ended(error) {
  busy(false);
  say($("live-error"), error);
  $("live-status").textContent = "";
  const file = live?.recorded("live.wav");
  live = null;
  if (!file) return;
  const link = $("live-download");
  if (link.href) URL.revokeObjectURL(link.href);
  link.href = URL.createObjectURL(file);
  link.download = file.name;
  link.hidden = false;
}

$("live-start").onclick = async () => {
  if (live) return live.stop();
  say($("live-error"), navigator.mediaDevices ? null : "The browser gives the microphone only to pages of this machine or over https.");
  if (!navigator.mediaDevices) return;
  live = new Live(show, ended);
  lost = 0;
  $("live-lost").textContent = "";
  $("live-delay").textContent = "…";
  $("live-dropouts").textContent = "0";
  $("live-download").hidden = true;
  live.recording = $("live-record").checked;
  busy(true);
  $("live-status").textContent = "Opening the microphone…";
  const mine = live;
  try {
    const ready = await live.start({
      voice: $("live-voice").value,
      microphone: $("live-microphone").value,
      loudspeaker: $("live-loudspeaker").value,
      controls: controls(),
    });
    if (live !== mine) return;
    live.bypass($("live-bypass").checked);
    const least = Math.round(ready.latency_ms);
    $("live-status").textContent = `You are heard as ${$("live-voice").value}; the conversion itself takes ${least} ms and the time of computing.`;
    await showDevices();
  } catch (error) {
    const blocked = error.name === "NotAllowedError";
    mine.stop(blocked ? "The browser does not let this page use the microphone; allow it." : error);
  }
};

$("live-voice").onchange = () => live?.say({ voice: $("live-voice").value });
$("live-semitones").addEventListener("input", () => {
  const value = Number($("live-semitones").value);
  $("live-semitones-out").textContent = value > 0 ? `+${value}` : `${value}`;
});
$("live-semitones").addEventListener("change", () => live?.say({ controls: controls() }));
$("live-bypass").onchange = () => live?.bypass($("live-bypass").checked);
navigator.mediaDevices?.addEventListener("devicechange", showDevices);
