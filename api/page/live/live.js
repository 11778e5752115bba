// --- Once a second -----------------------------------------------------------------------------

const PERIOD_MS = 1000;

// The last that was seen: the view, the last engine that was in one, and when that was.
const latest = { view: null, engine: null, at: null };
let isLooking = false;
let timer = null;

function draw(view) {
  put("model", view.model);
  put("release", `· ${view.version} · up ${seconds(view.uptime_s)}`);
  document.title = `${view.model} · Sidestream`;
  askAs(view.has_chat);
  put("ttft", seconds(view.first_token.minute_p50_s));
  put("itl", seconds(view.next_token.minute_p99_s));
  drawLatency("first", view.first_token, "answer");
  drawLatency("next", view.next_token, "token");
  if (!view.engine) {
    showAway(`Engine away: ${view.reason}`);
    return;
  }
  delete byId("content").dataset.stale;
  if (view.engine.loader_connected) showState("ready", "Ready");
  else showState("away", "Loader away: adapters in the pool are served");
  drawWhere(view.engine);
  drawTimeline(view.engine);
  drawRequests(view.engine);
  drawFigures(view);
}

// What is drawn stays, in grey, with the time of day that it is from.
function showAway(text) {
  const as = latest.at ? `. Shown as of ${latest.at.toLocaleTimeString()}` : "";
  showState("away", text + as);
  if (latest.at) byId("content").dataset.stale = "";
}

async function look() {
  if (isLooking) return;
  isLooking = true;
  clearTimeout(timer);
  try {
    const view = await ask("/v1/live");
    if (view) {
      if (!latest.view) offerTargets(view.model);
      latest.view = view;
      if (view.engine) [latest.engine, latest.at] = [view.engine, new Date()];
      draw(view);
    }
  } catch (error) {
    showAway(latest.at ? "Connection lost, trying again" : `No connection: ${error.message}`);
  }
  isLooking = false;
  // Without a key there is nothing to ask for, and out of sight nobody looks.
  if (!needsKey() && !document.hidden) timer = setTimeout(look, PERIOD_MS);
}

document.addEventListener("visibilitychange", () => document.hidden || needsKey() || look());
addEventListener("resize", () => latest.view && draw(latest.view));
look();
