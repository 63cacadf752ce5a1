// The page: starts the parts, sends jobs, and shows what the server tells of them.

import { $, make, store, toast } from "./dom.js";
import { call, listen, Refused, setToken, takeToken } from "./api.js";
import * as form from "./form.js";
import * as source from "./source.js";
import * as gallery from "./gallery.js";

const jobs = new Map(); // waiting and running, in the server's order
const mine = new Set(); // sent by this page: their images go to the stage

async function begin() {
  takeToken();
  theme(store.get("theme"));
  let info;
  try {
    info = await call("GET", "/api/info");
  } catch (error) {
    if (error.status === 401) askToken();
    else $("status").textContent = error.message;
    return;
  }
  form.setUp(info, source.fields);
  source.setUp(editor);
  gallery.setUp();
  form.write(store.get("form", {}));
  document.body.dataset.ready = "yes";
  await gallery.load();
  listen(hear, (connected) => {
    $("status").textContent = connected ? "" : "The server does not answer. The page connects again by itself.";
    if (connected) jobs.clear(), queue();
  });
}

function askToken() {
  $("token-form").addEventListener("submit", (event) => {
    event.preventDefault();
    setToken($("token").value.trim());
    location.reload();
  });
  $("token-box").showModal();
}

function hear(kind, data) {
  if (kind === "image") {
    gallery.add(data.image);
    if (mine.has(data.id) || jobs.get(data.id)?.state === "running") gallery.stage(data.image);
  } else if (kind === "deleted") {
    gallery.remove(data.image);
  } else if (kind === "job" || kind === "progress") {
    if (["done", "failed", "cancelled"].includes(data.state)) {
      jobs.delete(data.id);
      if (data.state === "failed" && mine.has(data.id)) toast(data.error, 12);
      if (data.state === "cancelled" && mine.has(data.id)) toast("Stopped.", 3);
    } else jobs.set(data.id, data);
    if (kind === "progress" && data.previews.length) preview(data);
    queue();
  }
}

// x0 of the images that are being drawn, small, in the place of the finished one.
function preview(job) {
  if (!$("editor").hidden) return;
  gallery.ratio(job.width, job.height);
  const several = job.previews.length > 1;
  $("many").hidden = !several;
  $("shown").hidden = several;
  if (several) {
    const columns = Math.ceil(Math.sqrt(job.previews.length));
    $("many").style.gridTemplateColumns = `repeat(${columns}, 1fr)`;
    $("many").replaceChildren(...job.previews.map((src) => make("img", { src, alt: "" })));
  } else {
    $("shown").classList.add("preview");
    $("shown").src = job.previews[0];
    delete $("shown").dataset.url;
  }
  document.body.dataset.previews = Number(document.body.dataset.previews ?? 0) + 1;
  $("caption").replaceChildren(make("strong", { textContent: job.request.prompt || "without a prompt" }), "drawing …");
  $("actions").replaceChildren();
}

function queue() {
  const running = [...jobs.values()].find((job) => job.state === "running");
  const waiting = [...jobs.values()].filter((job) => job.state === "queued");
  $("stop").hidden = !running;
  $("progress").hidden = !running;
  if (running) {
    const percent = Math.round(running.progress * 100);
    $("progress").firstElementChild.style.width = `${percent}%`;
    $("progress").setAttribute("aria-valuenow", percent);
    const left = running.seconds_left == null ? "" : ` · ${Math.ceil(running.seconds_left)} s left`;
    $("status").textContent = `Drawing ${running.images.length + 1 > running.total ? running.total : running.images.length + 1} of ${running.total}${left}`;
  } else $("status").textContent = "";
  document.title = running ? `${Math.round(running.progress * 100)} % · ldm` : "ldm";
  $("queue").hidden = !waiting.length;
  $("queue-list").replaceChildren(...waiting.map((job) => make("li", {},
    make("span", { textContent: job.request.prompt || "without a prompt" }),
    make("span", { className: "hint", textContent: job.total === 1 ? "1 image" : `${job.total} images` }),
    make("button", { type: "button", className: "ghost small", textContent: "Remove", ariaLabel: `Remove ${job.request.prompt}`,
      onclick: () => stop(job.id) }))));
}

async function generate() {
  if (!$("prompt").value.trim() && !source.fields().image) $("prompt").value = $("prompt").placeholder;
  editor(false);
  try {
    const job = await call("POST", "/api/jobs", form.read());
    mine.add(job.id);
    if (!jobs.has(job.id)) jobs.set(job.id, job);
    queue();
  } catch (error) {
    toast(error instanceof Refused ? error.message : String(error), 10);
  }
}

async function stop(id) {
  try { await call("DELETE", `/api/jobs/${id}`); } catch (error) { if (error.status !== 404) toast(error.message); }
}

function stopRunning() {
  const running = [...jobs.values()].find((job) => job.state === "running");
  if (running) stop(running.id);
  return Boolean(running);
}

function editor(open) {
  $("editor").hidden = !open;
  $("canvas-wrap").hidden = open;
  document.querySelector(".caption").hidden = open;
}

function theme(name) {
  if (name) document.documentElement.dataset.theme = name;
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); generate(); });
$("stop").addEventListener("click", stopRunning);
$("seed-keep").addEventListener("click", () => {
  if (gallery.lastSeed == null) { toast("There is no image yet."); return; }
  $("seed").value = gallery.lastSeed;
  $("seed").dispatchEvent(new Event("input", { bubbles: true }));
});
$("theme").addEventListener("click", () => {
  const dark = getComputedStyle(document.documentElement).colorScheme.includes("dark");
  theme(dark ? "light" : "dark");
  store.set("theme", dark ? "light" : "dark");
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); generate(); }
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
    if (!$("editor").hidden) editor(false);
    else stopRunning();
  }
  if (event.key.toLowerCase() === "z" && (event.ctrlKey || event.metaKey) && !$("editor").hidden && !event.target.closest("textarea, input")) {
    event.preventDefault();
    source.undo();
  }
});
begin();
