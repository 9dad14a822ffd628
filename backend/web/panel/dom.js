// Elements out of names, attributes and children.

const SVG = "http://www.w3.org/2000/svg";

/** An HTML element; `text` is its text, other members are attributes, those of `null` and `undefined` left out. */
export function element(name, { text, ...attributes } = {}, ...children) {
  return filled(document.createElement(name), text, attributes, children);
}

/** An SVG element, as `element`. */
export function drawn(name, { text, ...attributes } = {}, ...children) {
  return filled(document.createElementNS(SVG, name), text, attributes, children);
}

function filled(made, text, attributes, children) {
  if (text !== undefined) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) if (value !== null && value !== undefined) made.setAttribute(key, value);
  made.append(...children);
  return made;
}
