// The overview: what /api/overview, /api/projects and /api/map say, again every few seconds while the page is seen.
import { below } from "./addresses.js";
import { element } from "./dom.js";
import { setUpMap, showMap } from "./map.js";
import { showProjects } from "./projects.js";
import { bytes, duration, number, progress, setUpTheme } from "./words.js";

const EVERY_MS = 2000;
const SLOW_EVERY = 8; // projects and map change seldom: once in so many rounds
const LISTED = 100;
const STATUSES = { queued: "waiting", started: "running", finished: "finished", failed: "failed" };

const $ = (id) => document.getElementById(id);
let filter = "";
let rounds = 0;

async function asked(path, options) {
  const answer = await fetch(below(path), options);
  const body = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(body.detail ?? `The backend answered ${answer.status}.`);
  return body;
}

// --- queues, workers, jobs -----------------------------------------------------------------------------------------------

function showQueues(queues) {
  $("queues").replaceChildren(...Object.entries(queues).map(([name, depth]) => element("div", {}, element("dt", { text: name }), element("dd", { text: number(depth) }))));
}

function showWorkers(workers) {
  const rows = workers.map((worker) => {
    const memory = [worker.memory_bytes && bytes(worker.memory_bytes), worker.device_memory_bytes && `${bytes(worker.device_memory_bytes)} on the device`];
    const busy = worker.state === "busy";
    return element("tr", {},
      element("td", { text: worker.device || "—" }),
      element("td", {}, element("span", { class: "chip", "data-status": busy ? "started" : "", text: worker.state })),
      element("td", { text: worker.about || "—" }),
      element("td", { text: memory.filter(Boolean).join(", ") || "—" }),
      element("td", { text: worker.queues.join(", ") }),
      element("td", { text: worker.host }));
  });
  $("workers").replaceChildren(...(rows.length ? rows : [element("tr", {}, element("td", { colspan: 6, text: "No worker is running. Start one with `wsc-backend workers`." }))]));
}

function jobRow(job) {
  const what = job.panel ? element("a", { href: below(job.panel), text: job.about || job.key }) : element("span", { text: job.about || job.key });
  const words = progress({ phase: { started: "running", queued: "queued" }[job.status] ?? "", job, waiting: [] });
  const detail = element("td", {});
  if (job.status === "started" && job.total) detail.append(element("progress", { max: job.total, value: job.done, "aria-label": "Tiles analysed" }));
  if (words) detail.append(element("span", { text: words.join(" ") }));
  if (job.status === "failed" && job.error) {
    detail.append(element("p", { class: "reason" }, `${job.error.message} `, element("span", { class: "hint", text: job.error.hint ?? "" })));
  }
  if (job.status === "finished" && job.started_at && job.ended_at) {
    detail.append(`${job.total ? `${number(job.total)} tiles in ` : ""}${duration((new Date(job.ended_at) - new Date(job.started_at)) / 1000)}`);
  }
  const act = element("td", {});
  if (job.status === "failed") {
    const again = element("button", { type: "button", text: "Retry", "aria-label": `Retry: ${job.about || job.key}` });
    again.addEventListener("click", () => retry(job, again));
    act.append(again);
  }
  return element("tr", { "data-key": job.key },
    element("td", {}, what),
    element("td", {}, element("span", { class: "chip", "data-status": job.status, text: STATUSES[job.status] })),
    detail,
    element("td", { text: [job.queue, job.device].filter(Boolean).join(" · ") }),
    act);
}

function showJobs(jobs, counts) {
  // A button that is about to be pressed must not move away or lose its focus: rows stay until something in them changed.
  const body = $("jobs");
  const shown = new Map([...body.children].map((row) => [row.dataset.key, row]));
  const rows = jobs.map((job) => {
    const text = JSON.stringify(job);
    const present = shown.get(job.key);
    if (present?.job === text) return present;
    return Object.assign(jobRow(job), { job: text });
  });
  const same = rows.length === body.children.length && rows.every((row, i) => row === body.children[i]);
  if (!same) body.replaceChildren(...rows);
  const all = filter ? counts[filter] : Object.values(counts).reduce((a, b) => a + b, 0);
  $("jobs-note").textContent = all > jobs.length ? `The first ${number(jobs.length)} of ${number(all)}.` : jobs.length ? "" : "None.";
  for (const button of $("filter").children) {
    const status = button.dataset.status;
    if (status) button.querySelector("span").textContent = number(counts[status]);
    button.setAttribute("aria-pressed", String(status === filter));
  }
}

async function retry(job, button) {
  button.disabled = true;
  try {
    await asked(`/api/jobs/${encodeURIComponent(job.key)}/retry`, { method: "POST" });
    $("said").textContent = `${job.about || job.key} is tried again.`;
    await look();
  } catch (error) {
    trouble(error.message);
    button.disabled = false;
  }
}

// --- again and again --------------------------------------------------------------------------------------------------------

function trouble(message) {
  $("trouble").hidden = !message;
  $("trouble").textContent = message;
}

async function look() {
  const status = filter ? `&status=${filter}` : "";
  const overview = await asked(`/api/overview?limit=${LISTED}${status}`);
  $("model").textContent = `${overview.model_version}${overview.stand_in ? " (a stand-in model: no medical meaning)" : ""} · research use only`;
  showQueues(overview.queues);
  showWorkers(overview.workers);
  showJobs(overview.jobs, overview.counts);
}

async function lookSlowly() {
  await Promise.all([asked("/api/projects").then(showProjects), asked("/api/map").then(showMap)]);
}

async function round() {
  if (!document.hidden) {
    try {
      await look();
      if (rounds % SLOW_EVERY === 0) await lookSlowly();
      rounds += 1;
      trouble("");
    } catch (error) {
      trouble(error.message);
    }
  }
  setTimeout(round, EVERY_MS);
}

$("filter").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  filter = button.dataset.status;
  look().catch((error) => trouble(error.message));
});
setUpMap();
setUpTheme($("theme"));
round();
