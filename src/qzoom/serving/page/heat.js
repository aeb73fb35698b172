// The heat map as colours: relative to its peak, smoothed between the cells, clear where nothing stands out.

const STOPS = [
  [255, 214, 102],
  [255, 150, 46],
  [224, 58, 62],
];
const FAINTEST_PEAK = 0.02;
const STEP = 10;

/** Draw rows of values onto a canvas of `STEP` pixels a cell. Returns whether there was anything to draw. */
export function drawHeat(canvas, rows) {
  const height = rows.length;
  const width = height ? rows[0].length : 0;
  const peak = Math.max(0, ...rows.flat());
  canvas.width = Math.max(1, width * STEP);
  canvas.height = Math.max(1, height * STEP);
  if (!(peak > FAINTEST_PEAK)) return false;
  const pen = canvas.getContext("2d");
  const out = pen.createImageData(canvas.width, canvas.height);
  for (let y = 0, at = 0; y < canvas.height; y++) {
    for (let x = 0; x < canvas.width; x++, at += 4) {
      const heat = sample(rows, (x + 0.5) / STEP - 0.5, (y + 0.5) / STEP - 0.5) / peak;
      const ramp = Math.min(1, Math.max(0, (heat - 0.08) / 0.92));
      colour(heat, out.data, at);
      out.data[at + 3] = 255 * 0.66 * ramp * ramp * (3 - 2 * ramp);
    }
  }
  pen.putImageData(out, 0, 0);
  return true;
}

function colour(heat, data, at) {
  const place = Math.min(0.9999, Math.max(0, heat)) * (STOPS.length - 1);
  const low = Math.floor(place);
  for (let i = 0; i < 3; i++) data[at + i] = STOPS[low][i] + (place - low) * (STOPS[low + 1][i] - STOPS[low][i]);
}

/** Bicubic (Catmull-Rom) value between the cells. */
function sample(rows, x, y) {
  const left = Math.floor(x);
  const top = Math.floor(y);
  const across = weights(x - left);
  const down = weights(y - top);
  let sum = 0;
  for (let j = 0; j < 4; j++) {
    const row = rows[clamp(top + j - 1, rows.length)];
    for (let i = 0; i < 4; i++) sum += down[j] * across[i] * row[clamp(left + i - 1, row.length)];
  }
  return Math.min(Math.max(sum, 0), Infinity);
}

function weights(t) {
  const [t2, t3] = [t * t, t * t * t];
  return [(-t3 + 2 * t2 - t) / 2, (3 * t3 - 5 * t2 + 2) / 2, (-3 * t3 + 4 * t2 + t) / 2, (t3 - t2) / 2];
}

const clamp = (index, length) => Math.min(length - 1, Math.max(0, index));

/** Whether a picture is mostly light, as paper is. */
export function isBright(image) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 16;
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  pen.drawImage(image, 0, 0, 16, 16);
  const { data } = pen.getImageData(0, 0, 16, 16);
  let sum = 0;
  for (let i = 0; i < data.length; i += 4) sum += 0.299 * data[i] + 0.587 * data[i + 1] + 0.114 * data[i + 2];
  return sum / 256 > 130;
}
