"use strict";

// What is drawn comes from /v1/live once a second. Everything the server says goes into the page
// as text, never as markup.

const PERIOD_MS = 1000;
const TIMEOUT_MS = 8000;
const MINUTE_S = 60;
const MIN_SEGMENT_PX = 4;
const LABEL_PX = 48;
const SPARSE = 0.05;
const NARROW_PX = 480;
const MAX_ROWS = 50;
const KEY_ITEM = "sidestream-key";

const byId = (id) => document.getElementById(id);
const put = (id, text) => {
  // Unchanged text is left alone, so that nobody is read the same again.
  const node = byId(id);
  if (node.textContent !== text) node.textContent = text;
};

// --- Numbers for people ------------------------------------------------------------------------

function bytes(count) {
  const units = ["B", "KB", "MB", "GB", "TB"];
  let at = 0;
  while (count >= 1000 && at < units.length - 1) {
    count /= 1000;
    at += 1;
  }
  return `${count.toFixed(at && count < 100 ? 1 : 0)} ${units[at]}`;
}

function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 0.01) return `${(value * 1e3).toFixed(1)} ms`;
  if (value < 1) return `${(value * 1e3).toFixed(0)} ms`;
  return value < 100 ? `${value.toFixed(1)} s` : `${Math.round(value / 60)} min`;
}

const percent = (share) => `${Math.round(100 * share)} %`;
const sum = (numbers) => numbers.reduce((total, each) => total + each, 0);
const plural = (count, what) => `${count} ${what}${count === 1 ? "" : "s"}`;

// An adapter keeps its colour. Lightness is fixed, so that dark text stays legible on all of them.
const colour = (id) => `hsl(${(id * 137.508) % 360} 55% 70%)`;

// --- Asking the server -------------------------------------------------------------------------

function headers(extra) {
  const key = sessionStorage.getItem(KEY_ITEM);
  return key ? { ...extra, authorization: `Bearer ${key}` } : { ...extra };
}

async function errorOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}

async function ask(path) {
  const response = await fetch(path, { headers: headers(), signal: AbortSignal.timeout(TIMEOUT_MS) });
  if (response.status === 401 || response.status === 403) {
    byId("key-form").hidden = false;
    showState("waiting", "A key is needed");
    return null;
  }
  if (!response.ok) throw new Error(await errorOf(response));
  return response.json();
}

function showState(state, text) {
  byId("state").dataset.state = state;
  put("state", text);
}

// --- Where adapters are ------------------------------------------------------------------------

// Segments lie side by side in the order given, each as wide as its share of the bar's bytes. Those
// too narrow to be seen are put together as one.
function drawBar(bar, items, total) {
  const width = bar.clientWidth;
  const shown = [];
  const rest = { num: 0, bytes: 0 };
  for (const item of items) {
    if ((item.bytes / total) * width >= MIN_SEGMENT_PX) shown.push(item);
    else {
      rest.num += 1;
      rest.bytes += item.bytes;
    }
  }
  if (rest.num) {
    const name = `${rest.num} smaller`;
    shown.push({ key: "rest", name, bytes: rest.bytes, className: "rest" });
  }
  const known = new Map([...bar.children].map((node) => [node.dataset.key, node]));
  let left = 0;
  for (const item of shown) {
    const key = String(item.key);
    const node = known.get(key) ?? bar.appendChild(document.createElement("span"));
    known.delete(key);
    const share = item.bytes / total;
    node.dataset.key = key;
    node.className = item.className ?? "";
    node.classList.toggle("narrow", share * width < LABEL_PX);
    node.style.left = `${100 * left}%`;
    node.style.width = `${100 * share}%`;
    if (item.id !== undefined) node.style.backgroundColor = colour(item.id);
    node.textContent = item.name;
    node.title = `${item.name}: ${bytes(item.bytes)}`;
    left += share;
  }
  for (const node of known.values()) node.remove();
}

