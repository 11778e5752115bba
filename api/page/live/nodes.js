// --- The document's nodes ----------------------------------------------------------------------

const byId = (id) => document.getElementById(id);

// Text that stays the same is left alone: it stays selected, and nobody is read it twice.
function write(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

const put = (id, text) => write(byId(id), text);

// Gives `parent` one child for each item, in their order. An item keeps its child as long as there
// is one of its key.
function keep(parent, items, make, update) {
  const keys = new Set(items.map((item) => String(item.key)));
  for (const node of [...parent.children]) if (!keys.has(node.dataset.key)) node.remove();
  const known = new Map([...parent.children].map((node) => [node.dataset.key, node]));
  let place = parent.firstElementChild;
  for (const item of items) {
    const key = String(item.key);
    const node = known.get(key) ?? make(item);
    node.dataset.key = key;
    if (node === place) place = place.nextElementSibling;
    else parent.insertBefore(node, place);
    update(node, item);
  }
}

// Rows of a table. A cell is a text, or `{ number }` for one that stands on the right.
function keepRows(body, rows) {
  const make = (row) => {
    const node = document.createElement("tr");
    row.cells.forEach((cell, at) => {
      const child = node.appendChild(document.createElement(at ? "td" : "th"));
      if (!at) child.scope = "row";
      if (cell.number !== undefined) child.className = "number";
    });
    return node;
  };
  keep(body, rows, make, (node, row) => {
    row.cells.forEach((cell, at) => {
      const child = node.children[at];
      write(child, cell.number ?? cell);
      if (cell.number === undefined) child.title = cell;
    });
  });
}

const SVG = "http://www.w3.org/2000/svg";
const MINUTE_S = 60;
const NARROW_PX = 480;

function shape(parent, kind, attributes, text) {
  const node = parent.appendChild(document.createElementNS(SVG, kind));
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

// The emptied plot, and how wide it is: a unit of its own is a pixel.
function emptyPlot(id, height) {
  const plot = byId(id);
  const width = Math.max(plot.clientWidth, 200);
  plot.replaceChildren();
  plot.setAttribute("viewBox", `0 0 ${width} ${height}`);
  plot.setAttribute("height", height);
  return [plot, width];
}

function drawMinute(plot, left, right, top, bottom) {
  for (const ago of right < NARROW_PX ? [60, 30, 0] : [60, 45, 30, 15, 0]) {
    const x = right - (ago / MINUTE_S) * (right - left);
    shape(plot, "line", { class: "grid", x1: x, x2: x, y1: top, y2: bottom });
    const anchor = ago === 60 ? "start" : ago === 0 ? "end" : "middle";
    shape(plot, "text", { x, y: bottom + 14, "text-anchor": anchor }, ago ? `−${ago} s` : "now");
  }
}
