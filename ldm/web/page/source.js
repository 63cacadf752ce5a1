// The image to start from: dropped or chosen, a mask painted over it, its sides pulled out.

import { $, make, toast } from "./dom.js";
import { blob, call } from "./api.js";
import { limits, model, write } from "./form.js";

const OFTEN_READ = { willReadFrequently: true };
let image = null; // {bitmap, data: a data: URL, or {id}}, in the size that is sent
let found = null; // settings of a dropped PNG
let sides = { left: 0, right: 0, top: 0, bottom: 0 };
let mask = null; // a canvas of the image's size: white is drawn anew
let past = []; // masks before each stroke
let erasing = false;
let scale = 1; // screen pixels an image pixel

export function fields() {
  if (!image) return {};
  const drawn = { image: image.data, strength: Number($("strength").value) };
  if (painted()) drawn.mask_image = mask.toDataURL("image/png");
  if (Object.values(sides).some(Boolean)) {
    drawn.outpaint = Object.fromEntries(Object.entries(sides).filter(([, pixels]) => pixels));
    if (!painted()) delete drawn.strength;
  }
  return drawn;
}

const painted = () => mask && past.length > 0 &&
  mask.getContext("2d", OFTEN_READ).getImageData(0, 0, mask.width, mask.height).data.some((value, i) => i % 4 === 0 && value > 127);

export function setUp(onEditor) {
  $("file").addEventListener("change", () => { if ($("file").files[0]) take($("file").files[0]); });
  $("file").addEventListener("click", () => { $("file").value = ""; });
  $("source-clear").addEventListener("click", clear);
  $("restore").addEventListener("click", () => { write(found); toast("The settings of the image are back."); });
  $("edit-open").addEventListener("click", () => { onEditor(true); draw(); $("mask").focus({ preventScroll: true }); $("editor").scrollIntoView(); });
  $("edit-close").addEventListener("click", () => onEditor(false));
  $("tool-paint").addEventListener("click", () => tool(false));
  $("tool-erase").addEventListener("click", () => tool(true));
  $("undo").addEventListener("click", undo);
  $("mask-clear").addEventListener("click", () => { keep(); wipe(); sides = { left: 0, right: 0, top: 0, bottom: 0 }; draw(); });
  window.addEventListener("resize", () => { if (!$("editor").hidden) draw(); });
  paintBy($("mask"));
  for (const handle of document.querySelectorAll(".handle")) pullBy(handle);
  window.addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files ?? [])].find((one) => one.type.startsWith("image/"));
    if (file) take(file);
  });
  let depth = 0;
  const files = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  window.addEventListener("dragenter", (event) => { if (files(event)) { depth++; $("veil").hidden = false; } });
  window.addEventListener("dragleave", (event) => { if (files(event) && --depth <= 0) { depth = 0; $("veil").hidden = true; } });
  window.addEventListener("dragover", (event) => { if (files(event)) event.preventDefault(); });
  window.addEventListener("drop", (event) => {
    depth = 0;
    $("veil").hidden = true;
    if (!files(event)) return;
    event.preventDefault();
    const file = event.dataTransfer.files[0];
    if (file) event.target.closest?.(".source, .editor") ? take(file) : drop(file);
  });
}

// A file of this computer to start from; where it says how it was made, its settings are offered.
export async function take(file) {
  const data = await dataOf(file);
  if (!data) return;
  try {
    await begin(await createImageBitmap(file), data);
  } catch {
    toast("That file is no image that can be read (PNG, JPEG, WebP).");
    return;
  }
  found = (await settingsOf(data))?.fields ?? null;
  $("restore").hidden = !found;
}

// A file that is dropped anywhere else: its settings where it has some, else an image to start from.
async function drop(file) {
  const data = await dataOf(file);
  const answer = data && await settingsOf(data);
  if (!answer) { if (data) await take(file); return; }
  write(answer.fields);
  toast(["The settings of the image are restored.", ...answer.notes.slice(0, 2)].join(" "));
}

async function dataOf(file) {
  if (file.size > limits().upload * 0.7) { toast("The image is larger than 14 MB."); return null; }
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = reject;
    reader.readAsDataURL(file);
  });
}

async function settingsOf(data) {
  try { return await call("POST", "/api/read", { image: data }); } catch { return null; }
}

// An image of the gallery.
export async function takeFromGallery(one) {
  await begin(await createImageBitmap(await blob(one.url)), { id: one.id });
}

async function begin(bitmap, data) {
  image = { bitmap, data };
  found = null;
  sides = { left: 0, right: 0, top: 0, bottom: 0 };
  past = [];
  mask = make("canvas", { width: bitmap.width, height: bitmap.height });
  wipe();
  const small = make("canvas", { width: 192, height: Math.max(1, Math.round(192 * bitmap.height / bitmap.width)) });
  small.getContext("2d").drawImage(bitmap, 0, 0, small.width, small.height);
  $("source-thumb").src = small.toDataURL();
  $("drop").hidden = true;
  $("source-tools").hidden = false;
  $("restore").hidden = true;
  if (!$("editor").hidden) draw();
}