function rowsOf(body, rows) {
  body.replaceChildren(
    ...rows.map((cells) => {
      const row = document.createElement("tr");
      cells.forEach((text, at) => {
        const cell = row.appendChild(document.createElement(at ? "td" : "th"));
        if (!at) cell.scope = "row";
        if (typeof text === "object") {
          cell.className = "number";
          cell.textContent = text.number;
        } else {
          cell.textContent = text;
          cell.title = text;
        }
      });
      return row;
    }),
  );
}

function drawWhere(engine) {
  const name = (id) => engine.names[id] ?? `(removed, ${id})`;
  const slots = engine.step_thread.slots;
  const pool = slots.map((slot) => ({
    key: slot.adapter_id,
    id: slot.adapter_id,
    name: name(slot.adapter_id),
    bytes: slot.num_bytes,
    className: slot.is_loading ? "coming" : "",
  }));
  const host = engine.host_images.map((image) => ({
    key: image.adapter_id,
    id: image.adapter_id,
    name: name(image.adapter_id),
    bytes: image.num_bytes,
  }));
  const unnamed = engine.num_host_images - host.length;
  if (unnamed > 0) {
    const left = Math.max(0, engine.host_tier_bytes_used - sum(host.map((item) => item.bytes)));
    host.push({ key: "more", name: `${unnamed} more`, bytes: left, className: "rest" });
  }
  const largest = (one, other) => other.bytes - one.bytes;
  drawBar(byId("pool"), pool.sort(largest), engine.pool_bytes_total || 1);
  // A tier that is nearly empty would show nothing: its bar is then of what is used, and says so.
  const whole = engine.host_tier_bytes_used >= SPARSE * engine.host_tier_bytes_total;
  const scale = whole ? engine.host_tier_bytes_total : engine.host_tier_bytes_used;
  drawBar(byId("host"), host, scale || 1);
  put("pool-size", `${bytes(engine.pool_bytes_used)} of ${bytes(engine.pool_bytes_total)}`);
  put("host-size", `${bytes(engine.host_tier_bytes_used)} of ${bytes(engine.host_tier_bytes_total)}`);
  put("pool-text", `${plural(slots.length, "adapter")} in GPU memory`);
  const note = whole || !host.length ? "" : "; the bar shows what is used alone";
  put("host-text", `${plural(engine.num_host_images, "adapter")} in host memory${note}`);

  const coming = slots.filter((slot) => slot.is_loading);
  byId("way").replaceChildren(
    ...coming.map((slot) => {
      const item = document.createElement("li");
      const label = item.appendChild(document.createElement("span"));
      label.textContent = name(slot.adapter_id);
      const bar = item.appendChild(document.createElement("progress"));
      bar.value = slot.placed;
      bar.setAttribute("aria-label", `${name(slot.adapter_id)}: layers placed`);
      const note = item.appendChild(document.createElement("span"));
      note.textContent = `${bytes(slot.num_bytes * slot.placed)} of ${bytes(slot.num_bytes)}`;
      return item;
    }),
  );
  if (!coming.length) {
    const item = byId("way").appendChild(document.createElement("li"));
    item.className = "faint";
    item.textContent = "Nothing";
  }
  const requests = new Map(slots.map((slot) => [slot.adapter_id, slot.num_requests]));
  rowsOf(byId("where-rows"), [
    ...pool.map((item) => [
      item.name,
      item.className ? "on the way" : "pool",
      { number: bytes(item.bytes) },
      { number: String(requests.get(item.id)) },
    ]),
    ...host.map((item) => [item.name, "host", { number: bytes(item.bytes) }, { number: "" }]),
  ]);
}

// --- The last minute ---------------------------------------------------------------------------

const SVG = "http://www.w3.org/2000/svg";

