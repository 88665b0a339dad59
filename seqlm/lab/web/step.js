"use strict";
// Runs a model in a worker: its step is a list of ONNX operators, which seqlm recorded.
// The arrays are made once. Numbers are float32 in memory, and sums are added in float64.

// Operators on single numbers.
const ELEMENTWISE = {
  Abs: Math.abs, Cos: Math.cos, Exp: Math.exp, Log: Math.log, Sin: Math.sin, Sqrt: Math.sqrt,
  Tanh: Math.tanh,
  Neg: x => -x,
  Reciprocal: x => 1 / x,
  Relu: x => Math.max(x, 0),
  Sigmoid: x => 1 / (1 + Math.exp(-x)),
  Softplus: x => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x))),
  Erf: erf,
  Gelu: x => x * (1 + erf(x * Math.SQRT1_2)) / 2,
  Add: (x, y) => x + y,
  Sub: (x, y) => x - y,
  Mul: (x, y) => x * y,
  Div: (x, y) => x / y,
  Max: (x, y) => Math.max(x, y),
  Min: (x, y) => Math.min(x, y),
  GreaterOrEqual: (x, y) => +(x >= y),
  Greater: (x, y) => +(x > y),
  LessOrEqual: (x, y) => +(x <= y),
  Less: (x, y) => +(x < y),
  Where: (condition, x, y) => condition ? x : y,
};

// Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26; the error is at most 1.5e-7.
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const p = (((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t;
  return Math.sign(x) * (1 - (p + 0.254829592) * t * Math.exp(-x * x));
}

// All other operators: functions (inputs, shape of the output, attributes) -> {data, run}, where
// `run` computes `data`; without `run`, data is memory that the inputs have in common.
const OPERATORS = {
  // row of a table
  Gather([table, symbol], shape) {
    const data = zeros(shape), width = data.length;
    const run = () => {
      const start = symbol.data[0] * width;
      data.set(table.data.subarray(start, start + width));
    };
    return {data, run};
  },

  // x w^T + bias; w has a row for each output; four rows at once take less time than one by one
  Gemm([x, w, bias], shape) {
    const data = zeros(shape), [outputs, size] = w.shape, rows = x.data.length / size;
    const run = () => {
      const a = x.data, b = w.data;
      for (let row = 0; row < rows; row++) {
        const first = row * size, to = row * outputs;
        let o = 0;
        for (; o + 3 < outputs; o += 4) {
          const j = o * size, k = j + size, l = k + size, m = l + size;
          let s = 0, t = 0, u = 0, v = 0;
          for (let i = 0; i < size; i++) {
            const n = a[first + i];
            s += n * b[j + i];
            t += n * b[k + i];
            u += n * b[l + i];
            v += n * b[m + i];
          }
          data.set([s, t, u, v], to + o);
        }
        for (; o < outputs; o++) {
          let sum = 0;
          for (let i = 0; i < size; i++) sum += a[first + i] * b[o * size + i];
          data[to + o] = sum;
        }
        if (bias) for (o = 0; o < outputs; o++) data[to + o] += bias.data[o];
      }
    };
    return {data, run};
  },

  // a product for each leading place: (..., M, K) (..., K, N)
  MatMul([x, y], shape) {
    const data = zeros(shape), [inner, columns] = y.shape.slice(-2), rows = x.shape.at(-2);
    const run = () => {
      for (let at = 0; at < data.length; at++) {
        const column = at % columns, row = Math.floor(at / columns);
        const other = Math.floor(row / rows) * inner * columns + column;
        let sum = 0;
        for (let k = 0; k < inner; k++) sum += x.data[row * inner + k] * y.data[other + k * columns];
        data[at] = sum;
      }
    };
    return {data, run};
  },

  Reshape: ([x]) => ({data: x.data}),

  Slice([x], shape, {axis, start, end}) {
    const inner = size(x.shape.slice(axis + 1)), outer = size(x.shape.slice(0, axis));
    if (outer === 1) return {data: x.data.subarray(start * inner, end * inner)};
    const strides = stridesOf(x.shape);
    return copied(x, places(shape, strides).map(place => place + start * strides[axis]));
  },

  Transpose([x], shape, {perm}) {
    const strides = stridesOf(x.shape);
    return copied(x, places(shape, perm.map(axis => strides[axis])));
  },

  Concat(parts, shape, {axis}) {
    const data = zeros(shape), inner = size(shape.slice(axis));
    const run = () => {
      let start = 0;
      for (const part of parts) {
        const length = size(part.shape.slice(axis));
        for (let from = 0, to = start; to < data.length; from += length, to += inner) {
          data.set(part.data.subarray(from, from + length), to);
        }
        start += length;
      }
    };
    return {data, run};
  },

  ReduceSum: (inputs, shape, {axes}) => reduced(inputs[0], shape, axes, 1),
  ReduceMean: (inputs, shape, {axes}) =>
    reduced(inputs[0], shape, axes, size(axes.map(axis => inputs[0].shape[axis]))),
};

const size = shape => shape.reduce((product, n) => product * n, 1);
const zeros = shape => new Float32Array(size(shape));
const stridesOf = shape => shape.map((_, axis) => size(shape.slice(axis + 1)));

// For every place of an array of this shape, in order, the sum of its indices times the strides.
function places(shape, strides) {
  const found = new Int32Array(size(shape));
  const own = stridesOf(shape);
  for (let at = 0; at < found.length; at++) {
    shape.forEach((n, axis) => { found[at] += Math.floor(at / own[axis]) % n * strides[axis]; });
  }
  return found;
}

// Where every place of the output reads its input: a dimension of size 1 is repeated.
function broadcast(input, shape) {
  const strides = stridesOf(input).map((stride, axis) => input[axis] === 1 ? 0 : stride);
  return places(shape, [...Array(shape.length - input.length).fill(0), ...strides]);
}

function copied(x, from) {
  const data = new Float32Array(from.length);
  return {data, run: () => { for (let i = 0; i < from.length; i++) data[i] = x.data[from[i]]; }};
}

function reduced(x, shape, axes, divisor) {
  const data = zeros(shape), sums = new Float64Array(data.length);
  const to = broadcast(shape, x.shape);
  const run = () => {
    sums.fill(0);
    for (let i = 0; i < to.length; i++) sums[to[i]] += x.data[i];
    for (let i = 0; i < data.length; i++) data[i] = sums[i] / divisor;
  };
  return {data, run};
}

function elementwise(f, inputs, shape) {
  const data = zeros(shape), [a, b, c] = inputs.map(x => x.data);
  const [i, j, k] = inputs.map(x => broadcast(x.shape, shape));
  const runs = [
    () => { for (let n = 0; n < data.length; n++) data[n] = f(a[i[n]]); },
    () => { for (let n = 0; n < data.length; n++) data[n] = f(a[i[n]], b[j[n]]); },
    () => { for (let n = 0; n < data.length; n++) data[n] = f(a[i[n]], b[j[n]], c[k[n]]); },
  ];
  return {data, run: runs[inputs.length - 1]};
}

// The numbers of a constant; see `encoded` in seqlm/lab/web_page.py.
function decoded(bytes, {shape, type, start}) {
  const count = size(shape), data = new Float32Array(count);
  if (type === "float32") return new Float32Array(bytes, start, count);
  if (type === "float16") {
    new Uint16Array(bytes, start, count).forEach((bits, i) => { data[i] = half(bits); });
    return data;
  }
  const [rows, width] = shape, scales = new Float32Array(bytes, start, rows);
  new Int8Array(bytes, start + 4 * rows, count).forEach((n, i) => {
    data[i] = n * scales[Math.floor(i / width)];
  });
  return data;
}

function half(bits) {
  const exponent = bits >> 10 & 31, fraction = bits & 1023, sign = bits >> 15 ? -1 : 1;
  return sign * (exponent ? 2 ** (exponent - 25) * (1024 + fraction) : 2 ** -24 * fraction);
}

// A model with its state: step(symbol) returns the logits, reset() goes back to the first state.
function load(model, bytes) {
  const values = {symbol: {shape: [1], data: new Float32Array(1)}};
  for (const [name, constant] of Object.entries(model.constants)) {
    values[name] = {shape: constant.shape, data: decoded(bytes, constant)};
  }
  const states = model.states.map(({name, shape, initial}) => {
    values[name] = {shape, data: zeros(shape)};
    return {now: values[name].data, initial, next: zeros(shape)};
  });
  const program = model.nodes.map(([operator, names, output, shape, attributes]) => {
    const inputs = names.map(name => values[name]), f = ELEMENTWISE[operator];
    const made = f ? elementwise(f, inputs, shape) : OPERATORS[operator](inputs, shape, attributes);
    values[output] = {shape, data: made.data};
    return made.run;
  }).filter(run => run);
  const [logits, ...results] = model.outputs.map(name => values[name].data);
  return {
    reset() { for (const {now, initial} of states) now.set(initial); },
    step(symbol) {
      values.symbol.data[0] = symbol;
      for (const run of program) run();
      // in two rounds, since a new state may lie in the memory of an old one
      states.forEach(({next}, i) => next.set(results[i]));
      for (const {now, next} of states) now.set(next);
      return logits;
    },
  };
}

const hex = bytes => Array.from(bytes, byte => byte.toString(16).padStart(2, "0")).join("");

// The symbols of a prompt; an error names the first character that the vocabulary lacks.
function encode(model, prompt) {
  const utf8 = new TextEncoder();
  const parts = model.unit === "byte" ? Array.from(utf8.encode(prompt), byte => [byte])
    : Array.from(prompt, character => utf8.encode(character));
  const symbols = parts.map(part => model.texts.indexOf(hex(part)));
  const unknown = symbols.indexOf(-1);
  if (unknown >= 0) {
    const character = JSON.stringify(Array.from(prompt)[unknown]);
    throw new RangeError(`The model does not know the character ${character}. Remove it.`);
  }
  return symbols.slice(symbols.lastIndexOf(model.end) + 1);
}

// Random numbers in [0, 1) from a seed: mulberry32, by Tommy Ettinger.
function randomFrom(seed) {
  let state = seed;
  return () => {
    state = state + 0x6D2B79F5 | 0;
    let t = Math.imul(state ^ state >>> 15, 1 | state);
    t = t + Math.imul(t ^ t >>> 7, 61 | t) ^ t;
    return ((t ^ t >>> 14) >>> 0) / 2 ** 32;
  };
}

// [symbol, bits]: the likeliest symbol at temperature 0, else one drawn; bits at temperature 1.
function draw(logits, temperature, random) {
  const best = logits.reduce((top, x, i) => x > logits[top] ? i : top, 0);
  const total = logits.reduce((sum, x) => sum + Math.exp(x - logits[best]), 0);
  let symbol = best;
  if (temperature > 0) {
    const weights = Array.from(logits, x => Math.exp((x - logits[best]) / temperature));
    let left = random() * weights.reduce((sum, x) => sum + x, 0);
    symbol = weights.findIndex(x => (left -= x) < 0);
    if (symbol < 0) symbol = best; // rounding left a little over
  }
  return [symbol, Math.log2(total) - (logits[symbol] - logits[best]) / Math.LN2];
}

const SLICE = 30; // milliseconds of work between two messages
let current = 0; // the job that runs; a stopped one sees another number
let model, network, texts;

async function generate({job, prompt, temperature, length, seed}) {
  const symbols = [model.beginning, ...encode(model, prompt)], random = randomFrom(seed);
  const decoder = new TextDecoder("utf-8", {ignoreBOM: true}), began = performance.now();
  let pieces = [], left = length, bits = 0, sent = began, ended = false;
  network.reset();
  for (let n = 0; left > 0 && !ended; n++) {
    if (performance.now() - sent > SLICE) {
      postMessage({job, pieces});
      pieces = [];
      await new Promise(resolve => setTimeout(resolve)); // so that a message to stop is read
      if (job !== current) return;
      sent = performance.now();
    }
    const logits = network.step(symbols[n]);
    if (n < symbols.length - 1) continue; // within the prompt
    const [symbol, surprise] = draw(logits, temperature, random);
    ended = symbol === model.end;
    const text = decoder.decode(texts[symbol] ?? new Uint8Array(), {stream: true});
    bits += surprise;
    if (text) {
      const piece = Array.from(text).slice(0, left);
      pieces.push([piece.join(""), bits]);
      left -= piece.length;
      bits = 0;
    }
    symbols.push(symbol);
  }
  const seconds = (performance.now() - began) / 1000;
  postMessage({job, pieces, end: {characters: length - left, seconds}});
}

onmessage = ({data}) => {
  if (data.model) {
    model = data.model;
    network = load(model, data.weights);
    texts = model.texts.map(text => Uint8Array.from(text.match(/../g) ?? [], byte => parseInt(byte, 16)));
    postMessage({ready: true});
    return;
  }
  current = data.job;
  if ("length" in data) generate(data).catch(error => postMessage({job: data.job, error: error.message}));
};
