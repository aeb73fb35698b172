// The page's story: a picture comes in, a question goes out, and what the server says is shown as it arrives.

import * as api from "./api.js";
import { compare } from "./compare.js";
import { copyText, curlCommand } from "./curl.js";
import { $, calm, flag, make, milliseconds, say } from "./dom.js";
import { isDrawn, readPages, readPicture } from "./picture.js";
import { guessGrid, readSeen, readUsage } from "./read.js";
import * as result from "./result.js";
import * as settings from "./settings.js";
import { clearSeen, markPage, showBoxes, showHeat, showPicture, showStrip } from "./stage.js";
import { EXAMPLES, describe, suggestions } from "./words.js";

const state = {
  model: "",
  lost: false, // the server did not say its model
  cell: 32,
  limits: { bytes: Infinity, pixels: Infinity },
  picture: null,
  page: 0, // of a PDF, the one on the screen
  asked: [], // answers about this picture, newest first
  current: null, // the answer on the screen
  running: null, // AbortController of the question that runs
  preview: null,
  previewTimer: 0,
};

/* The server */

let greetings = 0; // a new key greets again, and an older reply no longer counts

async function greet() {
  const turn = ++greetings;
  try {
    const [model] = await api.models();
    if (turn !== greetings) return;
    if (!model) throw new api.ServerError("The server lists no model.", 200);
    const facts = model.qzoom ?? {};
    state.model = model.id;
    state.cell = facts.cell_px || 32;
    state.limits = {
      bytes: facts.limits?.picture_bytes ?? Infinity,
      pixels: facts.limits?.picture_pixels ?? Infinity,
    };
    settings.setOwn("gate_threshold", facts.gate_threshold);
    settings.setOwn("region_threshold", facts.region_threshold);
    const looks = (facts.coarse_tokens?.[1] ?? 0) + (facts.region_tokens?.[1] ?? 0);
    settings.setMostTokens(Math.min(facts.limits?.max_visual_tokens ?? Infinity, Math.max(1024, 2 * looks)));
    if (looks) settings.setOwn("max_visual_tokens", looks);
    $("model").textContent = model.id;
    describe(model.id, facts.embedded ?? model.id === "tiny");
    if (state.lost) complain(null); // what was said of a file meanwhile stays
    state.lost = false;
  } catch (error) {
    if (turn !== greetings) return;
    $("model").textContent = "unknown";
    state.lost = true;
    complain(error);
  }
}

/** Show an error as the server gave it; null takes it away. */
function complain(error) {
  const box = $("alert");
  box.hidden = !error;
  if (!error) return;
  const wait = error.wait ? ` Try again in ${error.wait} s.` : "";
  box.textContent = `${error.message}${wait}`;
  (state.picture ? document.querySelector(".panel form") : $("drop")).after(box);
  if (error.status === 401 && state.picture) $("settings").open = true; // the focus stays where the person types
}

/* The picture */

async function take(blob, name, question = "") {
  stop();
  let picture;
  try {
    picture = await (isDrawn(blob, name) ? readPages(blob, name, limits, drawPages) : readPicture(blob, name, limits));
  } catch (error) {
    complain(error);
    return;
  }
  complain(null);
  Object.assign(state, { picture, page: 0, asked: [], current: null });
  $("welcome").hidden = true;
  $("bench").hidden = false;
  for (const id of ["result", "comparison", "history"]) $(id).hidden = true;
  document.body.dataset.picture = "shown";
  showPicture(picture.pages ? { ...picture.pages[0], note: picture.note } : picture);
  showStrip(picture.pages ?? [], showPage);
  markPage(0);
  $("chips").replaceChildren(...suggestions(name).map(chip));
  $("question").value = question;
  say(`Picture ${name}, ${picture.width} by ${picture.height} pixels. ${picture.note}`);
  if (question) await ask(question);
  else $("question").focus();
}

/** What the server takes, once it has said so; the model's name is known then, too. */
async function limits() {
  await greeting;
  return state.limits;
}

const drawPages = (url) => api.pages({ model: state.model, file: { file_data: url } });

/** Show a page of a PDF, with what the answer on the screen saw on it. */
function showPage(i) {
  const seen = state.current?.look;
  turnTo(i);
  if (seen?.image !== i) return;
  showHeat(seen.rows);
  showBoxes(seen.regions, seen.size);
}

/** Turn to a page of a PDF, without anything drawn on it. */
function turnTo(i, read = state.current?.look.regions.length ? state.current.look.image : null) {
  const { pages, note } = state.picture;
  if (pages && i !== state.page) {
    state.page = i;
    showPicture({ ...pages[i], note });
  }
  markPage(i, read);
}