export function clear() {
  image = found = mask = null;
  past = [];
  $("drop").hidden = false;
  $("source-tools").hidden = true;
  $("edit-close").click();
}

function wipe() {
  const pen = mask.getContext("2d", OFTEN_READ);
  pen.fillStyle = "#000";
  pen.fillRect(0, 0, mask.width, mask.height);
}

function tool(erase) {
  erasing = erase;
  $("tool-paint").setAttribute("aria-pressed", !erase);
  $("tool-erase").setAttribute("aria-pressed", erase);
}

function keep() {
  past.push({ pixels: mask.getContext("2d", OFTEN_READ).getImageData(0, 0, mask.width, mask.height), sides: { ...sides } });
  if (past.length > 30) past.shift();
}

export function undo() {
  const before = past.pop();
  if (!before) return;
  mask.getContext("2d", OFTEN_READ).putImageData(before.pixels, 0, 0);
  sides = before.sides;
  draw();
}

// The image with its new sides, and the mask over it in blue.
function draw() {
  if (!image) return;
  const board = $("mask");
  const width = image.bitmap.width + sides.left + sides.right, height = image.bitmap.height + sides.top + sides.bottom;
  const room = $("sheet").parentElement.clientWidth - 80;
  scale = Math.max(0.1, Math.min(room / width, Math.max(240, innerHeight - 320) / height, 4));
  board.width = width;
  board.height = height;
  board.style.width = `${width * scale}px`;
  board.style.height = `${height * scale}px`;
  const pen = board.getContext("2d");
  pen.clearRect(0, 0, width, height);
  pen.drawImage(image.bitmap, sides.left, sides.top);
  const tint = make("canvas", { width: mask.width, height: mask.height });
  const ink = tint.getContext("2d");
  const pixels = mask.getContext("2d", OFTEN_READ).getImageData(0, 0, mask.width, mask.height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    const on = pixels.data[i] > 127;
    pixels.data.set([64, 92, 255, on ? 165 : 0], i);
  }
  ink.putImageData(pixels, 0, 0);
  pen.drawImage(tint, sides.left, sides.top);
  const grown = Object.entries(sides).filter(([, n]) => n).map(([side, n]) => `${n} ${side}`).join(", ");
  $("editor-note").textContent = grown ? `${width} × ${height}: ${grown} are new`
    : "Paint what is to be drawn anew. Pull a handle, or use its arrow keys, to extend the image.";
}

function paintBy(board) {
  let last = null;
  const place = (event) => {
    const box = board.getBoundingClientRect();
    return [(event.clientX - box.left) / scale - sides.left, (event.clientY - box.top) / scale - sides.top];
  };
  const stroke = (to) => {
    const pen = mask.getContext("2d", OFTEN_READ);
    pen.strokeStyle = erasing ? "#000" : "#fff";
    pen.lineWidth = Number($("brush").value) * Math.max(1, image.bitmap.width / 256);
    pen.lineCap = pen.lineJoin = "round";
    pen.beginPath();
    pen.moveTo(...(last ?? to));
    pen.lineTo(to[0] + 0.01, to[1]);
    pen.stroke();
    last = to;
    draw();
  };
  board.addEventListener("pointerdown", (event) => {
    if (!image || event.button) return;
    board.setPointerCapture(event.pointerId);
    keep();
    last = null;
    stroke(place(event));
  });
  board.addEventListener("pointermove", (event) => { if (last) stroke(place(event)); });
  for (const kind of ["pointerup", "pointercancel"]) board.addEventListener(kind, () => (last = null));
}

function pullBy(handle) {
  const side = handle.dataset.side;
  const across = side === "left" || side === "right", sign = side === "left" || side === "top" ? -1 : 1;
  let from = null;
  const set = (pixels) => {
    const { factor } = model();
    sides[side] = Math.min(1024, Math.max(0, Math.round(pixels / factor) * factor));
    draw();
  };
  handle.addEventListener("pointerdown", (event) => {
    handle.setPointerCapture(event.pointerId);
    keep();
    from = { at: across ? event.clientX : event.clientY, pixels: sides[side], scale };
  });
  handle.addEventListener("pointermove", (event) => {
    if (from) set(from.pixels + sign * ((across ? event.clientX : event.clientY) - from.at) / from.scale);
  });
  for (const kind of ["pointerup", "pointercancel"]) handle.addEventListener(kind, () => (from = null));
  handle.addEventListener("keydown", (event) => {
    const outward = { left: "ArrowLeft", right: "ArrowRight", top: "ArrowUp", bottom: "ArrowDown" }[side];
    const inward = { left: "ArrowRight", right: "ArrowLeft", top: "ArrowDown", bottom: "ArrowUp" }[side];
    if (![outward, inward].includes(event.key)) return;
    event.preventDefault();
    keep();
    set(sides[side] + (event.key === outward ? 1 : -1) * model().factor);
  });
}
