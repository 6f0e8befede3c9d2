"use strict";
// The values of the page, and what all its parts use. Everything that a user has named enters the page as text.

const values = JSON.parse(document.getElementById("data").textContent);
const report = values.report;

// Integers and numbers as stages/report/packing.py has packed them; rows: of how many values each scaled row consists.
function unpack(packed, row = 0) {
  const bytes = Uint8Array.from(atob(packed.data), (one) => one.charCodeAt(0));
  const types = {Uint8Array, Uint16Array, Int16Array, Float32Array};
  const found = new types[packed.type](bytes.buffer);
  if (!packed.scales) return found;
  return Float64Array.from(found, (one, place) => one * packed.scales[Math.floor(place / row)]);
}

// An element with attributes and children, which are elements or texts.
function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) if (value != null && value !== false) made.setAttribute(key, value);
  made.append(...children.filter((one) => one != null && one !== ""));
  return made;
}

function show(id, ...children) {
  document.getElementById(id).replaceChildren(...children.filter((one) => one != null));
}

// A table, which narrow screens show as one block a row. columns: [title, value of a row, whether it is a number]; the first one
// heads the rows. The roles stay where styles take those of the elements.
function table(caption, columns, rows, classOf = () => null) {
  const head = el("tr", {role: "row"}, ...columns.map(([title, , isNumber]) => el("th", {scope: "col", role: "columnheader", class: isNumber ? "number" : null}, title)));
  const body = rows.map((row) => el("tr", {class: classOf(row), role: "row"}, ...columns.map(([title, value, isNumber], place) => {
    const found = value(row);
    const text = found == null ? "-" : found instanceof Node ? found : String(found);
    return place
      ? el("td", {role: "cell", class: isNumber ? "number" : null, "data-title": title}, text)
      : el("th", {role: "rowheader", scope: "row"}, text);
  })));
  const made = el("table", {role: "table"}, el("caption", {}, caption), el("thead", {role: "rowgroup"}, head), el("tbody", {role: "rowgroup"}, ...body));
  return el("div", {class: "scroll", tabindex: 0, role: "region", "aria-label": caption}, made);
}

const whole = (value) => value == null ? null : value.toLocaleString("en-US");
const digits = (value, places) => value == null ? null : value.toFixed(places);
const short = (value) => value == null ? null : Number(value.toPrecision(3)).toString();
const percent = (value) => value == null ? null : `${(100 * value).toFixed(1)}%`;

function bytesText(value) {
  const units = ["bytes", "kB", "MB", "GB", "TB"];
  let place = 0;
  while (value >= 1000 && place < units.length - 1) { value /= 1000; place += 1; }
  return `${place && value < 100 ? value.toFixed(1) : Math.round(value)} ${units[place]}`;
}

function secondsText(value) {
  if (value < 100) return `${value.toFixed(1)} s`;
  const minutes = Math.round(value / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
}

// A chart that is drawn again when its width changes. draw: width to a chart of Plot.
const drawings = new Map();
function chart(id, title, caption, draw, below = null) {
  const figure = el("figure", {}, el("div", {class: "chart"}));
  show(id, el("h3", {}, title), figure, below);
  figure.append(el("figcaption", {}, caption));
  const again = () => {
    const width = Math.max(260, Math.floor(document.getElementById(id).clientWidth));
    const drawn = draw(width);
    for (const svg of drawn.tagName === "svg" ? [drawn] : drawn.querySelectorAll("svg")) svg.setAttribute("role", "img");
    (drawn.tagName === "svg" ? drawn : drawn.querySelector("svg:last-of-type") ?? drawn).setAttribute("aria-label", `${title}. ${caption}`);
    figure.querySelector(".chart").replaceChildren(drawn);
  };
  drawings.set(id, again);
  again();
}

let drawnWidth = document.documentElement.clientWidth;
addEventListener("resize", () => {
  if (document.documentElement.clientWidth === drawnWidth) return;
  drawnWidth = document.documentElement.clientWidth;
  for (const again of drawings.values()) again();
});
