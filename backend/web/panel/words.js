// Numbers and states in words.

const STAGES = {
  start: "Starting",
  fetch: "Fetching the slide",
  open: "Opening the slide",
  tissue: "Looking for tissue",
  encode: "Encoding tiles",
  store: "Storing the result",
};

export const PHASES = {
  idle: "not analysed",
  queued: "waiting",
  running: "analysing",
  done: "analysed",
  failed: "failed",
  unavailable: "unknown",
};

export function duration(seconds) {
  if (seconds < 60) return `${Math.max(1, Math.round(seconds))} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

export function percent(part) {
  const value = 100 * part;
  return `${value >= 10 ? value.toFixed(0) : value >= 1 ? value.toFixed(1) : value.toPrecision(2)} %`;
}

/** A confidence. It is never rounded to certainty. */
export function sure(part) {
  const value = Math.round(100 * part);
  if (value >= 100) return "> 99 %";
  return value < 1 ? "< 1 %" : `${value} %`;
}

export function number(value) {
  return value.toLocaleString("en").replaceAll(",", "\u202f");
}

export function bytes(value) {
  return value >= 2 ** 30 ? `${(value / 2 ** 30).toFixed(1)} GiB` : `${Math.round(value / 2 ** 20)} MiB`;
}

/** What a job does now, as [title, detail]; `null` when there is nothing to say. */
export function progress(status) {
  const job = status.job;
  if (status.phase === "idle") {
    return ["Not analysed yet.", "Open its task in Label Studio, or choose “Retrieve Predictions” there: that submits the slide."];
  }
  if (status.phase === "queued" && job) {
    if (job.error?.code === "model_mismatch") return ["Waiting for a worker that fits.", job.error.message];
    const place = job.position ? `Place ${number(job.position)} in the queue “${job.queue}”.` : "It is tried again in a moment.";
    return ["Waiting for a worker.", job.error ? `${place} The last try failed: ${job.error.message}` : place];
  }
  if (status.phase === "running" && job) {
    const parts = [];
    if (job.total) parts.push(`${number(job.done)} of ${number(job.total)} tiles`);
    if (job.tiles_per_s) parts.push(`${job.tiles_per_s.toFixed(job.tiles_per_s < 10 ? 1 : 0)} tiles/s`);
    if (job.left_s) parts.push(`about ${duration(job.left_s)} left`);
    if (job.device) parts.push(job.device);
    return [`${STAGES[job.stage] ?? job.stage ?? "Working"}.`, parts.join(" · ")];
  }
  if (status.phase === "done" && status.waiting.length && !status.pushes.length) {
    return ["Analysed.", "The prediction is being pushed to Label Studio."];
  }
  return null;
}

/** What was kept under `name`; `null` if nothing was, or a frame of another site is denied storage. */
export function recall(name, storage = () => localStorage) {
  try {
    return storage().getItem(name);
  } catch {
    return null;
  }
}

/** Keep `value` under `name`, where that is allowed; elsewhere it holds for this page. */
export function remember(name, value, storage = () => localStorage) {
  try {
    storage().setItem(name, value);
  } catch {
    console.debug("storage is denied here");
  }
}

export function switchTheme() {
  const root = document.documentElement;
  const dark = (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  root.dataset.theme = dark ? "light" : "dark";
  remember("theme", root.dataset.theme);
}

/** The chosen theme on this page, and its button. */
export function setUpTheme(button) {
  const stored = recall("theme");
  if (stored) document.documentElement.dataset.theme = stored;
  button.addEventListener("click", switchTheme);
}
