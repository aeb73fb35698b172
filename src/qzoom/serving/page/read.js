// The server's JSON as the page uses it.

/**
 * Gate, regions and map of the first chunk (or of /v1/perceive).
 *
 * Returns gate, `image` (the number of the page that it read, else `page`), regions of that page, its size as the server
 * saw it, `sizes` of all, `rows` (the map), `grid` (columns, rows of the coarse view, null if unknown) and `cell`, the
 * pixels of a cell's side.
 */
export function readSeen(qzoom, sent, cell, page = 0) {
  const image = qzoom.regions?.[0]?.image ?? page;
  const rows = qzoom.heatmap?.[image] ?? [];
  return {
    gate: qzoom.gate ?? { score: null, threshold: null, zoomed: false },
    regions: (qzoom.regions ?? []).filter((region) => region.image === image),
    image,
    size: qzoom.image_sizes?.[image] ?? sent,
    sizes: qzoom.image_sizes ?? [sent],
    rows,
    grid: rows.length ? [rows[0].length, rows.length] : null,
    cell,
  };
}

/** Tokens of an answer's usage. */
export function readUsage(usage) {
  const details = usage?.prompt_tokens_details ?? {};
  return {
    prompt: usage?.prompt_tokens ?? 0,
    cached: details.cached_tokens ?? 0,
    coarse: details.coarse_tokens ?? 0,
    region: details.region_tokens ?? 0,
  };
}

/** The coarse view's (columns, rows), from its tokens and the picture's shape, where no map tells them. */
export function guessGrid(tokens, [width, height]) {
  const columns = Math.max(1, Math.round(Math.sqrt((tokens * width) / height)));
  return [columns, Math.max(1, Math.round(tokens / columns))];
}