function shape(parent, kind, attributes, text) {
  const node = parent.appendChild(document.createElementNS(SVG, kind));
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function emptyPlot(id, height) {
  const plot = byId(id);
  const width = Math.max(plot.clientWidth, 200);
  plot.replaceChildren();
  plot.setAttribute("viewBox", `0 0 ${width} ${height}`);
  plot.setAttribute("height", height);
  return [plot, width];
}

function drawAxis(plot, left, right, top, bottom) {
  for (const ago of right < NARROW_PX ? [60, 30, 0] : [60, 45, 30, 15, 0]) {
    const x = right - (ago / MINUTE_S) * (right - left);
    shape(plot, "line", { class: "grid", x1: x, x2: x, y1: top, y2: bottom });
    const anchor = ago === 60 ? "start" : ago === 0 ? "end" : "middle";
    shape(plot, "text", { x, y: bottom + 14, "text-anchor": anchor }, ago ? `−${ago} s` : "now");
  }
}

// Loads that overlap in time lie in rows of their own.
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

function drawTimeline(engine) {
  const { steps, slots, loads } = engine.step_thread;
  const name = (id) => engine.names[id] ?? `(removed, ${id})`;
  // In seconds before now: a load on the way is drawn as if it had begun when it was first seen.
  const rows = inRows([
    ...loads.map((load) => ({
      begin: load.ended_ago_s + load.took_s,
      end: load.ended_ago_s,
      title: `${name(load.adapter_id)}: ${bytes(load.num_bytes)} in ${seconds(load.took_s)}`,
    })),
    ...slots
      .filter((slot) => slot.is_loading)
      .map((slot) => ({
        begin: firstSeen(slot.adapter_id),
        end: 0,
        title: `${name(slot.adapter_id)}: on the way`,
        coming: true,
      })),
  ]);
  const numRows = Math.min(12, Math.max(1, ...rows.map((load) => load.row + 1)));
  const [laneTop, laneHeight, rowHeight] = [14, 64, 12];
  const loadTop = laneTop + laneHeight + 26;
  const bottom = loadTop + numRows * rowHeight;
  const [plot, width] = emptyPlot("timeline", bottom + 20);
  shape(plot, "text", { x: 0, y: 10 }, "Forward stream");
  shape(plot, "text", { x: 0, y: loadTop - 5 }, "Load stream");
  shape(plot, "rect", { class: "lane", x: 0, y: laneTop, width, height: laneHeight });
  shape(plot, "rect", { class: "lane", x: 0, y: loadTop, width, height: bottom - loadTop });
  drawAxis(plot, 0, width, laneTop, bottom);
  const cells = steps.decode_s.length;
  const base = new Array(cells).fill(0);
  for (const kind of ["decode", "prefill", "layers"]) {
    const busy = steps[`${kind}_s`];
    let path = "";
    for (let at = 0; at < cells; at += 1) {
      if (!busy[at]) continue;
      const height = Math.min(1 - base[at], busy[at] / steps.cell_s) * laneHeight;
      const y = laneTop + laneHeight * (1 - base[at]) - height;
      const x = (at / cells) * width;
      path += `M${x.toFixed(2)} ${y.toFixed(2)}h${(width / cells).toFixed(2)}v${height.toFixed(2)}h${(-width / cells).toFixed(2)}z`;
      base[at] += busy[at] / steps.cell_s;
    }
    if (path) shape(plot, "path", { class: kind, d: path });
  }
  for (const load of rows) {
    if (load.row >= numRows) continue;
    const begin = Math.min(load.begin, MINUTE_S);
    const x = width * (1 - begin / MINUTE_S);
    const node = shape(plot, "rect", {
      class: load.coming ? "load coming" : "load",
      x,
      y: loadTop + load.row * rowHeight + 1,
      width: Math.max(1.5, width * (1 - load.end / MINUTE_S) - x),
      height: rowHeight - 2,
      rx: 2,
    });
    shape(node, "title", {}, load.title);
  }
  const busy = sum(steps.decode_s) + sum(steps.prefill_s) + sum(steps.layers_s);
  const longest = Math.max(...steps.longest_s);
  put(
    "timeline-text",
    `${plural(sum(steps.num_steps), "step")}, ${percent(busy / (cells * steps.cell_s))} busy, the` +
      ` longest ${seconds(longest || null)}; ${plural(loads.length, "load")} of` +
      ` ${bytes(sum(loads.map((load) => load.num_bytes)))}`,
  );
}

const seen = new Map();

function firstSeen(id) {
  const now = performance.now() / 1e3;
  if (!seen.has(id)) seen.set(id, now);
  return now - seen.get(id) + 0.2;
}

function forgetPlaced(slots) {
  const coming = new Set(slots.filter((slot) => slot.is_loading).map((slot) => slot.adapter_id));
  for (const id of seen.keys()) if (!coming.has(id)) seen.delete(id);
}

// --- Latencies ---------------------------------------------------------------------------------

function niceCeiling(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].find((step) => step * power >= value * 0.9999) * power;
}

