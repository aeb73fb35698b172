// The gate's dial: its score against the threshold.

import { $, draw, flag } from "./dom.js";

const ARC = "M16 100 A84 84 0 0 1 184 100";
const parts = {};

function build() {
  const svg = draw("svg", { viewBox: "0 0 200 128", role: "meter", "aria-label": "Gate score" });
  svg.setAttribute("aria-valuemin", "0");
  svg.setAttribute("aria-valuemax", "1");
  parts.value = draw("path", { d: ARC, class: "dial-value", pathLength: "1", "stroke-dasharray": "1 2" });
  parts.mark = draw("line", { class: "dial-mark", x1: "5", x2: "28", y1: "100", y2: "100" });
  parts.number = draw("text", { class: "dial-number", x: "100", y: "98" });
  svg.append(draw("path", { d: ARC, class: "dial-track" }), parts.value, parts.mark, parts.number);
  parts.svg = svg;
  $("dial").append(svg);
}

/** Show a gate: `score` and `threshold` are null when it was not asked. `words` says what came of it. */
export function showGate({ score, threshold }, words) {
  if (!parts.svg) build();
  const asked = typeof score === "number";
  parts.number.textContent = asked ? score.toFixed(2) : "–";
  parts.value.style.strokeDashoffset = String(asked ? 1 - Math.max(score, 0.0001) : 1);
  parts.value.style.visibility = asked && score > 0.004 ? "visible" : "hidden";
  flag(parts.value, "over", asked && score >= threshold);
  const marked = asked && typeof threshold === "number";
  parts.mark.style.visibility = marked ? "visible" : "hidden";
  if (marked) parts.mark.setAttribute("transform", `rotate(${180 * threshold} 100 100)`);
  parts.svg.dataset.score = asked ? String(score) : "";
  parts.svg.dataset.threshold = marked ? String(threshold) : "";
  if (asked) parts.svg.setAttribute("aria-valuenow", score.toFixed(3));
  else parts.svg.removeAttribute("aria-valuenow");
  parts.svg.setAttribute("aria-valuetext", asked ? `${score.toFixed(2)}. ${words}` : words);
  $("verdict").textContent = words;
}

/** What a gate's numbers mean, in words. */
export function verdict(gate, mode) {
  if (typeof gate.score !== "number") {
    return mode === "always" ? "Not asked: it always zooms." : "Not asked: it never zooms.";
  }
  const at = `zooms from ${gate.threshold.toFixed(2)}`;
  if (gate.score < gate.threshold) return `The coarse view is enough; it ${at}.`;
  return gate.zoomed === false && gate.note ? `It wanted to zoom: ${gate.note}` : `A closer look is needed; it ${at}.`;
}
