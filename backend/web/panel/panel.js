// The page of one slide: what is known of it is asked once, shown, and kept up to date.
import { Attention } from "./attention.js";
import { colourTable } from "./colours.js";
import { showLearnt } from "./learnt.js";
import * as server from "./server.js";
import { SlideViewer } from "./viewer.js";
import { PHASES, number, percent, progress, recall, remember, setUpTheme } from "./words.js";

const STRIP_TILES = 12;
const STRIP_PX = 144;
/** Pushes so shortly before the page was opened came after Label Studio had read the task. */
const GRACE_S = 5;

/** Who says how large a pixel is, where it is not the file. */
const MPP_SOURCES = { slide: "", forced: " (by the task, against the file)" };

const $ = (id) => document.getElementById(id);
const framed = window.top !== window;

let viewer = null;
let attention = null;
let facts = null;
let opened = null; // the state when the page was opened
let phase = null;
let learntAt = 0; // of the push after which what was learnt was asked for
let hot = [];
let hotAt = -1;

// --- the slide ---------------------------------------------------------------------------------------------------------

/** The slide lies on another machine and is being downloaded: no failure, and asked again by itself. */
const ON_ITS_WAY = "download_under_way";
const ASK_AGAIN_MS = 2000;

async function showSlide() {
  try {
    facts = await server.slide();
  } catch (error) {
    showProblem(error);
    if (error.code === ON_ITS_WAY) setTimeout(showSlide, ASK_AGAIN_MS);
    return;
  }
  $("problem").hidden = true;
  const mpp = facts.mpp ? `${Number(facts.mpp.toPrecision(4))} µm/px${MPP_SOURCES[facts.mpp_source] ?? ` (by the ${facts.mpp_source})`}` : "scale unknown";
  $("facts").textContent = `${number(facts.width)} × ${number(facts.height)} px · ${mpp}`;
  let looked = false;
  viewer = new SlideViewer($("stage"), facts, {
    onPoint: showPoint,
    onTileFailed: async () => {
      // One message that says why, instead of holes in the picture.
      if (looked) return;
      looked = true;
      await server.slide().then(() => { looked = false; }, showProblem);
    },
  });
  showAttention();
}

function showProblem(error) {
  $("problem").hidden = false;
  $("problem").classList.toggle("waiting", error.code === ON_ITS_WAY);
  $("problem-title").textContent = error.code === ON_ITS_WAY ? "The slide is on its way" : "The slide cannot be shown";
  $("problem-reason").textContent = error.message;
  $("problem-hint").textContent = error.hint ?? "";
  for (const id of ["scalebar", "legend", "tissue-legend", "readout", "controls", "hot"]) $(id).hidden = true;
  sayOnce();
}

/** What keeps a slide from being shown mostly failed its analysis too: the same words need not stand there twice. */
function sayOnce() {
  const same = !$("failure").hidden && $("failure-reason").textContent === $("problem-reason").textContent;
  $("problem-reason").hidden = same;
  $("problem-hint").hidden = same;
}

// --- the attention -------------------------------------------------------------------------------------------------------

function chosen() {
  return {
    shown: $("shown").checked,
    head: Number($("head").value),
    colours: $("colours").value,
    opacity: Number($("opacity").value) / 100,
    threshold: Number($("threshold").value) / 100,
    smooth: $("smooth").checked,
    tissue: $("tissue").checked && !$("tissue").disabled,
  };
}

function headName(head) {
  return head < 0 ? `mean of ${attention.heads} heads` : `head ${head}`;
}

async function loadResult(state) {
  if (!state.result) return;
  $("model").textContent = `${state.result.model_version}${state.result.stand_in ? " (a stand-in model: what it shows has no medical meaning)" : ""} · ${number(state.result.tiles)} tiles · research use only, not for diagnosis`;
  showLearnt(state);
  showTissue(state.result);
  attention = new Attention(await server.weights(), state.result);
  const select = $("head");
  select.replaceChildren(...[-1, ...Array(attention.heads).keys()].map((head) => new Option(head < 0 ? `Mean of ${attention.heads}` : `Head ${head}`, head)));
  showAttention();
}