function drawLatency(id, series) {
  const [top, height] = [10, 96];
  const [plot, width] = emptyPlot(id, top + height + 20);
  const left = 52;
  const most = Math.max(0, ...series.p99_s.map((value) => value ?? 0));
  const scale = most ? niceCeiling(most) : 1;
  drawAxis(plot, left, width, top, top + height);
  for (const share of [0, 0.5, 1]) {
    const y = top + height * (1 - share);
    shape(plot, "line", { class: "grid", x1: left, x2: width, y1: y, y2: y });
    const label = most ? (share ? seconds(scale * share) : "0") : "";
    shape(plot, "text", { x: left - 6, y: y + 4, "text-anchor": "end" }, label);
  }
  const last = series.p50_s.length - 1;
  for (const kind of ["p50", "p99"]) {
    let path = "";
    series[`${kind}_s`].forEach((value, at, all) => {
      if (value === null) return;
      const x = left + (at / last) * (width - left);
      const y = top + height * (1 - value / scale);
      const follows = at > 0 && all[at - 1] !== null;
      path += `${follows ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`;
      if (!follows && (all[at + 1] ?? null) === null) shape(plot, "circle", { class: kind, cx: x, cy: y, r: 2 });
    });
    if (path) shape(plot, "path", { class: kind, d: path });
  }
  const count = sum(series.num_observed);
  put(
    `${id}-text`,
    count
      ? `${plural(count, "token")}; p50 ${seconds(middle(series, "p50_s"))}, worst second's p99 ${seconds(most)}`
      : "No tokens in the last minute",
  );
}

// The seconds' quantiles, each as often as it was observed.
function middle(series, which) {
  const pairs = series[which]
    .map((value, at) => [value, series.num_observed[at]])
    .filter(([value]) => value !== null)
    .sort((one, other) => one[0] - other[0]);
  let left = sum(pairs.map(([, count]) => count)) / 2;
  for (const [value, count] of pairs) {
    left -= count;
    if (left <= 0) return value;
  }
  return null;
}

// --- Requests and figures ------------------------------------------------------------------------

function drawRequests(engine) {
  const { requests, num_running: running, num_waiting: waiting } = engine.step_thread;
  const total = Math.max(requests.length, running + waiting);
  const rows = requests.slice(0, MAX_ROWS).map((request) => [
    request.request_id,
    request.adapter_id === null ? "base model" : (engine.names[request.adapter_id] ?? "(removed)"),
    request.state,
    { number: seconds(request.age_s) },
    { number: String(request.num_prompt_tokens) },
    { number: String(request.num_output_tokens) },
  ]);
  rowsOf(byId("requests"), rows);
  const more = total - rows.length;
  put("requests-more", total ? (more > 0 ? `and ${more} more` : "") : "None");
}

// Over some five seconds, so that the figure can be read.
const counted = [];

function tokenRate(engine) {
  const now = { at: performance.now(), epoch: engine.engine_epoch };
  now.tokens = engine.step_thread.generation_tokens_total;
  if (counted.length && counted[0].epoch !== now.epoch) counted.length = 0;
  counted.push(now);
  while (counted.length > 2 && now.at - counted[0].at > 5500) counted.shift();
  const first = counted[0];
  if (now.at - first.at < 500) return "–";
  return String(Math.round(((now.tokens - first.tokens) * 1e3) / (now.at - first.at)));
}

function drawFigures(view) {
  const known = view.engine.step_thread;
  const { steps } = known;
  put("running", String(known.num_running));
  put("waiting", String(known.num_waiting));
  put("rate", tokenRate(view.engine));
  const recent = Math.round(5 / steps.cell_s);
  const last = (cells) => sum(cells.slice(-recent)) / (recent * steps.cell_s);
  put("busy", percent(last(steps.decode_s) + last(steps.prefill_s) + last(steps.layers_s)));
  put("ttft", seconds(middle(view.first_token, "p50_s")));
  put("itl", seconds(middle(view.next_token, "p99_s")));
}

