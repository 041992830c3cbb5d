// The curves: a small chart a panel.

const DASHES = ["solid", "dash", "dot", "dashdot"];

async function startCharts() {
  const panels = JSON.parse(await unpack("data-curves"));
  const places = panels.map((panel) => {
    const card = make("div", "card");
    const plot = make("div", "plot");
    card.append(make("h4", "", panel.title), plot);
    byId("charts").append(card);
    return plot;
  });
  const draw = () => panels.forEach((panel, i) => drawPanel(places[i], panel));
  redraws.push(draw);
  draw();
}

function drawPanel(place, panel) {
  const names = [...new Set(panel.lines.map((line) => line.name))];
  const seeds = [...new Set(panel.lines.map((line) => line.seed))];
  const traces = panel.lines.map((line) => ({
    type: "scatter",
    mode: line.values.length < 20 ? "lines+markers" : "lines",
    name: seeds.length > 1 ? `${line.short}, seed ${line.seed}` : line.short,
    x: line.steps,
    y: line.values,
    marker: { size: 5 },
    line: {
      width: 1.6,
      color: PALETTE[names.indexOf(line.name) % PALETTE.length],
      dash: DASHES[seeds.indexOf(line.seed) % DASHES.length],
    },
  }));
  const layout = baseLayout();
  const several = traces.length > 1;
  const values = panel.lines.flatMap((line) => line.values);
  const decades = Math.log10(Math.max(...values) / Math.min(...values));
  const logarithmic = panel.logarithmic && Math.min(...values) > 0 && decades > 1.5;
  Object.assign(layout, {
    margin: { l: 48, r: 10, t: 8, b: 34 },
    hovermode: "x unified",
    dragmode: coarsePointer() ? false : "zoom",
    showlegend: several,
    legend: { orientation: "h", y: -0.18, font: { size: 11 }, bgcolor: "rgba(0,0,0,0)" },
  });
  Object.assign(layout.xaxis, { nticks: 6, title: several ? undefined : { text: "step", font: { size: 11 } } });
  Object.assign(layout.yaxis, logarithmic
    ? { type: "log", dtick: 1, exponentformat: "power" }
    : { type: "linear", nticks: 6, exponentformat: "power" });
  if (panel.reference !== null) {
    layout.shapes = [{
      type: "line", xref: "paper", x0: 0, x1: 1, y0: panel.reference, y1: panel.reference,
      line: { color: css("--muted"), width: 1, dash: "dot" },
    }];
  }
  Plotly.react(place, traces, layout, { ...PLOT_OPTIONS, displayModeBar: false });
}
