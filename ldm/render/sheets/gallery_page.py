"""What the gallery is made of: its style, its elements and its script, which sets texts as text, never as HTML."""

from __future__ import annotations

import json
import re

from ldm.report import html_page

STYLE = """
header { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .5em 1em; align-items: center;
  padding: .6em 1em; background: Canvas; border-bottom: 1px solid color-mix(in srgb, CanvasText 20%, Canvas); }
h1 { font-size: 1.1em; margin: 0; }
input[type=search] { flex: 1 1 16em; font: inherit; padding: .3em .6em; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(11em, 1fr)); gap: 1em; padding: 1em; }
figure button { display: block; width: 100%; padding: 0; border: 0; background: none; cursor: pointer; }
figure img { display: block; width: 100%; height: auto; background: color-mix(in srgb, CanvasText 10%, Canvas); }
figcaption { font-size: .85em; overflow: hidden; display: -webkit-box; -webkit-box-orient: vertical;
  -webkit-line-clamp: 3; overflow-wrap: anywhere; }
details { padding: .5em 1em; }
details li { overflow-wrap: anywhere; }
dialog { width: min(94vw, 80em); max-height: 94vh; box-sizing: border-box; overflow: auto; padding: 1em;
  border: 1px solid; }
dialog > div { display: flex; flex-wrap: wrap; gap: 1em; align-items: flex-start; }
dialog img { flex: 0 1 auto; min-width: 8em; max-width: 100%; max-height: 80vh; object-fit: contain; }
section { flex: 1 1 20em; min-width: 0; }
table { width: 100%; }
th { width: 1%; text-align: left; vertical-align: top; font-weight: normal; opacity: .7; padding: .1em 1em .1em 0;
  white-space: nowrap; }
td { white-space: pre-wrap; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: .6em; user-select: all;
  background: color-mix(in srgb, CanvasText 8%, Canvas); }
"""

BODY = """
<header><h1 id="title"></h1><input id="search" type="search" autofocus
  placeholder="words of prompts and settings, as in: cat seed:7 sampler:euler"><span id="count"></span></header>
<noscript><p>This page needs JavaScript, its own and nobody else's.</p></noscript>
<details id="failures" hidden><summary></summary><ul></ul></details>
<main id="images"></main><div id="end"></div>
<dialog id="one"><div><img alt=""><section><table></table><p>Draw it again:</p><pre></pre>
<p><button id="copy">Copy</button> <button id="previous">&larr;</button> <button id="next">&rarr;</button>
<button id="close">Close</button></p></section></div></dialog>
"""

SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const find = (selector) => document.querySelector(selector);
const make = (tag, text) => { const it = document.createElement(tag); it.textContent = text; return it; };
const AT_ONCE = 120, MARGIN = 600;

const images = data.images.map((image) => {
  const settings = Object.assign({}, data.common, image.settings);
  const pairs = Object.entries(settings).map(([name, value]) => name + ":" + value);
  const text = [image.number, image.file, image.where, ...pairs].join("\\n").toLowerCase();
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
  const words = find("#search").value.toLowerCase().split(/\\s+/).filter((word) => word);
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
"""


_ENTITIES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}  # so that no text ends the element it stands in


def page(title: str, data: object) -> str:
    """A page that needs nothing but itself and images beside it: its script finds `data` in #data, as JSON.

    The browser runs this very script and style, shows images from where the page is, and nothing else: what stands in
    `data` stays data. `data` holds no NaN or infinity (ValueError).
    """
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    text = re.sub("[<>&]", lambda mark: _ENTITIES[mark[0]], text)
    body = f'{BODY}\n<script type="application/json" id="data">{text}</script>'
    return html_page(title, body, STYLE, images="'self' file:", script=SCRIPT)
