// What heads say of the slide, and where labelled slides like it are listed; where nothing was learnt, what is missing.
import { below } from "./addresses.js";
import { element } from "./dom.js";
import { number, sure } from "./words.js";

const MOST_CHOICES = 5;
const $ = (id) => document.getElementById(id);

/** Shows the members `suggestion`, `similar_page` and `learning` of /panel/state; what is not there is hidden. */
export function showLearnt({ suggestion, similar_page: similar, learning }) {
  const controls = suggestion?.controls ?? [];
  $("suggested").hidden = !controls.length;
  $("suggestions").replaceChildren(...controls.map((said) => group(said, controls.length > 1)));
  $("suggested-by").textContent = controls.length ? `Research use only · ${suggestion.model_version}` : "";
  $("similar").hidden = !similar;
  if (similar) $("similar-link").href = below(similar);
  $("learnt").hidden = !controls.length && !similar;
  $("learning").hidden = !learning?.length;
  $("learning").textContent = (learning ?? []).join(" ");
}

function group(said, named) {
  const made = element("section", { "aria-label": said.control });
  if (named) made.append(element("h3", { text: said.control }));
  made.append(said.choices.length ? choices(said) : value(said));
  for (const note of said.notes ?? []) made.append(element("p", { class: "quiet small", text: note }));
  const from = `Confidence from ${number(said.labels)} labelled slides${said.calibrated || !said.choices.length ? "" : ", not calibrated yet"}.`;
  made.append(element("p", { class: "quiet small", text: from }));
  return made;
}

function choices({ choices: all, kind, value: chosen }) {
  const shown = all.slice(0, MOST_CHOICES);
  const rows = shown.map(({ label, confidence, figures }) => {
    const said = kind === "choices" ? chosen.includes(label) : label === chosen;
    return element("li", { class: said ? "said" : null, title: figures ? told(figures) : null },
      element("span", { class: "label", text: label }),
      element("span", { class: "sure", text: sure(confidence) }),
      element("meter", { min: 0, max: 1, value: confidence, "aria-label": `Confidence in ${label}` }));
  });
  const rest = all.length - shown.length;
  if (rest) rows.push(element("li", { class: "quiet small", text: `and ${number(rest)} less likely` }));
  return element("ul", {}, ...rows);
}

const percent = (part) => `${Number((100 * part).toPrecision(part < 0.01 ? 1 : 2))} %`;

function told({ precision, recall, assumed, source }) {
  const parts = [`Prevalence ${percent(assumed)}, ${source}`];
  if (precision) parts.push(`${percent(precision[0])} of those called so are right (precision)`);
  if (recall) parts.push(`${percent(recall[0])} of those that are so are called so (recall)`);
  return parts.join("; ");
}

function value({ kind, value: said, confidence, tolerance }) {
  const shown = kind === "rating" ? `${said} ${said === 1 ? "star" : "stars"}` : number(Number(said.toPrecision(3)));
  const near = kind === "rating" ? "exactly this" : `within ± ${Number(tolerance.toPrecision(2))}`;
  return element("ul", {}, element("li", { class: "said" },
    element("span", { class: "label", text: shown }),
    element("span", { class: "sure", text: sure(confidence) }),
    element("meter", { min: 0, max: 1, value: confidence, "aria-label": `Confidence that it is ${near}` }),
    element("span", { class: "quiet small", text: near })));
}
