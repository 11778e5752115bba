// --- Asking the server -------------------------------------------------------------------------

const TIMEOUT_MS = 8000;
const KEY_ITEM = "sidestream-key";

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

// What the server answers; null once it has been seen that it wants another key.
async function ask(path) {
  const response = await fetch(path, { headers: headers(), signal: AbortSignal.timeout(TIMEOUT_MS) });
  if (response.status === 401) {
    askForKey();
    return null;
  }
  if (!response.ok) throw new Error(await errorOf(response));
  return response.json();
}

function askForKey() {
  put("key-error", sessionStorage.getItem(KEY_ITEM) ? "The server did not accept this key." : "");
  sessionStorage.removeItem(KEY_ITEM);
  showState("waiting", "A key is needed");
  byId("key-form").hidden = false;
  // Whoever is elsewhere on the page is left there.
  if ([document.body, byId("content")].includes(document.activeElement)) byId("key").focus();
}

const needsKey = () => !byId("key-form").hidden;

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY_ITEM, byId("key").value);
  byId("key").value = "";
  byId("key-form").hidden = true;
  byId("content").focus({ preventScroll: true });
  showState("waiting", "Connecting");
  look();
});

function showState(state, text) {
  byId("state").dataset.state = state;
  put("state", text);
}
