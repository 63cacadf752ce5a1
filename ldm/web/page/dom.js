// Small helpers. Text reaches the page as text alone: nothing here or elsewhere parses HTML.

export const $ = (id) => document.getElementById(id);

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && name !== "list") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

let timer;
export function toast(text, seconds = 6) {
  const box = $("toast");
  box.textContent = text;
  box.hidden = false;
  clearTimeout(timer);
  timer = setTimeout(() => (box.hidden = true), seconds * 1000);
}

export const later = (milliseconds, action) => {
  let waiting;
  return (...values) => {
    clearTimeout(waiting);
    waiting = setTimeout(() => action(...values), milliseconds);
  };
};

export const store = {
  get(name, otherwise = null) {
    try { return JSON.parse(localStorage.getItem(`ldm.${name}`)) ?? otherwise; } catch { return otherwise; }
  },
  set(name, value) {
    try { localStorage.setItem(`ldm.${name}`, JSON.stringify(value)); } catch { /* a private window */ }
  },
};
