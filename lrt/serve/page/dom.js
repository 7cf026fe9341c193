// Small helpers for the document.

export const $ = id => document.getElementById(id);

/** An element with properties, attributes and what it holds. */
export const make = (tag, { attributes = {}, ...properties } = {}, ...inside) => {
  const node = Object.assign(document.createElement(tag), properties);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...inside);
  return node;
};

export const round = (value, digits = 2) => value == null ? "–" : value.toFixed(digits);
export const signed = value => (value > 0 ? "+" : value < 0 ? "−" : "") + round(Math.abs(value));
export const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;

let infos = 0;

/** A button, an i in a circle, that opens what `text` explains; the browser closes it by Escape or a click elsewhere. */
export const info = (about, text) => {
  const box = make("div", { id: `info-${++infos}`, popover: "auto", className: "info-box", textContent: text });
  const button = make("button", {
    type: "button", className: "info", textContent: "i",
    attributes: { popovertarget: box.id, "aria-label": `About ${about}` },
  });
  box.addEventListener("toggle", event => {
    if (event.newState !== "open") return;
    const { left, bottom, top } = button.getBoundingClientRect(), { offsetWidth, offsetHeight } = box;
    const room = innerHeight - bottom > offsetHeight + 12;
    box.style.left = `${Math.max(8, Math.min(left, innerWidth - offsetWidth - 8))}px`;
    box.style.top = `${room ? bottom + 6 : Math.max(8, top - offsetHeight - 6)}px`;
  });
  return make("span", {}, "\u00a0", button, box); // the space keeps it on the line of the word before it
};

/** Save a blob as a file. */
export const download = (blob, name) => {
  const url = URL.createObjectURL(blob);
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
};