/** What was taken for tissue: earlier results do not say it. */
function showTissue({ tissue: known, notes }) {
  $("notes").hidden = !notes.length;
  $("notes").textContent = notes.join(" ");
  $("tissue").disabled = !known;
  if (!known) return;
  $("tissue-text").textContent = `tissue${known.source === "found" ? "" : ` (given: ${known.source})`}, ${percent(known.share)} of the slide`;
  $("ink-text").textContent = `taken as ink, ${percent(known.ink_share)} of what is not glass`;
}

function showAttention() {
  if (!viewer || !attention || !$("problem").hidden) return;
  for (const id of ["controls", "legend", "hot"]) $(id).hidden = false;
  showStrip();
  repaint();
}

function repaint() {
  const view = chosen();
  $("opacity-value").textContent = `${Math.round(view.opacity * 100)} %`;
  $("threshold-value").textContent = `${Math.round(view.threshold * 100)}`;
  $("legend").hidden = !view.shown;
  $("tissue-legend").hidden = !view.tissue;
  $("legend-text").textContent = `percentile rank, ${headName(view.head)}${view.smooth ? ", smoothed (display only)" : ""}`;
  const context = $("legend-bar").getContext("2d");
  const bar = context.createImageData(256, 1);
  const table = colourTable(view.colours);
  for (let i = 0; i < 256; i += 1) bar.data.set([table[3 * i], table[3 * i + 1], table[3 * i + 2], 255], 4 * i);
  context.putImageData(bar, 0, 0);
  viewer.paint(attention, view);
}

function showStrip() {
  const head = chosen().head;
  hot = attention.hottest(head, STRIP_TILES);
  hotAt = -1;
  const weights = attention.of(head);
  const size = Math.max(1, Math.round(attention.tileSize));
  $("hot-title").textContent = `Highest attention, ${headName(head)}`;
  $("strip").replaceChildren(
    ...hot.map((tile, place) => {
      const [x, y] = attention.corner(tile);
      const share = percent(weights[tile]);
      const picture = Object.assign(new Image(72, 72), { src: server.regionUrl(x, y, size, STRIP_PX), alt: "", loading: "lazy" });
      const text = Object.assign(document.createElement("span"), { textContent: share });
      const button = Object.assign(document.createElement("button"), { type: "button", title: `Go to this tile (${share} of the attention)` });
      button.setAttribute("aria-label", `Hot tile ${place + 1} of ${hot.length}: ${share} of the attention. Go there`);
      button.append(picture, text);
      button.addEventListener("click", () => goTo(place));
      const item = document.createElement("li");
      item.append(button);
      return item;
    }),
  );
}

function goTo(place) {
  if (!viewer || !hot.length) return;
  hotAt = (place + hot.length) % hot.length;
  viewer.flyTo(hot[hotAt]);
  [...$("strip").querySelectorAll("button")].forEach((button, i) => {
    if (i === hotAt) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  });
  $("strip").children[hotAt].scrollIntoView({ block: "nearest", inline: "nearest" });
}

function showPoint(point) {
  const readout = $("readout");
  readout.hidden = true;
  if (!point || !attention || !$("shown").checked) return;
  const tile = attention.at(Math.floor(point.x / attention.tileSize), Math.floor(point.y / attention.tileSize));
  if (tile < 0) return;
  const head = chosen().head;
  const where = facts.mpp ? `${((point.x * facts.mpp) / 1000).toFixed(2)}, ${((point.y * facts.mpp) / 1000).toFixed(2)} mm` : `${Math.round(point.x)}, ${Math.round(point.y)} px`;
  readout.textContent = `attention ${percent(attention.of(head)[tile])} · rank ${Math.round(attention.ranks(head)[tile] * 100)} · ${where}`;
  readout.hidden = false;
}

// --- where its job stands --------------------------------------------------------------------------------------------------

async function showStatus(status) {
  $("phase").textContent = PHASES[status.phase] ?? status.phase;
  $("phase").dataset.phase = status.phase;
  const failed = status.phase === "failed" || status.phase === "unavailable";
  $("failure").hidden = !failed;
  if (failed) {
    const error = (status.phase === "failed" ? status.job?.error : status.error) ?? { message: "No reason was given." };
    $("failure-title").textContent = status.phase === "failed" ? "The analysis failed." : "Its state is not known.";
    $("failure-reason").textContent = error.message;
    $("failure-hint").textContent = error.hint ?? "";
  }
  sayOnce();
  const words = failed ? null : progress(status);
  $("job").hidden = !words;
  if (words) {
    [$("job-title").textContent, $("job-detail").textContent] = words;
    showBar(status);
  }
  showPushes(status.pushes);
  const before = phase;
  phase = status.phase;
  if (before && before !== "done" && phase === "done" && !attention) await loadResult(await server.state());
}

