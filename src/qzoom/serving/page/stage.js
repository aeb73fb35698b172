// The picture with what was seen in it: coarse view, heat map, boxes, and the line from the box to its crop.

import { $, HUES, calm, count, flag, make } from "./dom.js";
import { drawHeat, isBright } from "./heat.js";

const photo = $("photo");
let shown = null; // the picture
let hot = false;

export function showPicture(picture) {
  if (shown) URL.revokeObjectURL(shown.image.src);
  shown = picture;
  $("image").src = picture.image.src;
  $("image").alt = `The picture: ${picture.name}`;
  photo.style.setProperty("--ratio", picture.width / picture.height);
  flag(photo, "bright", isBright(picture.image));
  $("caption").textContent = `${picture.name} · ${count(picture.width)} × ${count(picture.height)} px`;
  $("sent-note").textContent = picture.note;
  $("sent-note").hidden = !picture.note;
  clearSeen();
}

export function clearSeen() {
  hot = false;
  for (const name of ["coarse", "heat"]) {
    flag(photo, name, false);
    $(`show-${name}`).disabled = true;
  }
  $("show-coarse").setAttribute("aria-pressed", "false");
  $("boxes").replaceChildren();
  flag($("link"), "shown", false);
}

export const busy = (on) => flag(photo, "busy", on);

/** Show the pages of a PDF as a strip; `choose(i)` is called when one is picked. A single picture has none. */
export function showStrip(pages, choose) {
  const items = pages.map(({ page, image }, i) => {
    const button = make("button", { type: "button", "aria-label": `Page ${page}` });
    button.append(make("img", { src: image.src, alt: "" }), make("span", { text: String(page) }));
    button.addEventListener("click", () => choose(i));
    return make("li", {}, button);
  });
  $("strip").replaceChildren(...items);
  $("strip").hidden = pages.length < 2;
}

/** Mark the page that is shown, and the one that was read (null for none). */
export function markPage(shownPage, readPage = null) {
  for (const [i, item] of [...$("strip").children].entries()) {
    item.firstElementChild.setAttribute("aria-current", String(i === shownPage));
    flag(item, "read", i === readPage);
    if (i === shownPage) item.scrollIntoView({ block: "nearest", inline: "nearest" });
  }
}

/** Draw the picture as the coarse view saw it: `grid` is (columns, rows) of cells, `cell` their side in pixels. */
export function drawCoarse(grid, cell) {
  const canvas = $("coarse");
  [canvas.width, canvas.height] = grid.map((n) => Math.max(1, Math.round(n * cell)));
  const pen = canvas.getContext("2d");
  pen.imageSmoothingQuality = "high";
  pen.drawImage(shown.image, 0, 0, canvas.width, canvas.height);
  $("show-coarse").disabled = false;
}

/** Show or hide the coarse view; hiding leaves it where the person has switched it on. */
export function showCoarse(on) {
  flag(photo, "coarse", on || $("show-coarse").getAttribute("aria-pressed") === "true");
}

/** Draw the heat map, rows of values over the coarse cells. */
export function showHeat(rows) {
  hot = Boolean(rows?.length) && drawHeat($("heat"), rows);
  $("show-heat").disabled = !hot;
  flag(photo, "heat", hot && $("show-heat").getAttribute("aria-pressed") === "true");
}

/** Outline regions; their boxes are in pixels of a picture of the given size. */
export function showBoxes(regions, [width, height]) {
  const boxes = regions.map((region, i) => {
    const [x0, y0, x1, y1] = region.box;
    const box = make("div", { className: "box" });
    box.dataset.box = region.box.join(",");
    const place = { left: x0 / width, top: y0 / height, width: (x1 - x0) / width, height: (y1 - y0) / height };
    for (const [side, share] of Object.entries(place)) box.style[side] = `${100 * share}%`;
    box.style.setProperty("--hue", HUES[i % HUES.length]);
    if (regions.length > 1) box.append(make("b", { text: String(i + 1) }));
    return box;
  });
  $("boxes").replaceChildren(...boxes);
}

/** The regions cut out of the picture at its own resolution, each with a caption. */
export function showCrops(regions, [width, height], caption) {
  const crops = regions.map((region, i) => {
    const across = shown.width / width;
    const down = shown.height / height;
    const [x0, y0, x1, y1] = region.box;
    const canvas = make("canvas", { role: "img", "aria-label": `Region ${i + 1} of the picture, enlarged` });
    canvas.width = Math.max(1, Math.round((x1 - x0) * across));
    canvas.height = Math.max(1, Math.round((y1 - y0) * down));
    canvas
      .getContext("2d")
      .drawImage(shown.image, x0 * across, y0 * down, canvas.width, canvas.height, 0, 0, canvas.width, canvas.height);
    const frame = make("div", { className: "frame" }, canvas);
    frame.style.setProperty("--hue", HUES[i % HUES.length]);
    return make("figure", { className: "crop" }, frame, make("figcaption", { text: caption(region, i) }));
  });
  $("crops").replaceChildren(...crops);
  if (calm()) linkUp();
  else Promise.allSettled(document.getAnimations().map((a) => (a.effect?.getTiming().iterations === 1 ? a.finished : 0))).then(linkUp);
}

/** Draw the two lines from the first box to its crop. */
export function linkUp() {
  const box = $("boxes").firstElementChild;
  const crop = $("crops").querySelector(".frame");
  const link = $("link");
  flag(link, "shown", Boolean(box && crop));
  if (!box || !crop) return;
  const origin = $("bench").getBoundingClientRect();
  const from = box.getBoundingClientRect();
  const to = crop.getBoundingClientRect();
  const corners = [
    [from.right, from.top],
    [to.left, to.top],
    [to.left, to.bottom],
    [from.right, from.bottom],
  ].map(([x, y]) => `${(x - origin.left).toFixed(1)},${(y - origin.top).toFixed(1)}`);
  link.querySelector("polygon").setAttribute("points", corners.join(" "));
  link.querySelector("path").setAttribute("d", `M${corners[0]} L${corners[1]} M${corners[3]} L${corners[2]}`);
}

new ResizeObserver(linkUp).observe($("bench"));
addEventListener("scroll", linkUp, { passive: true });

for (const name of ["heat", "coarse"]) {
  const button = $(`show-${name}`);
  button.addEventListener("click", () => {
    const on = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(on));
    flag(photo, name, on && (name === "coarse" || hot));
  });
}
