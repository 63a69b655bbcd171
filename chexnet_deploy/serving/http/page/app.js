"use strict";
// Everything the page shows of an answer is put in as text, never as markup.

const at = (id) => document.getElementById(id);
const items = []; // the files in the order they came
let shown = null; // of those, the one in sight
let isReading = false;
let turn = 0; // pictures of an earlier choice are dropped

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function say(text, isBad) {
  at("status").textContent = text;
  at("status").classList.toggle("bad", Boolean(isBad));
}

async function ask(url, options) {
  const response = await fetch(url, options).catch(() => { throw new Error("The file can't be read, or the service is gone."); });
  const answer = await response.json();
  if (!response.ok) throw new Error(`${answer.error} (${answer.reason})`);
  return answer;
}

async function showEngine() {
  try {
    const engine = await ask("/engine");
    at("engine-line").textContent = `${engine.precision} on ${engine.backend}, bundle ${engine.version}`;
    const facts = {
      "Bundle": engine.bundle,
      "Precision": engine.dialect === "float" ? engine.precision : `${engine.precision} (${engine.dialect})`,
      "Backend": engine.backend,
      "Made of": engine.ancestors.length ? engine.ancestors.map((id) => id.slice(0, 12)).join(" → ") : "the checkpoint",
      "Checkpoint": engine.checkpoint_sha256,
      "Known answers": `differ by up to ${engine.probe_max_abs_logit_error.toPrecision(3)} logits from the fp32 model's`,
      "Signed by": engine.signers.length ? engine.signers.join(", ") : "opened without a trust file",
      "Release": engine.release ? `${engine.release.line} ${engine.release.number}` : "none",
      "Calibration": engine.calibration ? `${engine.calibration.n_images} images` : "none",
      "Batches": engine.batching.is_invariant ? `up to ${Math.max(...engine.batching.sizes)}, bit-equal to single images` : "never joined",
    };
    at("facts").replaceChildren(...Object.entries(facts).flatMap(([name, value]) => [make("dt", "", name), make("dd", "", value)]));
    at("checks").replaceChildren(...engine.checks.map((check) => {
      const row = make("tr");
      row.append(make("td", "", check.name), make("td", "", check.value.toPrecision(3)), make("td", "", String(check.limit)));
      return row;
    }));
  } catch (err) {
    at("engine-line").textContent = err.message;
  }
}

function showPicture(url, caption) {
  at("shown").src = url;
  at("shown").alt = caption;
  at("caption").textContent = caption;
  at("picture").hidden = false;
}

function showFindings(answer) {
  const names = Object.keys(answer.probabilities).sort((a, b) => answer.probabilities[b] - answer.probabilities[a]);
  at("findings").replaceChildren(...names.map((name) => {
    const probability = answer.probabilities[name];
    const high = answer.operating_points[name], low = answer.absent_below[name] ?? high;
    let verdict = high === undefined && low === undefined ? "no operating point" : "undetermined";
    if (name in answer.present) verdict = answer.present[name] ? `at or above ${high.toFixed(3)}` : `below ${low.toFixed(3)}`;
    const button = make("button", answer.present[name] ? "present" : "");
    button.type = "button";
    button.dataset.finding = name;
    button.setAttribute("aria-pressed", "false");
    const label = make("span", "name", name.replaceAll("_", " "));
    label.append(make("span", "verdict", verdict));
    const track = make("span", "track");
    track.setAttribute("aria-hidden", "true");
    const bar = make("div", "bar");
    bar.style.width = `${100 * probability}%`;
    track.append(bar);
    for (const point of new Set([low, high].filter((end) => end !== undefined))) {
      const mark = make("div", "point");
      mark.style.left = `${100 * point}%`;
      track.append(mark);
    }
    button.append(label, track, make("span", "value", probability.toFixed(3)));
    button.addEventListener("click", () => showMap(name));
    const item = make("li");
    item.append(button);
    return item;
  }));
}

