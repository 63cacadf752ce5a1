// The form: the model's defaults, what it holds as a request, and a request back into it.

import { $, later, make, store } from "./dom.js";
import { call } from "./api.js";

const AXES = { steps: "Steps", cfg: "Guidance", sampler: "Sampler", seed: "Seed", prompt: "Prompt", spacing: "Spacing" };
let info = null;
let extra = {}; // settings of a restored image that have no field here
let source = () => ({});

export const model = () => info.models.find((one) => one.name === $("model").value) ?? info.models[0];
export const labelOf = (sampler) => model().samplers.find((one) => one.name === sampler)?.label ?? sampler;
export const limits = () => info.limits;

export function setUp(found, fromSource) {
  info = found;
  source = fromSource;
  $("model").replaceChildren(...info.models.map((one) => make("option", { value: one.name, textContent: one.name })));
  const vaes = [["", "of the model"], ...info.vaes.map((name) => [name, name])];
  $("vae").replaceChildren(...vaes.map(([value, textContent]) => make("option", { value, textContent })));
  $("loras").replaceChildren(...(info.loras.length ? info.loras.map(loraRow)
    : [make("p", { className: "hint", textContent: "LoRAs appear here when the server is started with --lora or --lora-dir." })]));
  for (const [id, first] of [["x-word", ""], ["y-word", ""]]) {
    const words = [["", first || "none"], ...Object.entries(AXES)];
    $(id).replaceChildren(...words.map(([value, textContent]) => make("option", { value, textContent })));
  }
  $("model").addEventListener("change", () => { takeModel(); count(); });
  for (const id of ["steps", "guidance", "strength", "variation", "hires", "hires-strength"]) $(id).addEventListener("input", showSliders);
  for (const id of ["width", "height"]) $(id).addEventListener("input", pressShapes);
  for (const id of ["x-word", "y-word"]) $(id).addEventListener("change", () => example(id));
  $("seed-random").addEventListener("click", () => { $("seed").value = ""; pressSeeds(); });
  $("seed").addEventListener("input", pressSeeds);
  for (const id of ["prompt", "negative"]) $(id).addEventListener("input", count);
  $("form").addEventListener("input", later(300, () => store.set("form", read(true))));
  takeModel();
}

function loraRow(name) {
  const weight = make("input", { type: "number", step: "0.1", min: "-2", max: "2", value: "1", ariaLabel: `Weight of ${name}` });
  const check = make("input", { type: "checkbox", value: name, ariaLabel: `Use ${name}` });
  return make("label", { className: "lora" }, check, make("span", { textContent: name, title: name }), weight);
}

// What the model says of itself fills the form; a user's own values stay where they are valid.
function takeModel() {
  const one = model();
  const choices = (values, first) => [["", first], ...values.map((v) => [v.name, v.label])];
  const own = one.samplers.find((s) => s.name === one.sampler)?.label ?? one.sampler;
  fill($("sampler"), choices(one.samplers, `${own} (the model's)`));
  fill($("spacing"), choices(one.spacings, one.spacings.length ? "the model's" : "its own (flow)"));
  $("spacing").disabled = !one.spacings.length;
  $("steps").value = one.steps;
  $("guidance").value = one.guidance_scale;
  $("hires-strength").value = one.hires_strength;
  for (const side of ["width", "height"]) {
    $(side).value = one[side];
    $(side).step = $(side).min = one.factor;
  }
  shapes(one);
  showSliders();
}

function fill(select, pairs) {
  const before = select.value;
  select.replaceChildren(...pairs.map(([value, textContent]) => make("option", { value, textContent })));
  if (pairs.some(([value]) => value === before)) select.value = before;
}

