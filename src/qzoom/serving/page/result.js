// One answer on the screen: the steps, the text, gate, crops, tokens and times.

import { $, calm, count, flag, make, milliseconds, say } from "./dom.js";
import { showGate, verdict } from "./dial.js";
import { busy, clearSeen, drawCoarse, showBoxes, showCoarse, showCrops, showHeat } from "./stage.js";

const STEP_MS = { coarse: 520, gate: 480, heat: 420, box: 380 };
const PARTS = {
  vision: "vision",
  prefill: "prefill",
  region: "gate and map",
  region_vision: "region vision",
  decode: "decode",
  queue: "waiting",
};

const pause = (name, first) => new Promise((done) => setTimeout(done, first && !calm() ? STEP_MS[name] : 0));

function step(name, state, text = "") {
  const item = $("steps").querySelector(`[data-step="${name}"]`);
  item.dataset.state = state;
  item.querySelector("span").textContent = text;
}

/** Clear the panel for a new question. */
export function begin() {
  clearSeen();
  busy(true);
  $("result").hidden = false;
  flag($("result"), "streaming", true);
  flag($("result"), "answered", false);
  flag($("result"), "zoomed", false);
  for (const name of ["coarse", "gate", "zoom", "answer"]) step(name, "idle");
  step("coarse", "active", "looking");
  $("answer-title").textContent = "Answer";
  $("answer").textContent = "";
  $("answer-note").hidden = true;
  $("crops").replaceChildren();
  for (const id of ["tokens", "time", "token-detail", "time-detail"]) $(id).textContent = "";
  $("token-bar").replaceChildren();
  $("compare").disabled = true;
  $("copy").disabled = true;
  showGate({ score: null, threshold: null }, "");
  flag(document.querySelector(".evidence"), "plain", true);
}

/**
 * Show what the first chunk says: gate, regions, heat map.
 *
 * `first`: slowly, one after the other. It ends early when `alive()` says that the question was given up.
 */
export async function reveal(seen, mode, first, alive = () => true) {
  busy(false);
  const zoomed = seen.regions.length > 0;
  if (seen.grid) {
    drawCoarse(seen.grid, seen.cell);
    showCoarse(first);
  }
  step("coarse", "done", seen.grid ? `${seen.grid[0]} × ${seen.grid[1]} cells` : "");
  step("gate", "active");
  await pause("coarse", first);
  if (!alive()) return;
  showGate(seen.gate, verdict(seen.gate, mode));
  step("gate", "done", typeof seen.gate.score === "number" ? seen.gate.score.toFixed(2) : "not asked");
  await pause("gate", first);
  if (!alive()) return;
  flag($("result"), "zoomed", zoomed ? "yes" : "no");
  $("answer-title").textContent = zoomed ? "Answer, zoomed" : "Answer from the coarse view";
  step("zoom", zoomed ? "active" : "skipped", zoomed ? "" : "not needed");
  showHeat(seen.rows);
  showCoarse(false);
  if (zoomed) {
    await pause("heat", first);
    if (!alive()) return;
    showBoxes(seen.regions, seen.size);
    await pause("box", first);
    if (!alive()) return;
  }
  showRegions(seen);
  step("zoom", zoomed ? "done" : "skipped", zoomed ? regionWords(seen) : mode === "never" ? "switched off" : "not needed");
  step("answer", "active");
  const where = zoomed ? ` It reads ${seen.regions.map((r) => `x ${r.box[0]} to ${r.box[2]}, y ${r.box[1]} to ${r.box[3]}`).join("; ")}.` : "";
  say(`${verdict(seen.gate, mode)}${where}`);
}

const regionWords = ({ regions }) => (regions.length === 1 ? "1 region" : `${regions.length} regions`);

function showRegions(seen) {
  flag(document.querySelector(".evidence"), "plain", seen.regions.length === 0);
  showCrops(seen.regions, seen.size, (region, i) => {
    const [x0, y0, x1, y1] = region.box;
    const number = region.reread ? "Read again" : seen.regions.length > 1 ? `Region ${i + 1}` : "Region";
    return `${number}: ${count(x1 - x0)} × ${count(y1 - y0)} px`;
  });
}

