// --- Figures and requests ----------------------------------------------------------------------

const MAX_REQUESTS = 50;
const FIGURE_S = 5;

function drawRequests(engine) {
  const { requests, num_running: running, num_waiting: waiting } = engine.step_thread;
  const total = Math.max(requests.length, running + waiting);
  const rows = requests.slice(0, MAX_REQUESTS).map((request) => ({
    key: request.request_id,
    cells: [
      request.request_id,
      request.adapter_id === null ? "base model" : nameOf(engine, request.adapter_id),
      request.state,
      { number: seconds(request.age_s) },
      { number: whole(request.num_prompt_tokens) },
      { number: whole(request.num_output_tokens) },
    ],
  }));
  keepRows(byId("requests"), rows);
  const more = total - rows.length;
  put("requests-more", total ? (more > 0 ? `and ${whole(more)} more` : "") : "None");
}

const counted = [];

// Over some seconds, so that the figure can be read; a new engine counts from nought.
function tokenRate(engine) {
  const now = {
    at: performance.now() / 1e3,
    epoch: engine.engine_epoch,
    tokens: engine.step_thread.generation_tokens_total,
  };
  if (counted.length && counted[0].epoch !== now.epoch) counted.length = 0;
  counted.push(now);
  while (counted.length > 2 && now.at - counted[0].at > FIGURE_S + 0.5) counted.shift();
  const took = now.at - counted[0].at;
  return took < 0.5 ? "–" : whole((now.tokens - counted[0].tokens) / took);
}

function drawFigures(view) {
  const { steps, num_running: running, num_waiting: waiting } = view.engine.step_thread;
  const numCells = Math.round(FIGURE_S / steps.cell_s);
  const busy = sum(KINDS.map((kind) => sum(steps[`${kind}_s`].slice(-numCells))));
  put("running", whole(running));
  put("waiting", whole(waiting));
  put("rate", tokenRate(view.engine));
  put("busy", percent(busy / (numCells * steps.cell_s)));
}
