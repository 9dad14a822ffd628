// What the page asks of the server, and how it learns that something changed.

import { below } from "./addresses.js";

export const token = new URLSearchParams(location.search).get("slide") ?? "";
const query = `slide=${encodeURIComponent(token)}`;

/** An answer that says what is wrong: `code`, `message`, `hint`. */
export class Refused extends Error {
  constructor(error) {
    super(error.message);
    Object.assign(this, { code: error.code ?? "", hint: error.hint ?? "" });
  }
}

async function answered(path) {
  let answer;
  try {
    answer = await fetch(below(path));
  } catch {
    throw new Refused({ code: "unreachable", message: "The backend does not answer.", hint: "It is asked again by itself." });
  }
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => ({}));
  throw new Refused({ message: body.detail ?? `The backend answered ${answer.status}.`, ...body.error });
}

export const slide = async () => (await answered(`/panel/slide?${query}`)).json();
export const state = async () => (await answered(`/panel/state?${query}`)).json();
export const weights = async () => (await answered(`/panel/weights?${query}`)).arrayBuffer();
export const tissueUrl = () => below(`/panel/tissue.png?${query}`);
export const tileUrl = (level, x, y) => below(`/deepzoom/${token}/slide_files/${level}/${x}_${y}.jpg`);
export const regionUrl = (x, y, size, px) => below(`/deepzoom/${token}/region.jpg?x=${x}&y=${y}&size=${size}&px=${px}`);

const POLL_MS = 3000;
const REFUSALS_UNTIL_POLLING = 3;

/** Calls `onStatus` with each new status, by server-sent events, or by asking where these do not come through; while the page is seen. */
export function watch(onStatus) {
  let source = null;
  let timer = 0;
  let refusals = 0;
  let ended = false;

  function stop() {
    source?.close();
    source = null;
    clearTimeout(timer);
  }

  function stream() {
    source = new EventSource(below(`/panel/events?${query}`));
    source.addEventListener("status", (event) => {
      refusals = 0;
      onStatus(JSON.parse(event.data));
    });
    source.addEventListener("end", () => {
      ended = true;
      stop();
    });
    source.addEventListener("error", () => {
      refusals += 1;
      // The browser opens a broken stream again by itself, but not one that was refused.
      if (refusals < REFUSALS_UNTIL_POLLING && source?.readyState !== EventSource.CLOSED) return;
      stop();
      poll();
    });
  }

  async function poll() {
    try {
      onStatus((await state()).status);
    } catch (error) {
      onStatus({ phase: "unavailable", job: null, pushes: [], waiting: [], error });
    }
    timer = setTimeout(poll, POLL_MS);
  }

  function start() {
    if (refusals >= REFUSALS_UNTIL_POLLING || !window.EventSource) poll();
    else stream();
  }

  // A browser keeps few connections to one server: a panel in a hidden tab must not hold one.
  document.addEventListener("visibilitychange", () => {
    stop();
    if (!document.hidden) {
      ended = false;
      start();
    }
  });
  if (!ended) start();
}
