// The same question as a command line: the picture is read from its file, the key from the environment.

/** The command for a request body whose picture is the file `name`; `keyed` adds the header with $QZOOM_API_KEY. */
export function curlCommand(body, { name, type }, origin, keyed) {
  const withPicture = (data) => {
    const url = `data:${type};base64,${data}`;
    const pictures = { image_url: { type: "image_url", image_url: { url } }, file: { type: "file", file: { file_data: url } } };
    const content = body.messages[0].content.map((part) => pictures[part.type] ?? part);
    return JSON.stringify({ ...body, messages: [{ role: "user", content }] }, null, 2);
  };
  let mark = "@";
  while (withPicture("").includes(mark)) mark += "@";
  // In an unquoted here-document the shell still reads backslash, dollar and backtick.
  const [before, after] = withPicture(mark)
    .split(mark)
    .map((text) => text.replace(/[\\$`]/g, "\\$&"));
  const file = `'${name.replaceAll("'", "'\\''")}'`;
  const lines = [
    `curl ${origin}/v1/chat/completions \\`,
    ...(keyed ? [`  -H "Authorization: Bearer $QZOOM_API_KEY" \\`] : []),
    `  -H "Content-Type: application/json" \\`,
    "  --data-binary @- <<END",
    `${before}$(base64 < ${file} | tr -d '\\n')${after}`,
    "END",
  ];
  return lines.join("\n");
}

/** Copy a text; where the browser forbids it (no https) the text is selected instead. Returns whether it was copied. */
export async function copyText(text, element) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    getSelection().selectAllChildren(element);
    return false;
  }
}
