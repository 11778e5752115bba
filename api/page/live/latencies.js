// --- Latencies ---------------------------------------------------------------------------------

const MAX_TICKS = 5;

// Where a logarithmic axis from `low` to `high` has its lines: at 1, 2, 5, 10 … and so on, or, if
// these are too many, at powers of ten.
function ticksOf(low, high) {
  for (const steps of [[1, 2, 5], [1]]) {
    const ticks = [];
    const first = Math.floor(Math.log10(low));
    for (let power = first; ; power += 1) {
      for (const step of steps) ticks.push(step * 10 ** power);
      if (10 ** power >= high) break;
    }
    const begin = ticks.findLastIndex((tick) => tick <= low * 1.0001);
    const end = ticks.findIndex((tick) => tick >= high * 0.9999 && tick > ticks[begin]);
    if (end - begin < MAX_TICKS || steps.length === 1) return ticks.slice(begin, end + 1);
  }
}

function drawLatency(id, series, what) {
  const [left, top, height] = [56, 10, 96];
  const [plot, width] = emptyPlot(id, top + height + 20);
  drawMinute(plot, left, width, top, top + height);
  const values = [...series.p50_s, ...series.p99_s].filter((value) => value !== null);
  if (!values.length) {
    put(`${id}-text`, "Nothing in the last minute");
    return;
  }
  const ticks = ticksOf(Math.min(...values), Math.max(...values));
  const [low, range] = [ticks[0], Math.log(ticks.at(-1) / ticks[0])];
  const yOf = (value) => top + height * (1 - Math.log(value / low) / range);
  for (const tick of ticks) {
    shape(plot, "line", { class: "grid", x1: left, x2: width, y1: yOf(tick), y2: yOf(tick) });
    const label = tick < 1 ? `${Number((tick * 1e3).toPrecision(1))} ms` : `${tick} s`;
    shape(plot, "text", { x: left - 6, y: yOf(tick) + 4, "text-anchor": "end" }, label);
  }
  for (const kind of ["p99", "p50"]) drawCurve(plot, series[`${kind}_s`], kind, left, width, yOf);
  put(
    `${id}-text`,
    `${plural(sum(series.num_observed), what)} in the last minute:` +
      ` p50 ${seconds(series.minute_p50_s)}, p99 ${seconds(series.minute_p99_s)}`,
  );
}

// A second in which there was nothing interrupts the curve; one alone is a dot.
function drawCurve(plot, values, kind, left, right, yOf) {
  let path = "";
  values.forEach((value, at) => {
    if (value === null) return;
    const x = left + (at / (values.length - 1)) * (right - left);
    const follows = (values[at - 1] ?? null) !== null;
    path += `${follows ? "L" : "M"}${x.toFixed(1)} ${yOf(value).toFixed(1)}`;
    if (!follows && (values[at + 1] ?? null) === null) {
      shape(plot, "circle", { class: kind, cx: x, cy: yOf(value), r: 2 });
    }
  });
  if (path) shape(plot, "path", { class: kind, d: path });
}
