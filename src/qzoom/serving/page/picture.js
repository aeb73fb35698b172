// A picture as it is shown and as it is sent: a data URL, made smaller only where the server would refuse it.

const SENT_AS_IS = new Set(["image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp"]);

/** Whether the server must draw a file: a PDF, or a photo of a phone that browsers cannot show. */
export const isDrawn = (blob, name) => /\/(pdf|hei[cf])\b/.test(blob.type) || /\.(pdf|hei[cf])$/i.test(name);

/**
 * Read a PDF, or a photo that only the server can show; `limits()` waits until the server has said what it takes.
 *
 * `draw(url)` asks the server for its pages. Returns what `readPicture` does, of the first page, with `pages`: the same
 * for every page, with its number.
 */
export async function readPages(blob, name, limits, draw) {
  if (blob.size > (await limits()).bytes) throw new Error(`${name} is larger than what this server takes.`);
  const type = /pdf/i.test(blob.type + name) ? "application/pdf" : "image/heic";
  const url = (await dataUrl(blob)).replace(/^data:[^,]*,/, `data:${type};base64,`);
  const drawn = await draw(url);
  const pages = await Promise.all(
    drawn.pages.map(async ({ page, size: [width, height], url: shown }) => {
      const image = await load(shown, name);
      return { name: type === "application/pdf" ? `${name}, page ${page}` : name, page, image, width, height, note: "" };
    }),
  );
  return { ...pages[0], name, type, url, pages, note: drawn.notes.join(" "), sent: [pages[0].width, pages[0].height] };
}

/**
 * Read a picture; `limits()` as above.
 *
 * Returns name, media type, the loaded image, its own and its sent width and height, the data URL, and a note where what
 * is sent is not the file itself. Throws a plain sentence when the browser cannot show it.
 */
export async function readPicture(blob, name, limits) {
  const type = blob.type.split(";")[0];
  const image = await load(URL.createObjectURL(blob), name);
  const picture = { name, type, image, width: image.naturalWidth, height: image.naturalHeight };
  const { bytes, pixels } = await limits();
  const tooLarge = blob.size > bytes || picture.width * picture.height > pixels;
  if (!tooLarge && SENT_AS_IS.has(type)) {
    return { ...picture, sent: [picture.width, picture.height], url: await dataUrl(blob), note: "" };
  }
  const smaller = await encode(image, { bytes, pixels });
  const size = `${smaller.width.toLocaleString("en")} × ${smaller.height.toLocaleString("en")} px`;
  const note = tooLarge
    ? `Sent smaller, as a JPEG of ${size}: the file is above what this server takes.`
    : `Sent as a JPEG of ${size}: the file's own format is not one that servers commonly read.`;
  return { ...picture, sent: [smaller.width, smaller.height], url: await dataUrl(smaller.blob), note };
}

function load(url, name) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => {
      URL.revokeObjectURL(url);
      reject(new Error(`This browser cannot show ${name}. Choose a JPEG, PNG or WebP picture.`));
    };
    image.src = url;
  });
}

/** Encode as JPEG on white, in steps of about three quarters of the pixels until it is within the limits. */
async function encode(image, limits) {
  const pixels = image.naturalWidth * image.naturalHeight;
  let scale = Math.min(1, Math.sqrt(limits.pixels / pixels));
  for (;;) {
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.floor(image.naturalWidth * scale));
    canvas.height = Math.max(1, Math.floor(image.naturalHeight * scale));
    const pen = canvas.getContext("2d");
    pen.fillStyle = "#fff";
    pen.fillRect(0, 0, canvas.width, canvas.height);
    pen.imageSmoothingQuality = "high";
    pen.drawImage(image, 0, 0, canvas.width, canvas.height);
    const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.9));
    if (blob && blob.size <= limits.bytes) return { blob, width: canvas.width, height: canvas.height };
    if (scale < 0.02) throw new Error("This picture cannot be made small enough for this server.");
    scale *= 0.86;
  }
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("The file cannot be read. Choose it again."));
    reader.readAsDataURL(blob);
  });
}
