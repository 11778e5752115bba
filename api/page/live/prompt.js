// --- The prompt --------------------------------------------------------------------------------

const TARGETS_MS = 5000;

let isChat = false;
let running = null;
let targetsAt = -Infinity;

// There may be many thousands: they are asked for when somebody is about to choose.
async function listTargets() {
  if (performance.now() - targetsAt < TARGETS_MS) return;
  targetsAt = performance.now();
  const listed = await ask("/v1/models");
  if (!listed) return;
  const targets = listed.data.map((model) => ({ key: model.id }));
  keep(byId("targets"), targets, () => document.createElement("option"), (node, { key }) => {
    node.value = key;
  });
}

// What can not be listed can be typed.
const tryToListTargets = () => listTargets().catch(() => {});

// The base model can be asked at once, whenever the list comes.
function offerTargets(model) {
  byId("target").value ||= model;
  tryToListTargets();
}

function askAs(hasChat) {
  isChat = hasChat;
  put("prompt-hint", `Ctrl+Enter sends, as ${isChat ? "a chat" : "a text to complete"}`);
}

async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The answer broke off.");
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
    ...(isChat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
  };
  const began = performance.now();
  const since = () => (performance.now() - began) / 1e3;
  const response = await fetch(isChat ? "/v1/chat/completions" : "/v1/completions", {
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
      if (!text) continue;
      first ??= since();
      byId("answer").append(text);
    }
    if (event.usage && !event.choices.length) {
      const begin = first === null ? "" : `, the first after ${seconds(first)}`;
      const took = `${plural(event.usage.completion_tokens, "token")} in ${seconds(since())}`;
      put("answer-figures", took + begin);
    }
  }
}

// The buttons stay where the keyboard can find them: one that is disabled would lose its focus.
function showRunning() {
  byId("send").setAttribute("aria-disabled", String(running !== null));
  byId("stop").setAttribute("aria-disabled", String(running === null));
}

byId("try").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (running) return;
  running = new AbortController();
  showRunning();
  put("try-error", "");
  put("answer-figures", "");
  byId("answer").replaceChildren();
  try {
    await generate(running.signal);
  } catch (error) {
    if (error.name === "AbortError") put("answer-figures", "Stopped");
    else put("try-error", error.message);
  } finally {
    running = null;
    showRunning();
  }
});

byId("stop").addEventListener("click", () => running?.abort());

byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("try").requestSubmit();
});

byId("target").addEventListener("focus", tryToListTargets);