function draw(view) {
  put("model", view.model);
  put("release", `· ${view.version} · up ${seconds(view.uptime_s)}`);
  document.title = `${view.model} · Sidestream`;
  hasChat = view.has_chat;
  drawLatency("first", view.first_token);
  drawLatency("next", view.next_token);
  if (!view.engine) {
    showState("away", `Engine away: ${view.reason}`);
    return;
  }
  if (view.engine.loader_connected) showState("ready", "Ready");
  else showState("away", "Loader away: resident adapters are served");
  drawWhere(view.engine);
  drawTimeline(view.engine);
  drawRequests(view.engine);
  drawFigures(view);
  forgetPlaced(view.engine.step_thread.slots);
}

// --- The prompt --------------------------------------------------------------------------------

let hasChat = false;
let running = null;
let targetsAt = -Infinity;

async function listTargets() {
  if (performance.now() - targetsAt < 5000) return;
  const listed = await ask("/v1/models");
  if (!listed) return;
  targetsAt = performance.now();
  const names = listed.data.map((model) => model.id);
  const list = byId("targets");
  const known = [...list.children].map((option) => option.value);
  if (names.join("\n") !== known.join("\n")) {
    list.replaceChildren(
      ...names.map((name) => Object.assign(document.createElement("option"), { value: name })),
    );
  }
  if (!byId("target").value) byId("target").value = names[0] ?? "";
}

async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function generate(signal) {
  const prompt = byId("prompt").value;
  const body = {
    model: byId("target").value,
    max_tokens: byId("max-tokens").valueAsNumber,
    temperature: byId("temperature").valueAsNumber,
    stream: true,
    stream_options: { include_usage: true },
    ...(hasChat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
  };
  const began = performance.now();
  const response = await fetch(hasChat ? "/v1/chat/completions" : "/v1/completions", {
    method: "POST",
    headers: headers({ "content-type": "application/json" }),
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) throw new Error(await errorOf(response));
  let first = null;
  for await (const event of eventsOf(response)) {
    if (event.error) throw new Error(event.error.message);
    for (const choice of event.choices) {
      const text = choice.delta?.content ?? choice.text ?? "";
      if (text) {
        first ??= performance.now() - began;
        byId("answer").append(text);
      }
    }
    if (event.usage && !event.choices.length) {
      const took = (performance.now() - began) / 1e3;
      put(
        "answer-figures",
        `${plural(event.usage.completion_tokens, "token")} in ${seconds(took)}` +
          (first === null ? "" : `, the first after ${seconds(first / 1e3)}`),
      );
    }
  }
}

byId("try").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (running) return;
  running = new AbortController();
  put("try-error", "");
  put("answer-figures", "");
  byId("answer").replaceChildren();
  byId("send").disabled = true;
  byId("stop").disabled = false;
  try {
    await generate(running.signal);
  } catch (error) {
    if (error.name === "AbortError") put("answer-figures", "Stopped");
    else put("try-error", error.message);
  } finally {
    running = null;
    byId("send").disabled = false;
    byId("stop").disabled = true;
  }
});

byId("stop").addEventListener("click", () => running?.abort());

byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("try").requestSubmit();
});

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY_ITEM, byId("key").value);
  byId("key").value = "";
  byId("key-form").hidden = true;
  showState("waiting", "Connecting");
  look();
});

// --- Once a second -------------------------------------------------------------------------------

let latest = null;
let timer = null;

async function look() {
  clearTimeout(timer);
  try {
    const view = await ask("/v1/live");
    if (view) {
      latest = view;
      draw(view);
      await listTargets();
    }
  } catch (error) {
    showState("away", latest ? "Connection lost, trying again" : `No connection: ${error.message}`);
  }
  // With no key there is nothing to ask for; out of sight nobody looks.
  if (byId("key-form").hidden && !document.hidden) timer = setTimeout(look, PERIOD_MS);
}

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) look();
});
addEventListener("resize", () => latest && draw(latest));
look();
