// Sound in the browser: recording it into WAV, and pictures of it.

let context = null;

function audioContext() {
  context ??= new AudioContext();
  return context;
}

export async function decode(blob) {
  return audioContext().decodeAudioData(await blob.arrayBuffer());
}

function mono(buffer) {
  const samples = new Float32Array(buffer.length);
  for (let channel = 0; channel < buffer.numberOfChannels; channel++) {
    const data = buffer.getChannelData(channel);
    for (let i = 0; i < samples.length; i++) samples[i] += data[i] / buffer.numberOfChannels;
  }
  return samples;
}

export const PCM = 32767;

export function toPcm(samples) {
  return Int16Array.from(samples, (value) => Math.round(PCM * Math.max(-1, Math.min(1, value))));
}

// Channels, each a list of parts of 16-bit samples, cut to the shortest, as a WAV file.
export function wavOf(channels, sampleRate, name) {
  const frames = Math.min(...channels.map((parts) => parts.reduce((sum, part) => sum + part.length, 0)));
  const wide = 2 * channels.length;
  const view = new DataView(new ArrayBuffer(44 + wide * frames));
  const text = (at, word) => [...word].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
  text(0, "RIFF");
  view.setUint32(4, 36 + wide * frames, true);
  text(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true);
  view.setUint16(22, channels.length, true);
  view.setUint32(24, sampleRate, true);
  view.setUint32(28, wide * sampleRate, true);
  view.setUint16(32, wide, true);
  view.setUint16(34, 16, true);
  text(36, "data");
  view.setUint32(40, wide * frames, true);
  channels.forEach((parts, channel) => {
    let frame = 0;
    for (const part of parts) {
      for (let i = 0; i < part.length && frame < frames; i++, frame++) {
        view.setInt16(44 + wide * frame + 2 * channel, part[i], true);
      }
    }
  });
  return new File([view], name, { type: "audio/wav" });
}

const toWav = (buffer, name) => wavOf([[toPcm(mono(buffer))]], buffer.sampleRate, name);

export class Recorder {
  async start() {
    this.stream = await navigator.mediaDevices.getUserMedia({
      audio: { echoCancellation: false, noiseSuppression: false, autoGainControl: false },
    });
    this.chunks = [];
    this.recorder = new MediaRecorder(this.stream);
    this.recorder.ondataavailable = (event) => this.chunks.push(event.data);
    this.recorder.start();
    this.started = Date.now();
  }

  get seconds() {
    return (Date.now() - this.started) / 1000;
  }

  async stop(name) {
    const ended = new Promise((resolve) => (this.recorder.onstop = resolve));
    this.recorder.stop();
    await ended;
    this.stream.getTracks().forEach((track) => track.stop());
    return toWav(await decode(new Blob(this.chunks, { type: this.recorder.mimeType })), name);
  }
}

// Pictures

const STOPS = [
  [0, 0, 4], [40, 17, 89], [114, 31, 129], [182, 54, 121], [241, 96, 93], [254, 175, 119],
  [252, 253, 191],
];

function colour(value) {
  const at = Math.max(0, Math.min(0.9999, value)) * (STOPS.length - 1);
  const low = Math.floor(at);
  return STOPS[low].map((c, i) => c + (STOPS[low + 1][i] - c) * (at - low));
}

const COLOURS = Array.from({ length: 256 }, (_, i) => colour(i / 255));
const SIZE = 2048;
const HIGHEST_HZ = 8000;
const MARKS_HZ = [500, 1000, 2000, 4000];

// The mel scale: as even as hearing is, and fine where pitch is.
const mel = (hz) => Math.log1p(hz / 700);
const hertz = (value) => 700 * Math.expm1(value);

function fft(re, im) {
  const n = re.length;
  for (let i = 1, j = 0; i < n; i++) {
    let bit = n >> 1;
    for (; j & bit; bit >>= 1) j ^= bit;
    j ^= bit;
    if (i < j) [re[i], re[j], im[i], im[j]] = [re[j], re[i], im[j], im[i]];
  }
  for (let length = 2; length <= n; length <<= 1) {
    const angle = (-2 * Math.PI) / length;
    for (let k = 0; k < length / 2; k++) {
      const c = Math.cos(angle * k);
      const s = Math.sin(angle * k);
      for (let i = k; i < n; i += length) {
        const j = i + length / 2;
        const r = re[j] * c - im[j] * s;
        const m = re[j] * s + im[j] * c;
        re[j] = re[i] - r;
        im[j] = im[i] - m;
        re[i] += r;
        im[i] += m;
      }
    }
  }
}

