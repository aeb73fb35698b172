// What the page says about the model, and the examples with their questions.

import { $, make } from "./dom.js";

export const EXAMPLES = [
  { file: "receipt.jpg", about: "A till receipt", question: "What is the date?" },
  { file: "card.jpg", about: "A filled-in form", question: "What is the customer name?" },
  { file: "shapes.jpg", about: "Shapes with printed codes", question: "What is the code on the green star?" },
  { file: "delivery-note.jpg", about: "A delivery note, fine print", question: "Who is the customer?" },
];

const ANY = ["What is the date?", "What is the total amount?", "What is the company name?", "What kind of document is this?"];
const SHAPES = ["What is the code on the green star?", "Is there a green star?", "What colour is the background?"];

/** Questions worth trying on a picture. */
export const suggestions = (name) => (name === "shapes.jpg" ? SHAPES : ANY);

const EMBEDDED = {
  lead:
    "This server runs the small model that comes with qzoom: a few million parameters, trained from nothing so that " +
    "everything here can be tried without a download. It is often wrong, and it never says that it does not know. " +
    "Check every answer against the crop. It is no measure of what a large model can do.",
  can: [
    "Printed documents in English: receipts, forms, tables.",
    "Short fields: total, date, number, company or customer, price of an item.",
    "The page as a whole: what kind of document, whether there is a stamp.",
    "Drawn scenes of tagged shapes: code, colour, how many, left or right of.",
  ],
  cannot: [
    "Photographs of the world, people, places, charts.",
    "Handwriting, other languages, long texts.",
    "Reasons, sums, summaries, or anything that is not printed in the picture.",
    "A conversation: each question stands alone.",
  ],
};

/** Say what to expect of the model of this name. */
export function describe(name, embedded) {
  $("about").hidden = false;
  $("about-lists").hidden = !embedded;
  if (!embedded) {
    $("about-lead").textContent =
      `This server answers with ${name}. What it can answer, and how often it is right, its model card says. ` +
      "Check answers against the crop.";
    return;
  }
  $("about-lead").textContent = EMBEDDED.lead;
  const column = (title, items) =>
    make("div", {}, make("h3", { text: title }), make("ul", {}, ...items.map((text) => make("li", { text }))));
  $("about-lists").replaceChildren(column("It can try", EMBEDDED.can), column("It cannot answer", EMBEDDED.cannot));
}
