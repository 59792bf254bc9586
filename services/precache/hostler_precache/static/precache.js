// Keeps the page of a distribution current from its server-sent events, and draws the heat map from the very rows
// that stand under it. Without this script the table is there and the page says how to refresh it.
"use strict";
(() => {
  const table = document.querySelector("table.hosts");
  if (!table) return;
  const BUCKETS = 64;
  const canvas = document.querySelector("canvas.map");
  const hosts = new Map();
  let size = Number(table.dataset.size);

  const bytes = (count) => {
    let value = count;
    for (const unit of ["B", "KiB", "MiB", "GiB"]) {
      if (value < 1024) return unit === "B" ? `${value} B` : `${value.toFixed(1)} ${unit}`;
      value /= 1024;
    }
    return `${value.toFixed(1)} TiB`;
  };
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const channels = (text) => [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16));
  const long = (text) => (text.length === 4 ? `#${[...text.slice(1)].map((digit) => digit + digit).join("")}` : text);

  const draw = () => {
    const rows = [...hosts.values()].sort((a, b) => (a.host < b.host ? -1 : 1));
    const height = Math.max(2, Math.min(16, Math.floor(480 / Math.max(1, rows.length))));
    canvas.width = BUCKETS * 8;
    canvas.height = Math.max(1, rows.length * height);
    const context = canvas.getContext("2d");
    const empty = channels(long(colour("--band")));
    const full = channels(long(colour("--good")));
    const bad = channels(long(colour("--bad")));
    rows.forEach((host, row) => {
      const has = host.state === "cached" || host.state === "existing";
      for (let at = 0; at < BUCKETS; at += 1) {
        const share = has ? 1 : parseInt(host.coverage[at] ?? "0", 16) / 15;
        const to = host.state === "error" ? bad : full;
        const from = host.state === "error" && !host.coverage ? bad : empty;
        const mixed = from.map((value, n) => Math.round(value + (to[n] - value) * share));
        context.fillStyle = `rgb(${mixed.join(",")})`;
        context.fillRect(at * 8, row * height, 8, height - (height > 3 ? 1 : 0));
      }
    });
  };

  const show = (host) => {
    let row = table.tBodies[0].querySelector(`tr[data-host="${CSS.escape(host.host)}"]`);
    if (!row) {
      if (table.tBodies[0].rows.length >= Number(table.dataset.rows)) return;
      row = table.tBodies[0].insertRow();
      row.dataset.host = host.host;
      for (let n = 0; n < table.tHead.rows[0].cells.length; n += 1) row.insertCell();
      row.cells[0].textContent = host.host;
      row.cells[2].append(document.createElement("progress"));
    }
    row.dataset.coverage = host.coverage;
    row.dataset.state = host.state;
    row.cells[1].className = `state-${host.state}`;
    row.cells[1].textContent = host.reason ? `${host.state}: ${host.reason}` : host.state;
    const bar = row.cells[2].querySelector("progress");
    if (bar && size) [bar.max, bar.value] = [size, host.bytes_done];
    const numbers = [host.bytes_done, host.received_from_seed_bytes, host.received_from_rack_bytes,
      host.received_from_peers_bytes - host.received_from_rack_bytes, host.sent_bytes, host.wasted_bytes];
    numbers.forEach((count, n) => { row.cells[3 + n].textContent = bytes(count); });
    row.cells[9].textContent = `${host.updated_at.slice(0, 19).replace("T", " ")} UTC`;
  };

  const say = (name, text) => {
    const place = document.querySelector(`[data-says="${name}"]`);
    if (place) place.textContent = text;
  };

  const pace = (told) => {
    const found = told.estimate;
    if (told.paused_reason) return `paused: ${told.paused_reason}`;
    if (!told.is_open) return "waits for its window";
    if (!found || found.over_bound === null) return "-";
    const host = found.slowest_host ? ` (${found.slowest_host})` : "";
    return `${found.over_bound.toFixed(2)}x; the limit is ${found.limit}${host}`;
  };

  for (const row of table.tBodies[0].querySelectorAll("tr[data-host]"))
    hosts.set(row.dataset.host, { host: row.dataset.host, state: row.dataset.state, coverage: row.dataset.coverage });
  draw();
  if (!table.dataset.live) return;

  const events = new EventSource(`/v1/distributions/${table.dataset.distribution}/events`);
  events.addEventListener("progress", (event) => {
    const told = JSON.parse(event.data);
    size = told.size_bytes ?? size;
    for (const host of told.progress) {
      hosts.set(host.host, host);
      show(host);
    }
    say("state", told.state);
    say("pace", pace(told));
    say("left", told.estimate?.remaining_seconds ? `${Math.round(told.estimate.remaining_seconds)} s` : "-");
    say("seed", bytes(told.seed_sent_bytes));
    say("peers", bytes(told.peers_sent_bytes));
    draw();
  });
  events.addEventListener("end", () => events.close());
})();
