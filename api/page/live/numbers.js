// --- Numbers for people ------------------------------------------------------------------------

const UNITS = ["B", "KB", "MB", "GB", "TB"];

function bytes(count) {
  let at = 0;
  while (count >= 1000 && at < UNITS.length - 1) {
    count /= 1000;
    at += 1;
  }
  return `${count.toFixed(at && count < 100 ? 1 : 0)} ${UNITS[at]}`;
}

function seconds(value) {
  if (value === null) return "–";
  if (value < 0.00995) return `${(value * 1e3).toFixed(1)} ms`;
  if (value < 0.9995) return `${(value * 1e3).toFixed(0)} ms`;
  if (value < 99.95) return `${value.toFixed(1)} s`;
  if (value < 7200) return `${Math.round(value / 60)} min`;
  return value < 172800 ? `${Math.round(value / 3600)} h` : `${Math.round(value / 86400)} days`;
}

const whole = (count) => Math.round(count).toLocaleString("en");
const percent = (share) => `${Math.round(100 * share)} %`;
const sum = (numbers) => numbers.reduce((total, each) => total + each, 0);
const plural = (count, what) => `${whole(count)} ${what}${count === 1 ? "" : "s"}`;
