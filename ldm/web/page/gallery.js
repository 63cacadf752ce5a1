// The gallery, the large image on the stage, and two images compared.

import { $, make, toast } from "./dom.js";
import { call, download, show } from "./api.js";
import { labelOf, write } from "./form.js";
import { takeFromGallery } from "./source.js";

let images = []; // newest first
let current = null;
let picking = null; // the images picked for a comparison
export let lastSeed = null;

const SAMPLES = ["a fox on a teal background", "a castle on a purple background", "an ice cream on a green background",
  "a snowman on a blue background", "a rocket on a black background", "a duck on a yellow background"];

export async function load() {
  const found = await call("GET", "/api/images");
  images = found.images;
  $("older").hidden = !found.more;
  render();
  if (images.length) stage(images[0]);
  else welcome();
}

// The first visit: what the shipped model draws, ready to be tried.
function welcome() {
  $("shown").src = "/static/sample1.png";
  $("shown").alt = SAMPLES[0];
  $("caption").replaceChildren(make("strong", { textContent: SAMPLES[0] }), "drawn by the model that ships with ldm");
  if (!$("prompt").value) $("prompt").placeholder = SAMPLES[0];
}

function render() {
  $("gallery-hint").textContent = images.length ? "" : "Your images will be here. Until then: prompts to try.";
  $("compare").hidden = images.length < 2;
  $("samples").hidden = images.length > 0;
  if (!images.length && !$("samples").childElementCount) $("samples").append(...SAMPLES.map(sample));
  const have = new Map([...$("images").children].map((item) => [item.dataset.id, item]));
  $("images").replaceChildren(...images.map((one) => have.get(one.id) ?? tile(one)));
}

function sample(text, i) {
  const image = make("img", { src: `/static/sample${i + 1}.png`, alt: "", width: 128, height: 128 });
  return make("button", { type: "button", className: "sample", onclick: () => {
    $("prompt").value = text;
    $("prompt").dispatchEvent(new Event("input", { bubbles: true }));
    $("prompt").focus();
  } }, image, text);
}

function tile(one) {
  const image = make("img", { alt: one.metadata.prompt ?? "", loading: "lazy" });
  show(image, one.url);
  const button = make("button", { type: "button", title: one.metadata.prompt ?? "" }, image);
  button.addEventListener("click", () => (picking ? pick(one, button) : stage(one, true)));
  const item = make("li", {}, button);
  item.dataset.id = one.id;
  return item;
}

export function add(one) {
  if (images.some((other) => other.id === one.id)) return;
  images.unshift(one);
  render();
}

export function remove(id) {
  images = images.filter((one) => one.id !== id);
  render();
  if (current?.id === id) images.length ? stage(images[0]) : (actions(null), welcome());
}

export async function older() {
  const found = await call("GET", `/api/images?before=${images.at(-1).id}`);
  images.push(...found.images);
  $("older").hidden = !found.more;
  render();
}

// Puts an image on the stage.
export function stage(one, scroll = false) {
  current = one;
  lastSeed = one.metadata.seed ?? lastSeed;
  const shown = $("shown");
  shown.classList.remove("preview");
  shown.hidden = false;
  $("many").hidden = true;
  shown.alt = one.metadata.prompt ?? "";
  show(shown, one.url);
  ratio(one.width, one.height);
  const data = one.metadata;
  const facts = one.kind === "grid" ? `grid · ${(data.request?.grid ?? []).join(" · ")}`
    : [`seed ${data.seed}`, `${data.num_inference_steps} steps`, labelOf(data.sampler), `${one.width} × ${one.height}`].join(" · ");
  const words = data.unknown_words?.length ? ` · never shown to the model: ${data.unknown_words.join(", ")}` : "";
  $("caption").replaceChildren(make("strong", { textContent: data.prompt || "without a prompt" }), facts + words);
  actions(one);
  for (const item of $("images").children) item.firstChild.setAttribute("aria-current", item.dataset.id === one.id);
  if (scroll) $("stage").scrollIntoView({ block: "nearest", behavior: "smooth" });
}

