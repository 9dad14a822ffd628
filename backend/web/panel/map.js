// The map of slides: coloured by what is said of them, or by how sure a head is.
import { below } from "./addresses.js";
import { colourTable } from "./colours.js";
import { drawn, element } from "./dom.js";
import { number, sure } from "./words.js";

// The colours are in overview.css, for light and dark; the shapes tell the same to those who see no colours.
const SHAPES = [
  "M-5.5 0a5.5 5.5 0 1 0 11 0a5.5 5.5 0 1 0-11 0z",
  "M-5-5h10v10h-10z",
  "M0-6.5L6.2 5H-6.2z",
  "M0-7L7 0L0 7L-7 0z",
  "M0 6.5L6.2-5H-6.2z",
  "M-2-6h4v4h4v4h-4v4h-4v-4h-4v-4h4z",
];
const UNLABELLED = "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0z";

const $ = (id) => document.getElementById(id);
let shown = "";
let latest = null;
let by = "label";

/** Shows what /api/map answers. What has not changed is left alone: a point in focus stays so. */
export function showMap(answer) {
  const text = JSON.stringify(answer);
  if (text === shown) return;
  shown = text;
  latest = answer;
  draw();
}

export function setUpMap() {
  $("map-by").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    by = button.dataset.by;
    draw();
  });
}

function draw() {
  const { points, explained, left_out: leftOut } = latest;
  $("map-note").textContent = points.length < 2
    ? "Appears once two slides have been analysed."
    : `${number(points.length)} slides by their embeddings; the axes hold ${(100 * explained[0]).toFixed(0)} % and ${(100 * explained[1]).toFixed(0)} % of the variance.${leftOut ? ` ${number(leftOut)} more are left out.` : ""}`;
  const told = points.some((point) => point.label);
  const judged = points.some((point) => point.confidence !== null);
  $("map").toggleAttribute("hidden", points.length < 2);
  $("map-by").hidden = points.length < 2 || !judged;
  $("map-legend").replaceChildren();
  if (points.length < 2) return;
  const now = by === "confidence" && judged ? "confidence" : "label";
  for (const button of $("map-by").children) button.setAttribute("aria-pressed", String(button.dataset.by === now));
  const classes = categories(points);
  const look = now === "confidence" ? byConfidence : told ? (point) => byLabel(point, classes) : plain;
  if (now === "confidence") $("map-legend").append(...confidenceLegend(points));
  else if (told) $("map-legend").append(...labelLegend(points, classes));
  const reach = Math.max(...points.flatMap((point) => [Math.abs(point.x) / 290, Math.abs(point.y) / 190])) || 1;
  // Grey points first, so that they do not hide what is known.
  const marks = [...points].sort((a, b) => Boolean(a.label) - Boolean(b.label)).map((point) => {
    const mark = look(point);
    mark.setAttribute("transform", `translate(${(300 + point.x / reach).toFixed(1)} ${(200 - point.y / reach).toFixed(1)})`);
    const said = [point.slide, `${number(point.tiles)} tiles`];
    if (point.label) said.push(point.suggested ? `${point.label} (suggested)` : point.label);
    if (point.confidence !== null) said.push(`confidence ${sure(point.confidence)}`);
    mark.append(drawn("title", { text: said.join(", ") }));
    return drawn("a", { href: below(point.url), "aria-label": said.join(", ") }, mark);
  });
  $("map").replaceChildren(
    drawn("line", { class: "axis", x1: 0, x2: 600, y1: 200, y2: 200 }),
    drawn("line", { class: "axis", x1: 300, x2: 300, y1: 0, y2: 400 }),
    ...marks,
  );
}

// --- by label -----------------------------------------------------------------------------------------------------------

/** The labels that get a colour of their own: the most frequent ones, in the order of the alphabet. */
function categories(points) {
  const counts = new Map();
  for (const { label } of points) if (label) counts.set(label, (counts.get(label) ?? 0) + 1);
  const frequent = [...counts.keys()].sort((a, b) => counts.get(b) - counts.get(a) || a.localeCompare(b)).slice(0, SHAPES.length);
  return frequent.sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
}

function byLabel({ label, suggested }, classes) {
  if (!label) return drawn("path", { class: "mark none", d: UNLABELLED });
  const at = classes.indexOf(label);
  return drawn("path", { class: `mark ${at < 0 ? "other" : `c${at}`}${suggested ? " suggested" : ""}`, d: SHAPES[at] ?? UNLABELLED });
}

/** As long as nothing is said of any slide. */
function plain() {
  return drawn("path", { class: "mark plain", d: SHAPES[0] });
}

function labelLegend(points, classes) {
  const entry = (text, count, point) => element("span", {}, sample(byLabel(point, classes)), `${text} ${number(count)}`);
  const entries = classes.map((label) => entry(label, points.filter((point) => point.label === label).length, { label }));
  const others = points.filter((point) => point.label && !classes.includes(point.label));
  if (others.length) entries.push(entry(`${number(new Set(others.map(({ label }) => label)).size)} other labels`, others.length, { label: others[0].label }));
  const unlabelled = points.filter((point) => !point.label).length;
  if (unlabelled) entries.push(entry("unlabelled", unlabelled, {}));
  const suggested = points.filter((point) => point.suggested).length;
  if (suggested) entries.push(element("span", { class: "quiet", text: `filled: annotated; outlined: suggested (${number(suggested)}), research use only` }));
  return entries;
}

function sample(mark) {
  return drawn("svg", { viewBox: "-8 -8 16 16", "aria-hidden": "true" }, mark);
}

// --- by confidence ------------------------------------------------------------------------------------------------------

function colourOf(confidence) {
  const table = colourTable("viridis");
  const at = 3 * Math.round(255 * Math.min(1, Math.max(0, confidence)));
  return `rgb(${table[at]} ${table[at + 1]} ${table[at + 2]})`;
}

function byConfidence({ confidence }) {
  if (confidence === null) return drawn("path", { class: "mark none", d: UNLABELLED });
  const mark = drawn("path", { class: "mark judged", d: SHAPES[0] });
  mark.style.fill = colourOf(confidence);
  return mark;
}

function confidenceLegend(points) {
  const bar = drawn("svg", { class: "ramp", viewBox: "0 0 64 1", preserveAspectRatio: "none", "aria-hidden": "true" });
  for (let i = 0; i < 64; i += 1) {
    const step = drawn("rect", { x: i, y: 0, width: 1.1, height: 1 });
    step.style.fill = colourOf(i / 63);
    bar.append(step);
  }
  const unknown = points.filter((point) => point.confidence === null).length;
  const entries = [element("span", {}, "0 %", bar, "100 % confidence, research use only")];
  if (unknown) entries.push(element("span", {}, sample(byConfidence({ confidence: null })), `no head ${number(unknown)}`));
  return entries;
}
