// --- Where adapters are ------------------------------------------------------------------------

const MIN_SEGMENT_PX = 4;
const LABEL_PX = 48;
const SPARSE = 0.05;
const NUM_TOLD = 3;
const PHASES = { reading: "being read", copying: "being copied", cancelling: "being cancelled" };

// An adapter keeps its colour in every tier. Lightness is fixed, so that dark text is legible on it.
const colour = (id, lightness = 70) => `hsl(${(id * 137.508) % 360} 55% ${lightness}%)`;

const nameOf = (engine, id) => engine.names[id] ?? `(removed, ${id})`;

// Segments lie side by side, each as wide as its share of `total` bytes. Those too narrow to be
// seen come last as one, with `rest`, which has no items of its own.
function drawBar(bar, items, rest, total) {
  const width = bar.clientWidth;
  const isVisible = (item) => (item.bytes / total) * width >= MIN_SEGMENT_PX;
  const shown = items.filter(isVisible);
  const numHidden = items.length - shown.length + rest.num;
  if (numHidden) {
    const hidden = sum(items.filter((item) => !isVisible(item)).map((item) => item.bytes));
    const name = shown.length ? `${whole(numHidden)} smaller` : plural(numHidden, "adapter");
    shown.push({ key: "rest", name, bytes: hidden + rest.bytes, className: "rest" });
  }
  let left = 0;
  keep(bar, shown, () => document.createElement("span"), (node, item) => {
    const share = item.bytes / total;
    node.className = item.className ?? "";
    node.classList.toggle("narrow", share * width < LABEL_PX);
    node.style.left = `${100 * left}%`;
    node.style.width = `${100 * share}%`;
    if (item.id !== undefined) {
      node.style.setProperty("--adapter", colour(item.id));
      node.style.setProperty("--awaited", colour(item.id, 88));
    }
    if (item.load) node.style.setProperty("--placed", `${100 * item.load.placed}%`);
    write(node, item.name);
    node.title = `${item.name}: ${bytes(item.bytes)}`;
    left += share;
  });
}

function segment(engine, id, numBytes, load) {
  const name = nameOf(engine, id);
  return { key: id, id, name, bytes: numBytes, load, className: load ? "coming" : "" };
}

// A tier in one sentence, for those who do not see its bar.
function tell(items, num, where) {
  const told = items.slice(0, NUM_TOLD).map((item) => `${item.name} (${bytes(item.bytes)})`);
  const which = num > told.length ? "; the largest: " : ": ";
  return `${plural(num, "adapter")} in ${where}${told.length ? which + told.join(", ") : ""}`;
}

function drawPool(engine) {
  const { slots } = engine.step_thread;
  const items = slots.map((slot) => segment(engine, slot.adapter_id, slot.num_bytes, slot.load));
  items.sort((one, other) => other.bytes - one.bytes);
  drawBar(byId("pool"), items, { num: 0, bytes: 0 }, engine.pool_bytes_total || 1);
  put("pool-size", `${bytes(engine.pool_bytes_used)} of ${bytes(engine.pool_bytes_total)}`);
  put("pool-text", tell(items, items.length, "the pool"));
}

function drawHostTier(engine) {
  const items = engine.host_images.map((image) => segment(engine, image.adapter_id, image.num_bytes));
  const [used, total] = [engine.host_tier_bytes_used, engine.host_tier_bytes_total];
  const unlisted = {
    num: engine.num_host_images - items.length,
    bytes: Math.max(0, used - sum(items.map((item) => item.bytes))),
  };
  // A tier that is nearly empty would show nothing: its bar is then of what is used, and says so.
  const isSparse = items.length > 0 && used < SPARSE * total;
  drawBar(byId("host"), items, unlisted, (isSparse ? used : total) || 1);
  put("host-size", `${bytes(used)} of ${bytes(total)}`);
  const scale = isSparse ? ". The bar's whole width is what is used" : "";
  put("host-text", tell(items, engine.num_host_images, "host memory") + scale);
}

function drawLoads(engine) {
  const loads = engine.step_thread.slots
    .filter((slot) => slot.load)
    .sort((one, other) => other.load.age_s - one.load.age_s)
    .map((slot) => ({ key: slot.adapter_id, ...slot }));
  const make = () => {
    const item = document.createElement("li");
    item.append(
      document.createElement("span"),
      document.createElement("progress"),
      document.createElement("span"),
    );
    return item;
  };
  keep(byId("way"), loads, make, (node, { adapter_id: id, num_bytes: num, load }) => {
    const [label, bar, note] = node.children;
    const name = nameOf(engine, id);
    write(label, name);
    label.title = name;
    bar.value = load.placed;
    bar.setAttribute("aria-label", `${name}: share that is placed`);
    write(
      note,
      `${PHASES[load.phase]}, ${bytes(num * load.placed)} of ${bytes(num)}, ${seconds(load.age_s)}`,
    );
  });
  byId("way-none").hidden = loads.length > 0;
}

function drawTable(engine) {
  if (!byId("where-table").open) return;
  const { slots } = engine.step_thread;
  const row = (tier, id, num, requests) => ({
    key: `${tier} ${id}`,
    cells: [nameOf(engine, id), tier, { number: bytes(num) }, { number: requests }],
  });
  keepRows(byId("where-rows"), [
    ...slots.map((slot) =>
      row(
        slot.load ? `pool, ${PHASES[slot.load.phase]}` : slot.pinned ? "pool, pinned" : "pool",
        slot.adapter_id,
        slot.num_bytes,
        whole(slot.num_requests),
      ),
    ),
    ...engine.host_images.map((image) => row("host", image.adapter_id, image.num_bytes, "")),
  ]);
}

function drawWhere(engine) {
  drawPool(engine);
  drawHostTier(engine);
  drawLoads(engine);
  drawTable(engine);
}

byId("where-table").addEventListener("toggle", () => latest.engine && drawTable(latest.engine));
