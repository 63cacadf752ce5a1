// Requests to the server. Where it wants a token, every request carries it; no cookie is used.

let token = null;
const me = (crypto.randomUUID?.() ?? String(Math.random())).slice(0, 36);

export function takeToken() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) {
    sessionStorage.setItem("ldm.token", given);
    history.replaceState(null, "", location.pathname);
  }
  token = sessionStorage.getItem("ldm.token");
}

export function setToken(text) {
  sessionStorage.setItem("ldm.token", text);
  token = text;
}

function headers(more = {}) {
  return { "X-Client": me, ...(token ? { Authorization: `Bearer ${token}` } : {}), ...more };
}

export class Refused extends Error {
  constructor(status, text, field) {
    super(text);
    this.status = status;
    this.field = field;
  }
}

export async function call(method, path, body) {
  const sent = body === undefined ? {} : { body: JSON.stringify(body) };
  const kind = body === undefined ? {} : { "Content-Type": "application/json" };
  let answer;
  try {
    answer = await fetch(path, { method, headers: headers(kind), ...sent });
  } catch {
    throw new Refused(0, "The server does not answer. Is it still running?");
  }
  const value = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Refused(answer.status, value.error || `error ${answer.status}`, value.field);
  return value;
}

// Images: by their address, or with a token through fetch, since <img> sends none.
const known = new Map();
export async function show(img, url) {
  img.dataset.url = url;
  if (!token) { img.src = url; return; }
  if (!known.has(url)) known.set(url, URL.createObjectURL(await blob(url)));
  if (img.dataset.url === url) img.src = known.get(url);
}

export async function blob(url) {
  const answer = await fetch(url, { headers: headers() });
  if (!answer.ok) throw new Refused(answer.status, "the image is gone");
  return answer.blob();
}

export async function download(url) {
  const answer = await fetch(`${url}?download=1`, { headers: headers() });
  if (!answer.ok) throw new Refused(answer.status, "the image is gone");
  const name = /filename="([^"]+)"/.exec(answer.headers.get("content-disposition") ?? "")?.[1] ?? "image.png";
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await answer.blob());
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// Server-sent events by fetch, which can carry the token; connects again when the connection ends.
export async function listen(handle, connected) {
  for (;;) {
    try {
      const answer = await fetch("/api/events", { headers: headers({ Accept: "text/event-stream" }) });
      if (!answer.ok) throw new Refused(answer.status, "no events");
      connected(true);
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let text = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) break;
        text += value;
        const parts = text.split("\n\n");
        text = parts.pop();
        for (const part of parts) dispatch(part, handle);
      }
    } catch { /* below */ }
    connected(false);
    await new Promise((resolve) => setTimeout(resolve, 1500));
  }
}

function dispatch(part, handle) {
  const kind = /^event: (.*)$/m.exec(part)?.[1];
  const data = /^data: (.*)$/m.exec(part)?.[1];
  if (kind && data) handle(kind, JSON.parse(data));
}
