// What the person has set: zoom mode, thresholds, token budget, key. Unset values are left to the model.

import { $, flag } from "./dom.js";
import { setKey } from "./api.js";

const own = { gate_threshold: null, region_threshold: null, max_visual_tokens: null };
const rows = Object.fromEntries([...document.querySelectorAll(".row")].map((row) => [row.dataset.name, row]));

function show(name) {
  const row = rows[name];
  const input = $(name);
  const set = "set" in row.dataset;
  flag(row, "own", !set);
  const known = own[name] === null ? "" : ` (${format(name, own[name])})`;
  row.querySelector("output").textContent = set ? format(name, input.value) : `the model's own${known}`;
  if (!set && own[name] !== null) input.value = own[name];
}

const format = (name, value) => (name === "max_visual_tokens" ? `${value} tokens` : Number(value).toFixed(2));

/** Tell what the model uses where nothing is set. */
export function setOwn(name, value) {
  if (typeof value !== "number") return;
  own[name] = value;
  show(name);
}

/** The highest token budget that the slider offers. */
export function setMostTokens(most) {
  $("max_visual_tokens").max = String(Math.max(64, most));
  show("max_visual_tokens");
}

export const mode = () => document.querySelector('input[name="zoom"]:checked').value;

/** The request's `qzoom` object. */
export function controls(zoom = mode()) {
  const out = { zoom, heatmap: true };
  for (const [name, row] of Object.entries(rows)) if ("set" in row.dataset) out[name] = Number($(name).value);
  return out;
}

/** Call `changed` after a slider or the mode moved, and `keyed` after a new key. */
export function listen(changed, keyed) {
  for (const [name, row] of Object.entries(rows)) {
    $(name).addEventListener("input", () => {
      flag(row, "set", true);
      show(name);
      changed();
    });
    row.querySelector(".reset").addEventListener("click", () => {
      flag(row, "set", false);
      show(name);
      $(name).focus();
      changed();
    });
    show(name);
  }
  $("key").addEventListener("input", () => setKey($("key").value));
  $("key").addEventListener("change", keyed);
}