/** Show gate, map and boxes of a changed setting, without an answer. */
export function preview(seen, mode) {
  const zooms = mode === "always" || (mode === "auto" && seen.gate.zoomed);
  const shown = { ...seen, regions: zooms ? seen.regions : [] };
  showGate(seen.gate, verdict(seen.gate, mode));
  showHeat(shown.rows);
  showBoxes(shown.regions, shown.size);
  showRegions(shown);
  note(`With this setting it ${zooms ? "would read this region" : "would not zoom"}. Ask again for the answer.`);
}

export function note(text) {
  $("answer-note").textContent = text;
  $("answer-note").hidden = !text;
}

/** The text so far. */
export function showText(text) {
  $("answer").textContent = text;
  flag($("answer"), "long", text.length > 60);
}

/** The end of an answer: its tokens and times. */
export function finish(answer) {
  flag($("result"), "streaming", false);
  flag($("result"), "answered", true);
  showText(answer.text || "(an empty answer)");
  step("coarse", "done", `${count(answer.coarse)} tokens`);
  if (answer.region) step("zoom", "done", `${count(answer.region)} tokens`);
  step("answer", "done", milliseconds(answer.ms));
  drawCoarse(answer.look.grid, answer.look.cell);
  if (answer.look.regions.some((region) => region.reread)) {
    showBoxes(answer.look.regions, answer.look.size);
    showRegions(answer.look);
  }
  showTokens(answer);
  $("time").textContent = milliseconds(answer.ms);
  $("time-detail").textContent = timeWords(answer);
  $("compare").disabled = false;
  $("copy").disabled = false;
  $("answer-box").scrollIntoView({ block: "nearest", behavior: calm() ? "auto" : "smooth" });
  const notes = [...(answer.notes || [])];
  if (answer.finish === "length") notes.push("Cut off: the answer reached the most tokens allowed.");
  note(notes.join(" "));
}

/** The question ended without an answer. */
export function abandon() {
  busy(false);
  showCoarse(false);
  flag($("result"), "streaming", false);
  for (const item of $("steps").children) if (item.dataset.state === "active") item.dataset.state = "idle";
  if (!$("answer").textContent) $("result").hidden = true;
}

function timeWords(answer) {
  const parts = Object.entries(answer.timing)
    .filter(([name, ms]) => name !== "total" && ms >= 0.5)
    .map(([name, ms]) => `${PARTS[name] || name.replaceAll("_", " ")} ${milliseconds(ms)}`);
  return [...parts, `${milliseconds(answer.seen)} in this browser`].join(" · ");
}

/** A bar of coarse and region tokens over a scale of `most`. */
export function tokenBar(bar, answer, most) {
  const pieces = [
    ["of-coarse", answer.coarse],
    ["of-region", answer.region],
  ].map(([className, tokens]) => {
    const piece = make("i", { className });
    requestAnimationFrame(() => (piece.style.width = `${(100 * tokens) / Math.max(1, most)}%`));
    return piece;
  });
  bar.replaceChildren(...pieces);
}

function showTokens(answer) {
  const total = answer.coarse + answer.region;
  const whole = answer.native > total ? answer.native : 0;
  $("tokens").textContent = count(total);
  tokenBar($("token-bar"), answer, whole || total);
  const words = [make("span", { className: "key-dot of-coarse", text: `coarse ${count(answer.coarse)}` })];
  if (answer.region) words.push(make("span", { className: "key-dot of-region", text: `region ${count(answer.region)}` }));
  if (whole) {
    const share = Math.max(1, Math.round((100 * total) / whole));
    words.push(make("span", { className: "key-dot", text: `${share} % of ${count(whole)} at full size` }));
  }
  const cached = make("span", { text: cachedWords(answer) });
  cached.id = "cached";
  const line = make("div", {}, ...words);
  $("token-detail").replaceChildren(line, make("div", {}, cached));
}

export function cachedWords(answer) {
  if (!answer.cached) return `Nothing cached: ${count(answer.prompt)} prompt tokens read now.`;
  return `${count(answer.cached)} of ${count(answer.prompt)} prompt tokens cached from before.`;
}