function showBar({ phase: now, job }) {
  const bar = $("job-bar");
  bar.hidden = now !== "running" && now !== "queued";
  if (now === "running" && job?.total) {
    Object.assign(bar, { max: job.total, value: job.done });
  } else {
    bar.removeAttribute("value"); // it cannot be said how far it is
  }
}

function showPushes(pushes) {
  if (!opened) return;
  const known = new Map(opened.status.pushes.map((push) => [`${push.project}:${push.task}`, push.at]));
  const reloaded = Number(recall(`reloaded ${opened.key}`, () => sessionStorage) ?? 0); // by the button, in this tab
  const since = Math.max(opened.now - GRACE_S, reloaded);
  const mine = pushes.filter((push) => opened.project === null || push.project === opened.project);
  const fresh = mine.filter((push) => push.url && (push.at > since || push.at > (known.get(`${push.project}:${push.task}`) ?? Infinity)));
  const link = $("reload");
  link.hidden = fresh.length === 0;
  if (!fresh.length) return;
  const last = fresh.reduce((a, b) => (a.at > b.at ? a : b));
  // Heads were trained, or this slide was analysed: either way there is more to say than when the page was opened.
  if (attention && last.at > learntAt) {
    learntAt = last.at;
    server.state().then(showLearnt, () => { learntAt = 0; });
  }
  link.href = last.url;
  link.onclick = () => remember(`reloaded ${opened.key}`, last.at, () => sessionStorage);
  link.textContent = framed ? "New regions were pushed to this task. Reload the task to see them" : `New regions were pushed to task ${last.task}. Open it in Label Studio`;
}

// --- controls and keys -------------------------------------------------------------------------------------------------------

function setUpControls() {
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  $("controls").addEventListener("input", (event) => {
    if (event.target.id === "head") showStrip();
    repaint();
  });
  $("zoom-in").addEventListener("click", () => viewer?.zoom(1.6));
  $("zoom-out").addEventListener("click", () => viewer?.zoom(1 / 1.6));
  $("home").addEventListener("click", () => viewer?.home());
  $("help").addEventListener("click", () => $("keys").showModal());
  setUpTheme($("theme"));
}

function flip(id) {
  if ($("controls").hidden || $(id).disabled) return;
  $(id).checked = !$(id).checked;
  repaint();
}

function nextHead() {
  const select = $("head");
  if ($("controls").hidden) return;
  select.selectedIndex = (select.selectedIndex + 1) % select.options.length;
  showStrip();
  repaint();
}

const KEYS = {
  "+": () => viewer?.zoom(1.6),
  "=": () => viewer?.zoom(1.6),
  "-": () => viewer?.zoom(1 / 1.6),
  0: () => viewer?.home(),
  ArrowLeft: () => viewer?.move(-1, 0),
  ArrowRight: () => viewer?.move(1, 0),
  ArrowUp: () => viewer?.move(0, -1),
  ArrowDown: () => viewer?.move(0, 1),
  o: () => flip("shown"),
  s: () => flip("smooth"),
  t: () => flip("tissue"),
  h: nextHead,
  n: () => goTo(hotAt + 1),
  p: () => goTo(hotAt < 0 ? -1 : hotAt - 1),
  "?": () => $("keys").showModal(),
};

function setUpKeys() {
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || $("keys").open) return;
    if (event.target.matches("select, input[type=range]") && event.key.startsWith("Arrow")) return;
    if (event.target.matches("select") && event.key.length === 1) return;
    const act = KEYS[event.key] ?? KEYS[event.key.toLowerCase()];
    if (!act) return;
    event.preventDefault();
    act();
  });
}

async function showState() {
  try {
    const state = await server.state();
    opened = state;
    $("name").textContent = state.name;
    document.title = state.name;
    await Promise.all([showStatus(state.status), loadResult(state)]);
  } catch (error) {
    if (!(error instanceof server.Refused)) throw error;
    await showStatus({ phase: "unavailable", job: null, pushes: [], waiting: [], error });
  }
  server.watch(showStatus);
}

setUpControls();
setUpKeys();
showSlide();
showState();
