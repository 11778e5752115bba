// --- The last minute ---------------------------------------------------------------------------

const MAX_ROWS_OF_LOADS = 12;
const KINDS = ["decode", "prefill", "layers"];

// Loads that overlap in time lie in rows of their own. All times are seconds before now.
function inRows(loads) {
  const ends = [];
  return loads
    .sort((one, other) => other.begin - one.begin)
    .map((load) => {
      let row = ends.findIndex((end) => end >= load.begin);
      if (row < 0) row = ends.push(0) - 1;
      ends[row] = load.end;
      return { ...load, row };
    });
}

function loadRows(engine) {
  const { slots, loads } = engine.step_thread;
  return inRows([
    ...loads.longest.map((load) => ({
      begin: load.ended_ago_s + load.took_s,
      end: load.ended_ago_s,
      title: `${nameOf(engine, load.adapter_id)}: ${bytes(load.num_bytes)} in ${seconds(load.took_s)}`,
    })),
    ...slots
      .filter((slot) => slot.load)
      .map((slot) => ({
        begin: slot.load.age_s,
        end: 0,
        title: `${nameOf(engine, slot.adapter_id)}: ${PHASES[slot.load.phase]}`,
        className: "coming",
      })),
  ]).filter((load) => load.row < MAX_ROWS_OF_LOADS);
}

// One path a kind: the share of each cell in which the device was at it, upon the kinds before it.
function drawSteps(plot, steps, width, top, height) {
  const cells = steps.decode_s.length;
  const cell = width / cells;
  const base = new Array(cells).fill(0);
  for (const kind of KINDS) {
    let path = "";
    steps[`${kind}_s`].forEach((busy, at) => {
      const share = Math.min(1 - base[at], busy / steps.cell_s);
      if (share <= 0) return;
      base[at] += share;
      const [x, y, h] = [at * cell, top + height * (1 - base[at]), share * height];
      path += `M${x.toFixed(2)} ${y.toFixed(2)}h${cell.toFixed(2)}v${h.toFixed(2)}h${(-cell).toFixed(2)}z`;
    });
    if (path) shape(plot, "path", { class: kind, d: path });
  }
}

function drawTimeline(engine) {
  const { steps, loads } = engine.step_thread;
  const rows = loadRows(engine);
  const numRows = Math.max(1, ...rows.map((load) => load.row + 1));
  const [top, height, rowHeight] = [16, 64, 12];
  const loadTop = top + height + 28;
  const bottom = loadTop + numRows * rowHeight;
  const [plot, width] = emptyPlot("timeline", bottom + 20);
  const share = `Forward stream: share of each ${seconds(steps.cell_s)} at work`;
  shape(plot, "text", { x: 0, y: top - 5 }, share);
  shape(plot, "text", { x: 0, y: loadTop - 5 }, "Load stream");
  shape(plot, "rect", { class: "lane", x: 0, y: top, width, height });
  shape(plot, "rect", { class: "lane", x: 0, y: loadTop, width, height: bottom - loadTop });
  drawMinute(plot, 0, width, top, bottom);
  drawSteps(plot, steps, width, top, height);
  for (const load of rows) {
    const x = width * (1 - Math.min(load.begin, MINUTE_S) / MINUTE_S);
    const node = shape(plot, "rect", {
      class: `load ${load.className ?? ""}`,
      x,
      y: loadTop + load.row * rowHeight + 1,
      width: Math.max(1.5, width * (1 - load.end / MINUTE_S) - x),
      height: rowHeight - 2,
      rx: 2,
    });
    shape(node, "title", {}, load.title);
  }
  tellTimeline(steps, loads);
}

function tellTimeline(steps, loads) {
  const busy = sum(KINDS.map((kind) => sum(steps[`${kind}_s`])));
  const share = busy / (steps.decode_s.length * steps.cell_s);
  const longest = Math.max(...steps.longest_s);
  const unseen = loads.num_loads - loads.longest.length;
  put(
    "timeline-text",
    `${plural(sum(steps.num_steps), "step")}, ${percent(share)} of the minute` +
      (longest ? `, the longest ${seconds(longest)}` : "") +
      `; ${plural(loads.num_loads, "load")}, ${bytes(loads.num_bytes)} in all` +
      (unseen > 0 ? `, the ${whole(unseen)} shortest not drawn` : ""),
  );
}
