"use strict";
// The form, and the text that the worker writes. MODEL and WEIGHTS stand before this script.

const at = id => document.getElementById(id);
const say = text => { at("status").textContent = text; };
const count = n => n.toLocaleString("en");
let job = 0, worker; // job: the number of the newest text

function running(on) {
  at("stop").disabled = !on;
  if (!on && document.activeElement === at("stop")) at("start").focus();
}

// An element with a text, at the end of another.
function append(parent, tag, text) {
  const element = parent.appendChild(document.createElement(tag));
  element.textContent = text;
  return element;
}

function paint(element, bits) {
  const reached = MODEL.levels.filter(level => bits >= level.from).at(-1);
  const color = at("colors").checked && reached ? reached.color : "";
  element.style.background = color;
  element.style.color = color && "black"; // all backgrounds are light
}

function add([text, bits]) {
  const span = append(at("text"), "span", text);
  span.dataset.bits = bits;
  span.title = `${bits.toFixed(1)} bits`;
  paint(span, bits);
}

function start() {
  job += 1;
  const prompt = at("prompt").value, number = id => at(id).valueAsNumber;
  at("text").replaceChildren();
  append(at("text"), "b", prompt);
  running(true);
  say("Generating");
  const [temperature, length, seed] = ["temperature", "length", "seed"].map(number);
  worker.postMessage({job, prompt, temperature, length, seed});
}

function stop(text) {
  job += 1;
  worker.postMessage({job});
  running(false);
  say(text);
}

function receive({data}) {
  if (data.ready) {
    at("start").disabled = false;
    say("Ready");
    follow();
  }
  if (data.job !== job) return; // of a text that was stopped
  data.pieces?.forEach(add);
  if (data.end) {
    const {characters, seconds} = data.end;
    running(false);
    say(`Done: ${count(characters)} characters in ${seconds.toFixed(1)} seconds, `
      + `${count(Math.round(characters / seconds))} a second`);
  }
  if (data.error) stop(data.error);
}

// A link may fill in the form and start: #prompt=To&temperature=0.5&start
function follow() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const id of ["prompt", "temperature", "length", "seed"]) {
    if (given.has(id)) at(id).value = given.get(id);
  }
  if (given.has("start")) at("form").requestSubmit();
}

function describe() {
  if (!MODEL.prompts) {
    at("prompt").disabled = true;
    at("about-prompt").textContent = "This page cannot split a prompt into the model's pieces.";
  }
  append(at("keys"), "span", "Surprise: ");
  for (const {text, color} of MODEL.levels) {
    const key = append(at("keys"), "i", text);
    key.style.background = color;
    key.style.color = "black";
    at("keys").append(" ");
  }
}

function begin() {
  describe();
  // a worker from memory also runs where the page is opened as a file, or without a network
  worker = new Worker(URL.createObjectURL(new Blob([at("worker").textContent])));
  worker.onmessage = receive;
  worker.onerror = event => say(`The model cannot run here: ${event.message}`);
  const weights = Uint8Array.from(atob(WEIGHTS), letter => letter.charCodeAt(0)).buffer;
  worker.postMessage({model: MODEL, weights}, [weights]);
}

at("form").addEventListener("submit", event => { event.preventDefault(); start(); });
at("stop").addEventListener("click", () => stop("Stopped"));
at("colors").addEventListener("change", () => {
  for (const span of at("text").querySelectorAll("span")) paint(span, Number(span.dataset.bits));
});
document.addEventListener("keydown", event => {
  if (event.key === "Escape" && !at("stop").disabled) stop("Stopped");
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("form").requestSubmit();
});
window.addEventListener("hashchange", follow);
begin();
