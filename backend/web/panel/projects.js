// The projects of Label Studio and what each has learnt: its heads, its learning curve, its training.
import { drawn, element } from "./dom.js";
import { number } from "./words.js";

const METRICS = { balanced_accuracy: "Balanced accuracy", r2: "R²" };
const TRAINING = {
  scheduled: "Training is scheduled: it starts when annotating pauses.",
  queued: "Training waits for a worker.",
  running: "Training now.",
  failed: "The last training failed.",
  unknown: "Whether it trains is not known.",
};
const WIDTH = 340;
const HEIGHT = 150;
const PLOT = { left: 40, right: WIDTH - 10, top: 8, bottom: HEIGHT - 34 };

const $ = (id) => document.getElementById(id);
let shown = "";

/** Shows what /api/projects answers. What has not changed is left alone. */
export function showProjects(answer) {
  const text = JSON.stringify(answer);
  if (text === shown) return;
  shown = text;
  const { projects, problem } = answer;
  $("projects-problem").hidden = !problem && projects.length > 0;
  $("projects-problem").textContent = problem || "No project in Label Studio counts this model's predictions yet.";
  $("projects").replaceChildren(...projects.map(card));
}

function card(project) {
  const made = element("div", { class: "card" },
    element("div", { class: "row" }, element("a", { href: project.url, text: project.title }), element("span", { class: "quiet", text: project.version })),
    element("p", { class: "quiet", text: `${number(project.labelled)} of ${number(project.tasks)} slides labelled, ${number(project.predictions)} predictions` }),
    element("progress", { max: Math.max(1, project.tasks), value: project.labelled, "aria-label": "Slides labelled" }));
  const state = project.training?.status;
  if (TRAINING[state]) {
    const failed = state === "failed" || (state === "scheduled" && project.training.reason);
    const words = state === "scheduled" && failed ? "Training is tried again in a moment." : TRAINING[state];
    made.append(element("p", { class: failed ? "bad" : "quiet", text: [words, project.training.reason].filter(Boolean).join(" ") }));
  }
  if (project.learning_problem) made.append(element("p", { class: "bad", text: project.learning_problem }));
  if (project.heads.length) made.append(element("ul", { class: "heads" }, ...project.heads.map(headLine)));
  for (const needed of project.too_few) made.append(element("p", { class: "quiet", text: needed }));
  const controls = [...new Set(project.curve.map((point) => point.control))];
  for (const control of controls) made.append(curve(control, project.curve.filter((point) => point.control === control)));
  return made;
}

function things({ level }) {
  return level === "tile" ? "labelled tiles" : "labelled slides";
}

function score({ metric, score: value, low, high }) {
  const shownAs = metric === "r2" ? (part) => part.toFixed(2) : (part) => `${Math.round(100 * part)} %`;
  return `${shownAs(value)}${low === null ? "" : ` (${shownAs(low)} to ${shownAs(high)})`}`;
}

function headLine(head) {
  const measured = head.metric
    ? `${METRICS[head.metric]} ${score(head)}${head.mae === null ? "" : `, mean error ${Number(head.mae.toPrecision(2))}`}`
    : `not measured yet${head.reason ? ` (${head.reason})` : ""}`;
  const made = element("li", {}, element("strong", { text: head.control }), `: ${measured}; ${number(head.labels)} ${things(head)}`);
  for (const found of head.figures ?? []) made.append(element("p", { class: "quiet", text: classLine(found) }));
  if (head.metric) made.append(element("p", { class: "quiet", text: `${head.patients[0].toUpperCase()}${head.patients.slice(1)}.` }));
  return made;
}

const percent = (part) => `${Number((100 * part).toPrecision(part < 0.01 ? 1 : 2))} %`;
const range = ([value, low, high]) => `${percent(value)} (${percent(low)} to ${percent(high)})`;

function classLine({ name, precision, recall, assumed, source }) {
  const parts = [precision && `precision ${range(precision)}`, recall && `recall ${range(recall)}`, `prevalence ${percent(assumed)}, ${source}`];
  return `${name}: ${parts.filter(Boolean).join(", ")}`;
}

// --- the learning curve ---------------------------------------------------------------------------------------------------

/** Of versions with the same number of labels the newest, by number of labels. */
function steps(points) {
  return [...new Map(points.map((point) => [point.labelled, point])).values()].sort((a, b) => a.labelled - b.labelled);
}

function curve(control, points) {
  const all = steps(points);
  const last = all[all.length - 1];
  const lowest = Math.min(0, ...all.map((step) => Math.max(-1, step.low ?? step.score)));
  const most = last.labelled;
  const x = (labelled) => PLOT.left + ((PLOT.right - PLOT.left) * labelled) / most;
  const y = (value) => PLOT.bottom - ((PLOT.bottom - PLOT.top) * (Math.min(1, Math.max(lowest, value)) - lowest)) / (1 - lowest);
  const place = (step, value) => `${x(step.labelled).toFixed(1)},${y(value).toFixed(1)}`;
  const name = METRICS[last.metric];
  const picture = drawn("svg", { class: "curve", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${control}: ${name} ${score(last)} with ${last.labelled} ${things(last)}` });
  const ticks = lowest < 0 ? [lowest, 0, 1] : [0, 0.5, 1];
  for (const tick of ticks) {
    picture.append(drawn("line", { class: "axis", x1: PLOT.left, x2: PLOT.right, y1: y(tick), y2: y(tick) }));
    const text = last.metric === "r2" ? tick.toFixed(1) : `${100 * tick} %`;
    picture.append(drawn("text", { x: PLOT.left - 5, y: y(tick) + 4, "text-anchor": "end", text }));
  }
  if (last.chance !== null) {
    picture.append(drawn("line", { class: "chance", x1: PLOT.left, x2: PLOT.right, y1: y(last.chance), y2: y(last.chance) }));
    picture.append(drawn("text", { class: "small", x: PLOT.left + 4, y: y(last.chance) - 4, text: "guessing" }));
  }
  const known = all.filter((step) => step.low !== null);
  if (known.length > 1) {
    const band = [...known.map((step) => place(step, step.high)), ...[...known].reverse().map((step) => place(step, step.low))];
    picture.append(drawn("polygon", { class: "band", points: band.join(" ") }));
  } else {
    for (const step of known) picture.append(drawn("line", { class: "whisker", x1: x(step.labelled), x2: x(step.labelled), y1: y(step.low), y2: y(step.high) }));
  }
  picture.append(drawn("polyline", { class: "line", points: all.map((step) => place(step, step.score)).join(" ") }));
  for (const step of all) {
    const title = `${step.model_version}: ${name} ${score(step)}, ${number(step.labelled)} ${things(step)}; ${step.patients}`;
    picture.append(drawn("circle", { cx: x(step.labelled), cy: y(step.score), r: 3 }, drawn("title", { text: title })));
  }
  for (const tick of [0, ...(all.length > 1 && all[0].labelled > 0.15 * most && all[0].labelled < 0.85 * most ? [all[0].labelled] : []), most]) {
    picture.append(drawn("text", { x: x(tick), y: PLOT.bottom + 15, "text-anchor": tick === most ? "end" : "middle", text: number(tick) }));
  }
  picture.append(drawn("text", { x: (PLOT.left + PLOT.right) / 2, y: HEIGHT - 4, "text-anchor": "middle", text: things(last) }));
  const interval = known.length ? ", with its 95 % interval" : "";
  return element("figure", {}, element("figcaption", {}, element("strong", { text: control }), `: ${name} on labels held out${interval}`), picture);
}