export function ratio(width, height) {
  $("canvas-wrap").style.aspectRatio = `${width} / ${height}`;
  $("canvas-wrap").classList.toggle("wide", width > height * 1.3);
}

function actions(one) {
  const button = (text, action) => make("button", { type: "button", className: "ghost", textContent: text, onclick: () =>
    Promise.resolve(action()).catch((error) => toast(error.message)) });
  $("actions").replaceChildren(...(one === null ? [] : [
    button("Use again", () => again(one)),
    ...(one.kind === "grid" ? [] : [button("Start from it", () => takeFromGallery(one))]),
    button("Settings", () => facts(one)),
    button("Download", () => download(one.url)),
    button("Delete", () => call("DELETE", `/api/images/${one.id}`)),
  ]));
}

function again(one) {
  const { request = {}, ...data } = one.metadata;
  write({ ...request, ...(one.kind === "grid" ? {} : { seed: data.seed, num_images: 1, prompt: request.prompt ?? data.prompt,
    num_inference_steps: data.num_inference_steps, guidance_scale: data.guidance_scale, sampler: data.sampler,
    width: data.width, height: data.height }), spacing: request.spacing });
  toast("The form holds the settings of this image.");
  $("prompt").focus();
}

const FACTS = { prompt: "Prompt", negative_prompt: "Negative prompt", seed: "Seed", num_inference_steps: "Steps",
  guidance_scale: "Guidance", sampler: "Sampler", spacing: "Spacing", width: "Width", height: "Height", strength: "Change",
  model: "Model", model_hash: "Model hash", device: "Device", dtype: "Dtype" };

function list(place, rows) {
  place.replaceChildren(...rows.flatMap(([name, value]) => [make("dt", { textContent: name }), make("dd", { textContent: value })]));
}

function facts(one) {
  list($("facts"), Object.entries(FACTS).filter(([name]) => one.metadata[name] != null && one.metadata[name] !== "")
    .map(([name, label]) => [label, String(one.metadata[name])]).concat((one.metadata.lora ?? []).map((l) => ["LoRA", `${l.name}: ${l.weight}`])));
  $("facts-box").showModal();
}

function pick(one, button) {
  picking.push([one, button]);
  button.classList.add("picked");
  button.dataset.pick = picking.length;
  if (picking.length < 2) return;
  const [[a], [b]] = picking;
  leave();
  show($("compare-a"), a.url);
  show($("compare-b"), b.url);
  slide(50);
  const differing = Object.keys(FACTS).filter((name) => String(a.metadata[name] ?? "") !== String(b.metadata[name] ?? ""));
  list($("compare-list"), differing.map((name) => [FACTS[name], `${a.metadata[name] ?? "–"}  →  ${b.metadata[name] ?? "–"}`]));
  $("compare-box").showModal();
}

function leave() {
  for (const [, button] of picking ?? []) button.classList.remove("picked");
  picking = null;
  $("compare").textContent = "Compare two";
  $("gallery-hint").textContent = "";
}

function slide(percent) {
  $("compare-slide").value = percent;
  $("compare-b").style.clipPath = `inset(0 0 0 ${percent}%)`;
  document.querySelector(".compare-line").style.left = `${percent}%`;
}

export function setUp() {
  $("compare").addEventListener("click", () => {
    if (picking) { leave(); return; }
    picking = [];
    $("compare").textContent = "Cancel";
    $("gallery-hint").textContent = "Choose two images.";
  });
  $("compare-slide").addEventListener("input", () => slide(Number($("compare-slide").value)));
  for (const name of ["compare", "facts"]) $(`${name}-close`).addEventListener("click", () => $(`${name}-box`).close());
  $("older").addEventListener("click", () => older().catch((error) => toast(error.message)));
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest("input, textarea, select, dialog, canvas, .handle");
    if (typing || !current || !["ArrowLeft", "ArrowRight"].includes(event.key)) return;
    const next = images[images.findIndex((one) => one.id === current.id) + (event.key === "ArrowRight" ? 1 : -1)];
    if (next) stage(next);
  });
}