function shapes(one) {
  const round = (side) => Math.max(one.factor, Math.round(side / one.factor) * one.factor);
  const kinds = [["Square", 1, 1], ["Portrait", 0.75, 1], ["Landscape", 1, 0.75], ["Wide", 1.5, 0.75]];
  $("shapes").replaceChildren(...kinds.map(([name, w, h]) => {
    const width = round(one.width * w), height = round(one.height * h);
    const icon = make("i");
    icon.style.width = `${16 * w}px`;
    icon.style.height = `${16 * h}px`;
    const chip = make("button", { type: "button", className: "chip", title: `${width} × ${height}` }, icon, name);
    chip.dataset.size = `${width}x${height}`;
    chip.addEventListener("click", () => { $("width").value = width; $("height").value = height; pressShapes(); });
    return chip;
  }));
  pressShapes();
}

function pressShapes() {
  const size = `${$("width").value}x${$("height").value}`;
  for (const chip of $("shapes").children) chip.setAttribute("aria-pressed", chip.dataset.size === size);
}

function pressSeeds() {
  $("seed-random").setAttribute("aria-pressed", $("seed").value.trim() === "");
  $("seed-keep").setAttribute("aria-pressed", $("seed").value.trim() !== "");
}

function showSliders() {
  $("steps-out").textContent = $("steps").value;
  $("guidance-out").textContent = $("guidance").value === "1" ? "off" : $("guidance").value;
  for (const id of ["strength", "variation", "hires-strength"]) $(`${id}-out`).textContent = `${Math.round($(id).value * 100)} %`;
  if ($("variation").value === "0") $("variation-out").textContent = "off";
  $("hires-out").textContent = $("hires").value === "1" ? "off" : `× ${$("hires").value}`;
}

function example(id) {
  const field = $(id.replace("word", "values"));
  const [one, other] = model().samplers.map((s) => s.label);
  const examples = { steps: "4, 8, 16", cfg: "2, 4, 8", sampler: `${one}, ${other ?? one}`, seed: "1-4",
    prompt: `${$("prompt").value.split(" ")[1] || "cat"}->dog, horse`, spacing: "karras, simple" };
  field.placeholder = examples[$(id).value] ?? "";
  if (!field.value) field.value = field.placeholder;
}

// The form as a request; `all` keeps what equals the model's defaults, for the next visit.
export function read(all = false) {
  const one = model();
  const fields = { ...extra, prompt: $("prompt").value };
  const put = (name, value, own) => { if (value !== "" && (all || value !== own)) fields[name] = value; };
  put("negative_prompt", $("negative").value, "");
  put("num_images", Number($("num").value) || 1, 1);
  if ($("seed").value.trim() !== "") fields.seed = Number($("seed").value);
  put("num_inference_steps", Number($("steps").value), one.steps);
  put("guidance_scale", Number($("guidance").value), one.guidance_scale);
  put("sampler", $("sampler").value, "");
  if (one.spacings.length) put("spacing", $("spacing").value, "");
  put("variation_strength", Number($("variation").value), 0);
  if (fields.variation_strength && $("variation-seed").value.trim() !== "") fields.variation_seed = Number($("variation-seed").value);
  if ($("hires").value !== "1") {
    fields.hires_scale = Number($("hires").value);
    put("hires_strength", Number($("hires-strength").value), one.hires_strength);
    if ($("hires-steps").value) fields.hires_steps = Number($("hires-steps").value);
  }
  if ($("step-cache").value) fields.step_cache = Number($("step-cache").value);
  put("model", $("model").value, info.models[0].name);
  put("vae", $("vae").value, "");
  const loras = [...$("loras").querySelectorAll("input:checked")].map((box) =>
    [box.value, Number(box.closest(".lora").querySelector("[type=number]").value)]);
  if (loras.length) fields.lora = loras;
  if (all) return { ...fields, width: Number($("width").value), height: Number($("height").value) };
  const drawn = source();
  if (!drawn.image) {
    fields.width = Number($("width").value);
    fields.height = Number($("height").value);
  }
  const axes = ["x", "y"].filter((axis) => $(`${axis}-word`).value && $(`${axis}-values`).value.trim())
    .map((axis) => `${$(`${axis}-word`).value}=${$(`${axis}-values`).value}`);
  if ($("grid-box").open && axes.length) {
    fields.grid = axes;
    delete fields.num_images;
  }
  return { ...fields, ...drawn };
}

