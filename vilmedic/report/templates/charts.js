// Charts: the classes of an evaluation, ROC curves, and the curves of the training.

const DASHES = ["solid", "dash", "dot", "dashdot"];
const ROW = 26; // pixels of a bar

async function startCharts() {
  const splits = JSON.parse(await unpack("data-charts"));
  splits.forEach((charts, number) => {
    const place = document.querySelector(`[data-charts="${number}"]`);
    charts.forEach((chart) => {
      const { card, plot } = chartCard(chart.title, chart.file);
      place.append(card);
      const draw = chart.kind === "roc" ? drawRoc : drawBars;
      drawWhenShown(plot, () => draw(plot, chart));
    });
  });
}

// The ends of the axis of bars: from 0 or below it to 1 where nothing is above.
function barRange(chart) {
  const ends = chart.bounds.flatMap((one) => one ?? []).concat(chart.values);
  const high = Math.max(...ends);
  return [Math.min(0, ...ends), high <= 1 ? 1 : high * 1.08];
}

function drawBars(place, chart) {
  const { names, values, bounds } = chart;
  const layout = baseLayout();
  const ticks = names.map((name) => rowsOf(name, Math.max(12, Math.floor(place.clientWidth * 0.055)), 2));
  place.style.height = `${70 + names.length * (ticks.some((rows) => rows.length > 1) ? ROW + 8 : ROW)}px`;
  const labels = values.map((value, k) => `${rowsOf(names[k], 40, 9).join("<br>")}: ${value.toFixed(3)}${bounds[k] ? ` (${bounds[k].map((one) => one.toFixed(3)).join(" to ")})` : ""}`);
  const trace = {
    type: "bar", orientation: "h", x: values, y: names, marker: { color: chart.colours }, width: 0.62,
    customdata: labels, hovertemplate: "%{customdata}<extra></extra>",
    error_x: {
      type: "data", visible: bounds.some(Boolean), symmetric: false, color: css("--ink"), thickness: 1.3, width: 4,
      array: values.map((value, k) => (bounds[k] ? bounds[k][1] - value : 0)),
      arrayminus: values.map((value, k) => (bounds[k] ? value - bounds[k][0] : 0)),
    },
  };
  Object.assign(layout, { margin: { l: 10, r: 16, t: 6, b: 40 }, dragmode: false, showlegend: false });
  Object.assign(layout.xaxis, { range: barRange(chart), title: { text: chart.axis, font: { size: 11 } }, fixedrange: true });
  Object.assign(layout.yaxis, {
    type: "category", tickmode: "array", tickvals: names, ticktext: ticks.map((rows) => `${rows.join(" <br>")} `),
    autorange: "reversed", automargin: true, fixedrange: true, ticks: "",
  });
  layout.shapes = chart.reference === null ? [] : [guessing({ x0: chart.reference, x1: chart.reference, yref: "paper", y0: 0, y1: 1 })];
  Plotly.react(place, [trace], layout, { ...PLOT_OPTIONS, displayModeBar: false });
}

function guessing(ends) {
  return { type: "line", ...ends, line: { color: css("--muted"), width: 1, dash: "dot" } };
}

function drawRoc(place, chart) {
  const layout = baseLayout();
  place.style.height = `${350 + 19 * chart.names.length}px`;
  const most = Math.floor((place.clientWidth - 110) / 6.2);
  const traces = chart.names.map((name, k) => ({
    type: "scatter", mode: "lines", name: `${rowsOf(name, most, 1)} (${chart.values[k].toFixed(2)})`,
    x: chart.curves[k][0], y: chart.curves[k][1],
    line: { width: 1.7, color: chart.colours[k], dash: DASHES[chart.turns[k] % DASHES.length] },
    hovertemplate: "%{x:.2f}, %{y:.2f}",
  }));
  const axis = { range: [-0.01, 1.01], tickvals: [0, 0.25, 0.5, 0.75, 1], fixedrange: true };
  Object.assign(layout, {
    margin: { l: 50, r: 14, t: 8, b: 40 }, dragmode: false, showlegend: true,
    legend: { orientation: "v", x: 0, y: -60 / 300, yanchor: "top", font: { size: 11 }, bgcolor: "rgba(0,0,0,0)" },
    shapes: [guessing({ x0: 0, y0: 0, x1: 1, y1: 1 })],
  });
  Object.assign(layout.xaxis, { ...axis, title: { text: "false positive rate", font: { size: 11 } } });
  Object.assign(layout.yaxis, { ...axis, title: { text: chart.axis, font: { size: 11 } } });
  Plotly.react(place, traces, layout, { ...PLOT_OPTIONS, displayModeBar: false });
}

async function startCurves() {
  const panels = JSON.parse(await unpack("data-curves"));
  panels.forEach((panel, number) => {
    const { card, plot } = chartCard(panel.title, `curve-${number + 1}`);
    byId(panel.folded ? "more-charts" : "charts").append(card);
    drawWhenShown(plot, () => drawPanel(plot, panel));
  });
}

function drawPanel(place, panel) {
  const seeds = [...new Set(panel.lines.map((line) => line.seed))];
  const traces = panel.lines.map((line) => ({
    type: "scatter",
    mode: line.values.length < 20 ? "lines+markers" : "lines",
    name: `${rowsOf(line.short, 40, 1)}${seeds.length > 1 ? `, seed ${line.seed}` : ""}`,
    x: line.steps,
    y: line.values,
    marker: { size: 5 },
    line: {
      width: 1.6,
      color: line.colour,
      dash: DASHES[seeds.indexOf(line.seed) % DASHES.length],
    },
  }));
  const layout = baseLayout();
  const several = traces.length > 1;
  const widest = 48 + 6.2 * Math.max(...traces.map((trace) => trace.name.length));
  const rows = Math.ceil(traces.length / Math.max(1, Math.floor((place.clientWidth - 58) / widest)));
  place.style.height = `${250 + (several ? 19 * (rows - 1) : 0)}px`;
  const values = panel.lines.flatMap((line) => line.values);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const logarithmic = panel.logarithmic && low > 0 && Math.log10(high / low) > 1.5;
  const constant = high - low <= 1e-6 * Math.abs(high); // else the axis would show its rounding
  const around = Math.abs(high) / 10 || 1;
  Object.assign(layout, {
    margin: { l: 48, r: 10, t: 8, b: 34 },
    hovermode: "x unified",
    dragmode: coarsePointer() ? false : "zoom",
    showlegend: several,
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 11 }, bgcolor: "rgba(0,0,0,0)" },
  });
  // Steps are whole numbers, and so are their marks.
  const steps = panel.lines.flatMap((line) => line.steps);
  const few = Math.max(...steps) - Math.min(...steps) < 6;
  Object.assign(layout.xaxis, { nticks: 6, tickformat: ",d", ...(few ? { dtick: 1 } : {}), title: { text: "step", font: { size: 11 }, standoff: 4 } });
  Object.assign(layout.yaxis, logarithmic
    ? { type: "log", dtick: 1, exponentformat: "power" }
    : { type: "linear", nticks: 6, exponentformat: "power", ...(constant ? { range: [low - around, high + around] } : {}) });
  layout.shapes = Object.values(panel.best).map((step) => ({
    type: "line", x0: step, x1: step, yref: "paper", y0: 0, y1: 1, line: { color: css("--best"), width: 1.2 },
  }));
  if (panel.reference !== null) {
    layout.shapes.push(guessing({ xref: "paper", x0: 0, x1: 1, y0: panel.reference, y1: panel.reference }));
  }
  Plotly.react(place, traces, layout, { ...PLOT_OPTIONS, displayModeBar: false });
}