function chip(text) {
  const button = make("button", { text, type: "button" });
  button.addEventListener("click", () => {
    $("question").value = text;
    ask(text);
  });
  return make("li", {}, button);
}

function leave() {
  stop();
  clearSeen();
  Object.assign(state, { picture: null, current: null, asked: [] });
  for (const id of ["bench", "comparison", "history"]) $(id).hidden = true;
  $("welcome").hidden = false;
  document.body.dataset.picture = "none";
  complain(null);
  $("file").focus();
}

/* The question */

function request(question, zoom) {
  const { pages, type, url } = state.picture;
  const file = pages && type === "application/pdf";
  const picture = file ? { type: "file", file: { file_data: url } } : { type: "image_url", image_url: { url } };
  const content = [picture, { type: "text", text: question }];
  return { model: state.model, messages: [{ role: "user", content }], temperature: 0, qzoom: settings.controls(zoom) };
}

async function ask(text) {
  const question = text.trim();
  if (!question) {
    $("question").focus();
    complain(new Error("Write a question first."));
    return;
  }
  stop();
  complain(null);
  const running = (state.running = new AbortController());
  const alive = () => state.running === running;
  const body = request(question);
  const { picture } = state;
  const first = state.asked.length === 0;
  $("go").textContent = "Stop";
  $("command").open = false;
  if (matchMedia("(pointer: coarse)").matches) $("question").blur();
  result.begin();
  say("Looking at the picture.");
  try {
    const answer = await listen(body, question, first, running.signal, alive);
    if (!alive()) return;
    remember({ ...answer, question, body, picture, mode: body.qzoom.zoom });
    result.finish(answer);
    showCommand();
    say(`Answer: ${answer.text || "empty"}. ${result.cachedWords(answer)}`);
  } catch (error) {
    if (!alive()) return;
    result.abandon();
    complain(error);
    if (error.status === 401) $("key").focus();
  }
  state.running = null;
  $("go").textContent = "Ask";
}

/** Read the stream: gate and regions first, then the text, which waits until the picture has been shown. */
async function listen(body, question, first, signal, alive) {
  const started = performance.now();
  const got = { text: "", qzoom: {}, usage: null, finish: "", seenMs: 0 };
  let shown = null;
  for await (const chunk of api.stream(body, signal)) {
    const choice = chunk.choices?.[0];
    if (chunk.usage) got.usage = chunk.usage;
    if (chunk.qzoom) got.qzoom = { ...chunk.qzoom, heatmap: got.qzoom.heatmap };
    if (!choice) continue;
    if (choice.delta?.qzoom) {
      got.qzoom = choice.delta.qzoom;
      const seen = readSeen(got.qzoom, state.picture.sent, state.cell, state.page);
      turnTo(seen.image, seen.regions.length ? seen.image : null);
      shown = result.reveal(seen, body.qzoom.zoom, first, alive).then(() => {
        shown.over = true;
        if (alive()) result.showText(got.text);
      });
    }
    got.text += choice.delta?.content ?? "";
    got.finish = choice.finish_reason ?? got.finish;
    if (shown?.over && alive()) result.showText(got.text);
  }
  got.seenMs = performance.now() - started;
  await shown;
  return conclude(got);
}

/** An answer as the page keeps it. */
function conclude({ text, qzoom, usage, finish, seenMs }) {
  const { picture } = state;
  const timing = qzoom.timing_ms ?? {};
  const seen = readSeen(qzoom, picture.sent, state.cell, state.page);
  const tokens = readUsage(usage);
  seen.grid ??= guessGrid(tokens.coarse / seen.sizes.length, seen.size);
  return {
    text: text.trim(),
    look: seen,
    ...tokens,
    native: seen.sizes.reduce((sum, [w, h]) => sum + Math.round(w / state.cell) * Math.round(h / state.cell), 0),
    timing,
    ms: timing.total ?? seenMs,
    seen: seenMs,
    score: seen.gate.score,
    zoomed: seen.regions.length > 0,
    finish,
    notes: qzoom.notes ?? (seen.gate.note ? [seen.gate.note] : []),
  };
}

function stop() {
  state.running?.abort();
  state.running = null;
  state.preview?.abort();
  clearTimeout(state.previewTimer);
  $("go").textContent = "Ask";
}

/* What was asked before */

function remember(answer) {
  state.current = answer;
  state.asked.unshift(answer);
  $("history").hidden = false;
  $("asked").replaceChildren(...state.asked.map(entry));
}