// A request, or what is known of an image, into the form.
export function write(fields) {
  if (info.models.some((one) => one.name === fields.model)) $("model").value = fields.model;
  takeModel();
  const known = ["prompt", "negative_prompt", "num_images", "seed", "num_inference_steps", "guidance_scale", "sampler",
    "spacing", "model", "vae", "lora", "width", "height", "grid", "image", "mask_image", "outpaint", "strength",
    "variation_seed", "variation_strength", "hires_scale", "hires_steps", "hires_strength", "step_cache"];
  extra = Object.fromEntries(Object.entries(fields).filter(([name]) => !known.includes(name)));
  const set = (id, value, otherwise = "") => { $(id).value = value ?? otherwise; };
  set("prompt", fields.prompt);
  set("negative", fields.negative_prompt);
  set("num", fields.num_images, 1);
  set("seed", Array.isArray(fields.seed) ? fields.seed[0] : fields.seed);
  if (fields.num_inference_steps) {
    $("steps").max = Math.max(60, fields.num_inference_steps);
    set("steps", fields.num_inference_steps);
  }
  if (fields.guidance_scale != null) {
    $("guidance").max = Math.max(15, fields.guidance_scale);
    set("guidance", fields.guidance_scale);
  }
  for (const id of ["sampler", "spacing", "vae"]) if ([...$(id).options].some((o) => o.value === fields[id])) set(id, fields[id]);
  for (const side of ["width", "height"]) if (fields[side]) set(side, fields[side]);
  if (fields.strength) set("strength", fields.strength);
  set("variation", fields.variation_strength, 0);
  set("variation-seed", Array.isArray(fields.variation_seed) ? fields.variation_seed[0] : fields.variation_seed);
  set("hires", fields.hires_scale, 1);
  set("hires-strength", fields.hires_strength, model().hires_strength);
  set("hires-steps", fields.hires_steps);
  set("step-cache", fields.step_cache);
  $("speed-box").open ||= $("step-cache").value !== "";
  $("variation-box").open ||= $("variation").value !== "0";
  $("hires-box").open ||= $("hires").value !== "1";
  const weights = new Map((fields.lora ?? []).map((pair) => [pair[0], pair[1]]));
  for (const box of $("loras").querySelectorAll("[type=checkbox]")) {
    box.checked = weights.has(box.value);
    if (box.checked) box.closest(".lora").querySelector("[type=number]").value = weights.get(box.value);
  }
  pressShapes();
  pressSeeds();
  showSliders();
  count();
}

// How the model reads the prompts.
const count = later(250, async () => {
  const asked = { prompt: $("prompt").value, negative_prompt: $("negative").value, model: $("model").value };
  try {
    const found = await call("POST", "/api/prompt", asked);
    note($("prompt-note"), found.prompt, asked.prompt);
    note($("negative-note"), found.negative_prompt, asked.negative_prompt);
  } catch { /* the form works without it */ }
});

function note(place, found, text) {
  place.replaceChildren();
  if (!text.trim()) return;
  if (found.error) { place.append(make("span", { className: "bad", textContent: found.error })); return; }
  const many = found.chunks > 1 ? ` in ${found.chunks} parts of ${found.chunk}` : ` of ${found.chunk}`;
  place.append(`${found.tokens}${many} tokens`);
  if (found.unknown_words.length) {
    place.append(" · ", make("b", { textContent: "never shown to the model: " }), found.unknown_words.join(", "));
  }
  for (const line of found.remarks) place.append(" · ", make("b", { textContent: line }));
  if (found.truncated) place.append(" · ", make("b", { textContent: "cut off: " }), found.truncated);
}