function press(name) {
  for (const button of at("findings").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(button.dataset.finding === name));
  }
  at("plain").setAttribute("aria-pressed", String(!name));
}

async function predict(file, query) {
  return ask(`/predict${query}`, { method: "POST", body: file, headers: { "Content-Type": "application/octet-stream" } });
}

function describe(answer) {
  const n = Object.values(answer.present).filter(Boolean).length;
  const site = answer.operating_points_from === "bundle" ? "" : `, of ${answer.operating_points_from}`;
  return `${n} of ${Object.keys(answer.probabilities).length} findings at or above their operating points${site}`;
}

function note(item, text, isBad) {
  item.text = text;
  item.isBad = Boolean(isBad);
  item.button.lastChild.textContent = text;
  item.button.classList.toggle("bad", item.isBad);
  if (item === shown) show(item);
}

function take(files) {
  const first = items.length;
  for (const file of files) {
    const item = { file, button: make("button"), answer: null, plain: null };
    item.button.type = "button";
    item.button.setAttribute("aria-pressed", "false");
    item.button.append(make("span", "name", file.name), make("span", "verdict"));
    item.button.addEventListener("click", () => {
      if (item.isBad) note(item, "waits");
      show(item);
      readAll();
    });
    const line = make("li");
    line.append(item.button);
    at("files").append(line);
    items.push(item);
    note(item, "waits");
  }
  if (items.length > first) show(items[first]);
  readAll();
}

// One after another: a folder of radiographs should not fill the service's queue.
async function readAll() {
  if (isReading) return;
  isReading = true;
  for (let item; (item = items.find((each) => each.text === "waits")); ) {
    note(item, "Asking the model…");
    try {
      item.answer = await predict(item.file, "");
      note(item, describe(item.answer));
    } catch (err) {
      note(item, err.message, true);
    }
  }
  isReading = false;
}

function show(item) {
  shown = item;
  for (const each of items) each.button.setAttribute("aria-pressed", String(each === item));
  say(`${item.file.name}: ${item.text}`, item.isBad);
  at("picture").hidden = true;
  at("plain").hidden = true;
  at("findings").replaceChildren();
  turn++;
  if (!item.answer) return;
  showFindings(item.answer);
  const probabilities = item.answer.probabilities;
  showMap(Object.keys(probabilities).reduce((a, b) => (probabilities[a] >= probabilities[b] ? a : b)));
}

async function showMap(finding) {
  const mine = ++turn, item = shown;
  press(finding);
  try {
    const answer = await predict(item.file, `?cam=${encodeURIComponent(finding)}${item.plain ? "" : "&radiograph=png"}`);
    item.plain = item.plain || `data:image/png;base64,${answer.radiograph.png_base64}`;
    if (mine !== turn) return;
    const words = answer.cam.has_evidence ? "where the model looked for" : "nothing in the image speaks for";
    showPicture(`data:image/png;base64,${answer.cam.png_base64}`, `${item.file.name}: ${words} ${finding.replaceAll("_", " ")}`);
    at("plain").hidden = false;
  } catch (err) {
    if (mine === turn) say(`${item.file.name}: ${err.message}`, true);
  }
}

at("plain").addEventListener("click", () => {
  turn++;
  press("");
  showPicture(shown.plain, `${shown.file.name}: the radiograph as the model read it`);
});
// A file that was changed meanwhile may be chosen again: a browser sees no change otherwise.
at("file").addEventListener("click", (event) => { event.target.value = ""; });
at("file").addEventListener("change", (event) => take([...event.target.files]));
// The whole page takes a drop: one that misses would leave the page for the file.
addEventListener("dragover", (event) => { event.preventDefault(); at("drop").classList.add("over"); });
addEventListener("dragleave", () => at("drop").classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  at("drop").classList.remove("over");
  take([...event.dataTransfer.files]);
});
showEngine();
