// Draws each table.drawn with uPlot, from the very cells a reader sees; the table stays, folded away. Without this
// script the tables are open, and nothing is missing.
"use strict";
(() => {
  const DAY = 86400;
  const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
  const exact = new Intl.NumberFormat("en", { maximumFractionDigits: 3 });
  const small = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
  const powers = (low, high) => {
    const found = [];
    const digits = high / low > 1000 ? [1] : [1, 2, 5];
    for (let n = Math.floor(Math.log10(low)); 10 ** n <= high; n += 1) found.push(...digits.map((digit) => digit * 10 ** n));
    return found.filter((value) => value >= low && value <= high);
  };
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const isoDay = (second) => new Date(second * 1000).toISOString().slice(0, 10);

  const read = (table) => {
    const heads = [...table.tHead.rows[0].cells].slice(1);
    const rows = [...table.tBodies[0].rows];
    return {
      names: heads.map((cell) => cell.textContent.trim()),
      colours: heads.map((cell, n) => cell.dataset.colour || String((n % 8) + 1)),
      labels: rows.map((row) => row.cells[0].textContent.trim()),
      columns: heads.map((_, n) =>
        rows.map((row) => {
          const value = row.cells[n + 1].dataset.value;
          return value === undefined ? null : Number(value);
        }),
      ),
    };
  };

  const frame = (data, unit) => {
    const axis = {
      stroke: colour("--dim"),
      font: "12px system-ui, sans-serif",
      grid: { stroke: colour("--line"), width: 1 },
      ticks: { stroke: colour("--line"), width: 1 },
    };
    return {
      axis,
      series: (n, own) => ({
        label: data.names[n],
        stroke: colour(`--series-${data.colours[n]}`),
        value: (plot, _value, _series, at) =>
          at === null || at === undefined || data.columns[n][at] === null
            ? "–"
            : `${exact.format(data.columns[n][at])} ${unit}`,
        ...own,
      }),
      common: { height: 300, tzDate: (second) => uPlot.tzDate(new Date(second * 1000), "Etc/UTC") },
    };
  };

  const stack = (data, unit) => {
    const { axis, series, common } = frame(data, unit);
    const times = data.labels.map((day) => Date.parse(`${day}T00:00:00Z`) / 1000);
    const tops = [];
    data.columns.forEach((column, n) => {
      tops.push(column.map((value, at) => (value || 0) + (n ? tops[n - 1][at] : 0)));
    });
    // the highest first: each lower one is painted over it
    const order = data.columns.map((_, n) => n).reverse();
    const bars = uPlot.paths.bars({ size: [0.86, 90] });
    return {
      options: {
        ...common,
        cursor: { points: { show: false }, drag: { setScale: false } },
        scales: {
          x: { time: true, range: (_plot, from, to) => [from - DAY / 2, to + DAY / 2] },
          y: { range: (_plot, _low, high) => [0, (high || 1) * 1.05] },
        },
        axes: [
          {
            ...axis,
            grid: { show: false },
            incrs: [1, 2, 7, 14, 28].map((days) => days * DAY),
            values: (_plot, splits) => splits.map((at) => isoDay(at).slice(5)),
          },
          { ...axis, size: 62, values: (_plot, splits) => splits.map((value) => compact.format(value)) },
        ],
        series: [
          { label: "day (UTC)", value: (_plot, at) => (at === null || at === undefined ? "–" : isoDay(at)) },
          ...order.map((n) => series(n, { fill: colour(`--series-${data.colours[n]}`), width: 0, paths: bars, points: { show: false } })),
        ],
      },
      values: [times, ...order.map((n) => tops[n])],
    };
  };

  const points = (data, unit) => {
    const { axis, series, common } = frame(data, unit);
    const places = data.labels.map((_, n) => n);
    return {
      options: {
        ...common,
        height: 340,
        cursor: { drag: { setScale: false } },
        scales: {
          x: { time: false, range: (_plot, from, to) => [from - 0.5, to + 0.5] },
          y: { distr: 3, range: (_plot, low, high) => [(low || 0.1) / 2, (high || 10) * 2] },
        },
        axes: [
          {
            ...axis,
            size: 110,
            rotate: -45,
            splits: () => places,
            values: (_plot, splits) => splits.map((n) => (data.labels[n].length > 24 ? `${data.labels[n].slice(0, 23)}…` : data.labels[n])),
          },
          {
            ...axis,
            size: 70,
            splits: (_plot, _axis, low, high) => powers(low, high),
            filter: (_plot, splits) => splits, // each has its label, not the powers of ten alone
            values: (_plot, splits) => splits.map((value) => `${small.format(value)} s`),
          },
        ],
        series: [
          { label: "operation", value: (_plot, n) => data.labels[n] ?? "–" },
          ...data.columns.map((_, n) =>
            // the first as a ring around the others: where all are the same, each is seen
            series(n, {
              paths: () => null,
              points: {
                show: true,
                size: n ? 8 : 15,
                width: n ? 1 : 2.5,
                fill: n ? colour(`--series-${data.colours[n]}`) : "transparent",
              },
            }),
          ),
        ],
      },
      values: [places, ...data.columns],
    };
  };

  const shapes = { stack, points };

  const drawn = [...document.querySelectorAll("table.drawn")].map((table) => {
    const figure = table.closest("figure");
    const place = document.createElement("div");
    place.className = "plot";
    figure.querySelector("figcaption").after(place);
    figure.querySelector("details").open = false;
    const data = read(table);
    let plot = null;
    const draw = () => {
      plot?.destroy();
      const { options, values } = shapes[table.dataset.drawn](data, table.dataset.unit);
      plot = new uPlot({ ...options, width: place.clientWidth }, values, place);
      place.style.height = "auto";
    };
    draw();
    new ResizeObserver(() => {
      if (place.clientWidth && Math.abs(place.clientWidth - plot.width) > 1) {
        plot.setSize({ width: place.clientWidth, height: plot.height });
      }
    }).observe(place);
    return draw;
  });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach((draw) => draw()));

  // what is gone for ever is asked for twice
  document.querySelectorAll("form[data-confirm]").forEach((form) =>
    form.addEventListener("submit", (event) => {
      if (!window.confirm(form.dataset.confirm)) event.preventDefault();
    }),
  );
})();