function entry(answer) {
  const cached = answer.cached ? `${answer.cached} of ${answer.prompt} tokens cached` : `${answer.prompt} tokens, none cached`;
  const button = make(
    "button",
    { type: "button" },
    make("span", { text: answer.question }),
    make("strong", { text: answer.text || "(an empty answer)" }),
    make("small", { text: `${milliseconds(answer.ms)} · ${cached}` }),
  );
  button.addEventListener("click", () => replay(answer));
  return make("li", {}, button);
}

async function replay(answer) {
  stop();
  complain(null);
  state.current = answer;
  $("question").value = answer.question;
  turnTo(answer.look.image);
  result.begin();
  await result.reveal(answer.look, answer.mode, false);
  result.finish(answer);
  showCommand();
  $("bench").scrollIntoView({ block: "start", behavior: calm() ? "auto" : "smooth" });
}

/* Beside it */

function previewSoon() {
  clearTimeout(state.previewTimer);
  state.preview?.abort();
  if (!state.current || state.running) return;
  state.previewTimer = setTimeout(previewNow, 220);
}

async function previewNow() {
  const { signal } = (state.preview = new AbortController());
  const { model, messages } = state.current.body;
  const qzoom = settings.controls();
  try {
    const got = await api.perceive({ model, messages, qzoom }, signal);
    const seen = readSeen(got.qzoom ?? got, state.picture.sent, state.cell, state.page);
    if (!signal.aborted) turnTo(seen.image);
    if (!signal.aborted) result.preview(seen, qzoom.zoom);
  } catch (error) {
    if (!signal.aborted) complain(error);
  }
}

function showCommand() {
  const { body, picture } = state.current;
  $("curl").textContent = curlCommand(body, picture, location.origin, api.hasKey());
}

async function runComparison() {
  const { question } = state.current;
  stop();
  const running = (state.running = new AbortController());
  const alive = () => state.running === running;
  $("compare").disabled = true;
  await compare(
    question,
    async (zoom) => {
      const started = performance.now();
      const got = await api.complete(request(question, zoom), running.signal);
      const { message, finish_reason: finish } = got.choices[0];
      const seenMs = performance.now() - started;
      return conclude({ text: message.content, qzoom: message.qzoom, usage: got.usage, finish, seenMs });
    },
    alive,
  );
  $("compare").disabled = false;
  if (alive()) state.running = null;
}

/* Wiring */

function takeFiles(files) {
  const file = [...files].find((item) => item.type.startsWith("image/") || isDrawn(item, item.name)) ?? files[0];
  if (file) take(file, file.name || "pasted.png");
}

for (const id of ["file", "camera"]) {
  $(id).addEventListener("change", () => {
    takeFiles($(id).files);
    $(id).value = "";
  });
}

addEventListener("paste", (event) => {
  if (event.clipboardData?.files.length) {
    event.preventDefault();
    takeFiles(event.clipboardData.files);
  }
});

addEventListener("dragover", (event) => {
  event.preventDefault();
  flag(document.body, "dragging", true);
});

addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) flag(document.body, "dragging", false);
});

addEventListener("drop", (event) => {
  event.preventDefault();
  flag(document.body, "dragging", false);
  takeFiles(event.dataTransfer.files);
});

addEventListener("keydown", (event) => {
  if (event.key === "Escape" && state.running) {
    stop();
    result.abandon();
    say("Stopped.");
  }
});

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (state.running && event.submitter === $("go") && document.activeElement === $("go")) {
    stop();
    result.abandon();
    say("Stopped.");
  } else ask($("question").value);
});

$("another").addEventListener("click", leave);
$("compare").addEventListener("click", runComparison);
$("copy").addEventListener("click", async () => {
  $("command").open = true;
  const copied = await copyText($("curl").textContent, $("curl"));
  $("copy").textContent = copied ? "Copied" : "Selected: copy it";
  setTimeout(() => ($("copy").textContent = "Copy as curl"), 2000);
  say(copied ? "The curl command is copied." : "The curl command is selected.");
});

for (const { file, about, question } of EXAMPLES) {
  const picture = make("img", { src: `examples/${file}`, alt: about, loading: "lazy" });
  const button = make("button", { type: "button" }, picture, make("span", { text: question }));
  button.addEventListener("click", async () => {
    try {
      take(await (await fetch(`examples/${file}`)).blob(), file, question);
    } catch {
      complain(new Error("The example cannot be loaded. Is the server still running?"));
    }
  });
  $("examples").append(make("li", {}, button));
}

let greeting = greet();
settings.listen(previewSoon, () => (greeting = greet()));
api.version().then(
  (version) => ($("version").textContent = version && `qzoom ${version}`),
  () => {},
);
