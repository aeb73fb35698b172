// Small helpers. Everything that comes from the server or a person enters the page as text, never as markup.

export const $ = (id) => document.getElementById(id);

/** A new element: its class, its text, and children. */
export function make(tag, { className = "", text = "", ...attributes } = {}, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** The same for a drawing. */
export function draw(tag, attributes = {}) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

/** Set or remove a data attribute that style sheets look at. */
export function flag(element, name, value) {
  if (value === false || value === null || value === undefined) delete element.dataset[name];
  else element.dataset[name] = value === true ? "" : value;
}

export const count = (value) => Math.round(value).toLocaleString("en");

export const milliseconds = (value) => (value < 9950 ? `${count(value)} ms` : `${(value / 1000).toFixed(1)} s`);

export const calm = () => window.matchMedia("(prefers-reduced-motion: reduce)").matches;

/** Colours of the regions, in order. */
export const HUES = ["var(--accent)", "#188a76", "#804ec4", "#c48a0c"];

let spoken = 0;

/** Say something to a screen reader; the same text twice is said twice. */
export function say(text) {
  $("live").textContent = text + (spoken++ % 2 ? "\u00a0" : "");
}