// Decibels below the loudest, rows from low to high on the mel scale.
function spectrogram(samples, rate, columns, rows) {
  const hann = Float32Array.from({ length: SIZE }, (_, i) => 0.5 - 0.5 * Math.cos((2 * Math.PI * i) / SIZE));
  const edges = Array.from({ length: rows + 1 }, (_, r) => (hertz((mel(HIGHEST_HZ) * r) / rows) * SIZE) / rate);
  const image = new Float32Array(columns * rows);
  const power = new Float64Array(SIZE / 2 + 1);
  let loudest = -200;
  for (let x = 0; x < columns; x++) {
    const start = Math.round(((x + 0.5) / columns) * samples.length) - SIZE / 2;
    const re = new Float64Array(SIZE);
    const im = new Float64Array(SIZE);
    for (let i = 0; i < SIZE; i++) re[i] = (samples[start + i] ?? 0) * hann[i];
    fft(re, im);
    for (let b = 0; b < power.length; b++) power[b] = 10 * Math.log10(re[b] * re[b] + im[b] * im[b] + 1e-12);
    for (let r = 0; r < rows; r++) {
      // Between two bins a straight line, over several the loudest.
      const centre = Math.min(SIZE / 2 - 1, (edges[r] + edges[r + 1]) / 2);
      const below = Math.floor(centre);
      let level = power[below] + (power[below + 1] - power[below]) * (centre - below);
      for (let b = Math.ceil(edges[r]); b < edges[r + 1] && b <= SIZE / 2; b++) level = Math.max(level, power[b]);
      image[r * columns + x] = level;
      loudest = Math.max(loudest, level);
    }
  }
  return image.map((decibels) => decibels - loudest);
}

export function draw(canvas, buffer, seconds) {
  const ratio = window.devicePixelRatio || 1;
  const width = Math.max(1, Math.round(canvas.clientWidth * ratio));
  const height = Math.max(1, Math.round(canvas.clientHeight * ratio));
  canvas.width = width;
  canvas.height = height;
  const samples = mono(buffer);
  const used = Math.max(1, Math.round((width * buffer.duration) / seconds));
  const wave = Math.round(height * 0.28);
  const pen = canvas.getContext("2d");
  pen.fillStyle = getComputedStyle(canvas).getPropertyValue("--wave");
  for (let x = 0; x < used; x++) {
    const from = Math.floor((x / used) * samples.length);
    const to = Math.max(from + 1, Math.floor(((x + 1) / used) * samples.length));
    let low = 0;
    let high = 0;
    for (let i = from; i < to; i++) {
      low = Math.min(low, samples[i]);
      high = Math.max(high, samples[i]);
    }
    const top = (wave / 2) * (1 - high);
    pen.fillRect(x, top, 1, Math.max(1, (wave / 2) * (high - low)));
  }
  const rows = 96;
  const columns = Math.min(used, 900);
  const image = spectrogram(samples, buffer.sampleRate, columns, rows);
  const small = new OffscreenCanvas(columns, rows);
  const brush = small.getContext("2d");
  const pixels = brush.createImageData(columns, rows);
  for (let r = 0; r < rows; r++) {
    for (let x = 0; x < columns; x++) {
      const shade = COLOURS[Math.max(0, Math.min(255, Math.round((image[r * columns + x] / 75 + 1) * 255)))];
      pixels.data.set([...shade, 255], 4 * ((rows - 1 - r) * columns + x));
    }
  }
  brush.putImageData(pixels, 0, 0);
  pen.drawImage(small, 0, wave, used, height - wave);
  scales(pen, ratio, seconds, { width, height, top: wave });
}

// Frequencies at the left edge, seconds at the bottom: light on dark, whatever the theme.
function scales(pen, ratio, seconds, { width, height, top }) {
  const write = (text, x, y) => {
    pen.strokeText(text, x, y);
    pen.fillText(text, x, y);
  };
  pen.font = `${11 * ratio}px system-ui, sans-serif`;
  pen.fillStyle = "#fff";
  pen.strokeStyle = "rgb(0 0 0 / .65)";
  pen.lineWidth = 3 * ratio;
  pen.lineJoin = "round";
  pen.textBaseline = "middle";
  for (const hz of MARKS_HZ) {
    const y = height - (mel(hz) / mel(HIGHEST_HZ)) * (height - top);
    write(hz < 1000 ? `${hz} Hz` : `${hz / 1000} kHz`, 6 * ratio, y);
  }
  const most = Math.max(2, Math.floor(width / ratio / 80));
  const step = [0.5, 1, 2, 5, 10, 30, 60, 300, 600, 1800].find((each) => seconds / each <= most) ?? 3600;
  pen.textBaseline = "bottom";
  pen.textAlign = "center";
  for (let at = step; at < seconds - step / 4; at += step) {
    const text = step < 60 ? `${at} s` : `${at / 60} min`;
    write(text, (at / seconds) * width, height - 3 * ratio);
  }
}
