// Keeps the page of a distribution current from its server-sent events, and draws the heat map from the very rows
// that stand under it. Without this script the table is there and the page says how to refresh it.
"use strict";
(() => {
  const table = document.querySelector("table.hosts");
  if (!table) return;
  const BUCKETS = 64;
  const MOST_BANDS = 480; // of more hosts, several share a band
  const canvas = document.querySelector("canvas.map");
  const hosts = new Map();
  const rows = new Map();
  let bands = [];
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
  const say = (name, text) => {
    const place = document.querySelector(`[data-says="${name}"]`);
    if (place) place.textContent = text;
  };

  const has = (host) => host.state === "cached" || host.state === "existing";
  const share = (host, at) => (has(host) ? 1 : parseInt(host.coverage[at] ?? "0", 16) / 15);

  const draw = () => {
    const sorted = [...hosts.values()].sort((a, b) => (a.host < b.host ? -1 : 1));
    const together = Math.max(1, Math.ceil(sorted.length / MOST_BANDS));
    bands = [];
    for (let at = 0; at < sorted.length; at += together) bands.push(sorted.slice(at, at + together));
    const height = Math.max(1, Math.min(16, Math.floor(MOST_BANDS / Math.max(1, bands.length))));
    canvas.width = BUCKETS * 8;
    canvas.height = Math.max(1, bands.length * height);
    const context = canvas.getContext("2d");
    const empty = channels(long(colour("--band")));
    const full = channels(long(colour("--good")));
    const bad = channels(long(colour("--bad")));
    bands.forEach((band, row) => {
      // one that failed among many is to be seen: it gives the band its colour
      const failed = band.filter((host) => host.state === "error");
      const isBare = failed.length > 0 && failed.every((host) => !host.coverage);
      const to = failed.length ? bad : full;
      const from = isBare ? bad : empty;
      for (let at = 0; at < BUCKETS; at += 1) {
        const mean = band.reduce((sum, host) => sum + share(host, at), 0) / band.length;
        const mixed = from.map((value, n) => Math.round(value + (to[n] - value) * mean));
        context.fillStyle = `rgb(${mixed.join(",")})`;
        context.fillRect(at * 8, row * height, 8, height - (height > 3 ? 1 : 0));
      }
    });
    const many = together > 1;
    say("row", many ? `a row ${together} hosts, red where one of them failed` : "a row a host, red where it failed");
  };

  canvas.addEventListener("mousemove", (event) => {
    const band = bands[Math.floor((event.offsetY / canvas.clientHeight) * bands.length)];
    if (!band) return;
    const found = band.find((host) => host.state === "error") ?? band[0];
    const others = band.length > 1 ? ` (${band[0].host} to ${band[band.length - 1].host})` : "";
    canvas.title = `${found.host}: ${found.state}${others}`;
  });

  const added = (host) => {
    if (rows.size >= Number(table.dataset.rows)) return undefined;
    const row = table.tBodies[0].insertRow();
    row.dataset.host = host.host;
    for (const head of table.tHead.rows[0].cells) row.insertCell().className = head.className;
    row.cells[0].textContent = host.host;
    rows.set(host.host, row);
    return row;
  };

  const show = (host) => {
    const row = rows.get(host.host) ?? added(host);
    if (!row) return;
    row.dataset.coverage = host.coverage;
    row.dataset.state = host.state;
    row.cells[1].className = `state-${host.state}`;
    row.cells[1].textContent = host.reason ? `${host.state}: ${host.reason}` : host.state;
    if (!host.is_there) row.cells[1].textContent += ", not heard of";
    if (size) { // not known while the image is being fetched
      let bar = row.cells[2].querySelector("progress");
      if (!bar) row.cells[2].replaceChildren((bar = document.createElement("progress")));
      [bar.max, bar.value] = [size, host.bytes_done];
    }
    const numbers = [host.bytes_done, host.received_from_seed_bytes, host.received_from_rack_bytes,
      host.received_from_peers_bytes - host.received_from_rack_bytes, host.sent_bytes, host.wasted_bytes];
    numbers.forEach((count, n) => { row.cells[3 + n].textContent = bytes(count); });
    row.cells[9].textContent = `${host.updated_at.slice(0, 19).replace("T", " ")} UTC`;
  };

  for (const row of table.tBodies[0].querySelectorAll("tr[data-host]")) {
    const told = { host: row.dataset.host, state: row.dataset.state, coverage: row.dataset.coverage };
    hosts.set(told.host, told);
    rows.set(told.host, row);
  }
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
    say("reason", told.reason ? `${told.reason}.` : "");
    say("pace", told.pace || "-");
    say("left", told.left || "-");
    say("fetched", bytes(told.fetched_bytes));
    say("seed", bytes(told.seed_sent_bytes));
    say("peers", bytes(told.peers_sent_bytes));
    draw();
  });
  events.addEventListener("end", () => events.close());
  events.addEventListener("error", () => {
    if (events.readyState === EventSource.CLOSED) say("live", "not followed any more: reload the page");
  });
})();
