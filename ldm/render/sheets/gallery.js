"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const find = (selector) => document.querySelector(selector);
const make = (tag, text) => { const it = document.createElement(tag); it.textContent = text; return it; };
const AT_ONCE = 120, MARGIN = 600;

const images = data.images.map((image) => {
  const settings = Object.assign({}, data.common, image.settings);
  const pairs = Object.entries(settings).map(([name, value]) => name + ":" + value);
  const text = [image.number, image.file, image.where, ...pairs].join("\n").toLowerCase();
  return { ...image, settings, text };
});
let shown = images, drawn = 0, open = -1;

function more() {
  const part = document.createDocumentFragment();
  for (const end = Math.min(drawn + AT_ONCE, shown.length); drawn < end; drawn++) part.append(tile(drawn));
  find("#images").append(part);
}

function fill() {
  while (drawn < shown.length && find("#end").getBoundingClientRect().top < innerHeight + MARGIN) more();
}

function tile(place) {
  const image = shown[place], figure = make("figure", ""), button = make("button", ""), element = make("img", "");
  element.loading = "lazy";
  if (image.settings.width > 0 && image.settings.height > 0) {
    element.width = image.settings.width;
    element.height = image.settings.height;
  }
  element.alt = image.settings.prompt;
  element.src = image.url;
  button.append(element);
  button.addEventListener("click", () => show(place));
  figure.append(button, make("figcaption", image.number + "  " + image.settings.prompt));
  return figure;
}

function search() {
  const words = find("#search").value.toLowerCase().split(/\s+/).filter((word) => word);
  shown = words.length ? images.filter((it) => words.every((word) => it.text.includes(word))) : images;
  find("#count").textContent = shown.length + " of " + images.length + " images";
  find("#images").replaceChildren();
  drawn = 0;
  fill();
}

function show(place) {
  if (place < 0 || place >= shown.length) return;
  open = place;
  const image = shown[place], dialog = find("#one"), settings = image.settings;
  const rows = [["prompt", settings.prompt], ["number", image.number], ["file", image.file]];
  rows.push(["line", image.where], ...Object.entries(settings).filter(([name]) => name !== "prompt"));
  dialog.querySelector("img").src = image.url;
  dialog.querySelector("table").replaceChildren(...rows.map(([name, value]) => {
    const row = make("tr", "");
    row.append(make("th", name), make("td", value));
    return row;
  }));
  dialog.querySelector("pre").textContent = image.command;
  find("#copy").textContent = "Copy";
  if (!dialog.open) dialog.showModal();
}

function copy() {
  const range = document.createRange(), selection = window.getSelection();
  range.selectNodeContents(find("#one pre"));
  selection.removeAllRanges();
  selection.addRange(range);
  find("#copy").textContent = document.execCommand("copy") ? "Copied" : "Press Ctrl-C";
}

find("#title").textContent = data.title;
find("#search").addEventListener("input", search);
find("#copy").addEventListener("click", copy);
find("#previous").addEventListener("click", () => show(open - 1));
find("#next").addEventListener("click", () => show(open + 1));
find("#close").addEventListener("click", () => find("#one").close());
document.addEventListener("keydown", (event) => {
  if (find("#one").open && event.key === "ArrowLeft") show(open - 1);
  if (find("#one").open && event.key === "ArrowRight") show(open + 1);
});
if (data.failures.length) {
  find("#failures").hidden = false;
  find("#failures summary").textContent = data.failures.length + " failures";
  find("#failures ul").append(...data.failures.map((it) => make("li", it)));
}
new IntersectionObserver(fill, { rootMargin: MARGIN + "px" }).observe(find("#end"));
addEventListener("resize", fill);
search();
