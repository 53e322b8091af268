// The audio thread of a live conversion: the microphone goes out, what comes back is played.

// Seconds of sound that go to the page at once, that are kept against a late block (half as much
// again after each drop-out, up to the second), that a cut fades over, and over which it is looked
// how much sound was never needed.
const SEND_SECONDS = 0.02;
const MARGIN_SECONDS = 0.04;
const MOST_MARGIN_SECONDS = 0.3;
const FADE_SECONDS = 0.005;
const LOOK_SECONDS = 3;
// Times a second that levels and delay are told, and seconds of the source that are kept for the
// bypass.
const TOLD_PER_SECOND = 10;
const KEPT_SECONDS = 8;

class Samples {
  constructor() {
    this.parts = [];
    this.length = 0;
    this.at = 0;
  }

  put(part) {
    this.parts.push(part);
    this.length += part.length;
  }

  next() {
    const value = this.parts[0][this.at++];
    this.length--;
    if (this.at === this.parts[0].length) {
      this.parts.shift();
      this.at = 0;
    }
    return value;
  }
}

class Exchange extends AudioWorkletProcessor {
  constructor() {
    super();
    this.sending = new Float32Array(Math.round(SEND_SECONDS * sampleRate));
    this.filled = 0;
    this.source = new Float32Array(Math.round(KEPT_SECONDS * sampleRate));
    this.ready = new Samples();
    // Samples that were spoken, those of them that were left out, and those whose result is played.
    this.spoken = this.lost = this.played = 0;
    this.margin = Math.round(MARGIN_SECONDS * sampleRate);
    this.waiting = true;
    this.started = false;
    this.bypassed = false;
    this.wet = 1;
    this.volume = 0;
    this.dropouts = 0;
    this.peaks = [0, 0];
    this.lowest = Infinity;
    this.looked = this.told = 0;
    this.running = true;
    this.port.onmessage = ({ data }) => this.hear(data);
  }

  hear({ result, bypassed, lost, stop }) {
    if (result) this.ready.put(result);
    if (bypassed !== undefined) this.bypassed = bypassed;
    if (lost) this.lost += lost;
    if (stop) this.running = false;
  }

  process(inputs, outputs) {
    const microphone = inputs[0][0];
    const out = outputs[0][0];
    for (let i = 0; i < out.length; i++) {
      const value = microphone ? microphone[i] : 0;
      this.speak(value);
      out[i] = this.heard();
      this.peaks[0] = Math.max(this.peaks[0], Math.abs(value));
      this.peaks[1] = Math.max(this.peaks[1], Math.abs(out[i]));
    }
    for (const channel of outputs[0].slice(1)) channel.set(out);
    this.look(out.length);
    return this.running;
  }

  speak(value) {
    this.source[this.spoken++ % this.source.length] = value;
    this.sending[this.filled++] = value;
    if (this.filled < this.sending.length) return;
    this.port.postMessage({ spoken: this.sending.slice() });
    this.filled = 0;
  }

  // The next sample of the result; silence until there is as much of it as is kept.
  heard() {
    const step = 1 / (FADE_SECONDS * sampleRate);
    if (this.waiting && this.ready.length > this.margin) this.waiting = false;
    if (!this.waiting && this.ready.length === 0) {
      this.waiting = true;
      this.dropouts += 1;
      this.margin = Math.min(MOST_MARGIN_SECONDS * sampleRate, 1.5 * this.margin);
      this.lowest = Infinity;
    }
    if (this.waiting) {
      this.volume = 0;
      return 0;
    }
    this.started = true;
    // It ends softly if nothing follows, and begins softly again.
    const rising = this.ready.length > 1 / step;
    this.volume = Math.max(0, Math.min(1, this.volume + (rising ? step : -step)));
    this.wet = Math.max(0, Math.min(1, this.wet + (this.bypassed ? -step : step)));
    const dry = this.source[(this.played + this.lost) % this.source.length];
    this.played += 1;
    const result = this.ready.next();
    return this.volume * (this.wet * result + (1 - this.wet) * dry);
  }

  // Sound that was not needed for seconds is skipped, so that the delay does not grow for ever.
  look(frames) {
    this.lowest = Math.min(this.lowest, this.ready.length);
    this.looked += frames;
    this.told += frames;
    if (this.looked >= LOOK_SECONDS * sampleRate) {
      for (let skip = this.lowest - 2 * this.margin; skip > 0 && skip < Infinity; skip--) {
        this.ready.next();
        this.played += 1;
        this.volume = 0;
      }
      this.looked = 0;
      this.lowest = Infinity;
    }
    if (this.told >= sampleRate / TOLD_PER_SECOND) {
      const delay = this.started ? (this.spoken - this.lost - this.played) / sampleRate : null;
      this.port.postMessage({ told: { peaks: this.peaks, delay, dropouts: this.dropouts } });
      this.peaks = [0, 0];
      this.told = 0;
    }
  }
}

registerProcessor("exchange", Exchange);
