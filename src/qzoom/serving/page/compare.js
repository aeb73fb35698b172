// The same question three times: never, auto, always, side by side.

import { $, calm, count, flag, make, milliseconds, say } from "./dom.js";
import { cachedWords, tokenBar } from "./result.js";

const WAYS = [
  ["never", "Never", "answers from the coarse pass"],
  ["auto", "Auto", "the gate decides"],
  ["always", "Always", "reads the region"],
];

/** Ask `askOnce(mode)` for each way, one after the other, and fill the columns. */
export async function compare(question, askOnce, alive) {
  $("comparison").hidden = false;
  $("compare-question").textContent = question;
  const columns = WAYS.map(([mode, title, words]) => {
    const heading = make("h3", { text: title }, make("small", { text: words }));
    const text = make("p", { className: "text" });
    return make("section", { className: "column", "data-mode": mode, "aria-busy": "true", "aria-label": title }, heading, text);
  });
  $("columns").replaceChildren(...columns);
  $("comparison").scrollIntoView({ block: "nearest", behavior: calm() ? "auto" : "smooth" });
  const answers = [];
  for (const [i, [mode]] of WAYS.entries()) {
    let answer;
    try {
      answer = await askOnce(mode);
    } catch (error) {
      for (const column of columns.slice(i)) fail(column, alive() ? error.message : "Stopped.");
      return;
    }
    if (!alive()) return;
    answers.push(answer);
    fill(columns[i], answer);
    const most = Math.max(...answers.map((a) => a.coarse + a.region));
    for (const [j, done] of answers.entries()) tokenBar(columns[j].querySelector(".bar"), done, most);
  }
  say(`Compared. ${WAYS.map(([, title], i) => `${title}: ${answers[i].text || "empty"}`).join(". ")}.`);
}

function fill(column, answer) {
  column.setAttribute("aria-busy", "false");
  flag(column, "zoomed", answer.zoomed ? "yes" : "no");
  column.querySelector(".text").textContent = answer.text || "(an empty answer)";
  const score = typeof answer.score === "number" ? answer.score.toFixed(2) : "not asked";
  const facts = [
    ["Visual tokens", count(answer.coarse + answer.region), "tokens"],
    ["Time", milliseconds(answer.ms), "time"],
    ["Gate", score, "gate"],
    ["Zoomed", answer.zoomed ? "yes" : "no", "zoomed"],
  ];
  const list = make("dl", {});
  for (const [name, value, key] of facts) {
    list.append(make("dt", { text: name }), make("dd", { text: value, "data-fact": key }));
    if (key === "tokens") list.append(make("dd", { className: "bar wide", "aria-hidden": "true" }));
  }
  column.append(list, make("p", { className: "hint", text: cachedWords(answer) }));
}

function fail(column, message) {
  column.setAttribute("aria-busy", "false");
  column.append(make("p", { className: "alert", text: message }));
}
