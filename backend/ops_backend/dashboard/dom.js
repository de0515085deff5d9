/**
 * Elements from plain values, and a tree brought up to date without losing focus, selection or scroll.
 * Strings become text nodes; nothing here ever reads HTML, so no name can become markup.
 */

const SVG = "http://www.w3.org/2000/svg";

/**
 * @param {string} tag
 * @param {Object<string, any>} [props] attributes; `onclick` and the like; `style` as an object; `key` says which of its
 *   siblings it is; `keep` leaves what is in it alone; `value`, `checked` and `selected` are what the state says
 */
export function h(tag, props = {}, ...children) {
  return made(document.createElement(tag), props, children);
}

export function svg(tag, props = {}, ...children) {
  return made(document.createElementNS(SVG, tag), props, children);
}

/** Makes the children of `parent` what they should be, changing only what differs. */
export function render(parent, ...children) {
  sync(parent, nodes(children));
}

function made(element, props, children) {
  element.listens = [];
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "key" || name === "keep") element[name] = value;
    else if (name === "style") for (const [rule, is] of Object.entries(value)) element.style.setProperty(rule, is);
    else if (name.startsWith("on")) {
      element[name] = value;
      element.listens.push(name);
    } else if (name === "value" || name === "checked" || name === "selected")
      element.stated = { ...element.stated, [name]: value };
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...nodes(children));
  for (const [name, value] of Object.entries(element.stated ?? {})) element[name] = value;
  return element;
}

function nodes(children) {
  return children
    .flat(Infinity)
    .filter(child => child !== null && child !== undefined && child !== false && child !== "")
    .map(child => (child instanceof Node ? child : document.createTextNode(String(child))));
}

function sync(parent, wanted) {
  const keys = new Set(wanted.map(node => node.key).filter(Boolean));
  const keyed = new Map();
  for (const child of [...parent.childNodes]) {
    if (!child.key) continue;
    if (keys.has(child.key)) keyed.set(child.key, child);
    else child.remove();
  }
  let at = parent.firstChild;
  for (const node of wanted) {
    const old = node.key ? keyed.get(node.key) : at && !at.key && at;
    if (!old || !alike(old, node)) {
      parent.insertBefore(node, at);
      continue;
    }
    if (old === at) at = at.nextSibling;
    else parent.insertBefore(old, at);
    morph(old, node);
  }
  while (at) {
    const next = at.nextSibling;
    at.remove();
    at = next;
  }
}

function alike(old, node) {
  return old.nodeName === node.nodeName && old.key === node.key;
}

function morph(old, node) {
  if (old === node) return;
  if (node.nodeType === Node.TEXT_NODE) {
    if (old.data !== node.data) old.data = node.data;
    return;
  }
  // What the reader opened stays open.
  for (const { name } of [...old.attributes])
    if (!node.hasAttribute(name) && name !== "open" && name !== "style") old.removeAttribute(name);
  for (const { name, value } of node.attributes)
    if (name !== "style" && old.getAttribute(name) !== value) old.setAttribute(name, value);
  if (old.style.cssText !== node.style.cssText) old.style.cssText = node.style.cssText;
  for (const name of new Set([...(old.listens ?? []), ...node.listens])) old[name] = node[name] ?? null;
  old.listens = node.listens;
  if (!node.keep) sync(old, [...node.childNodes]);
  for (const [name, value] of Object.entries(node.stated ?? {})) if (old[name] !== value) old[name] = value;
}
