// The embedding explorer: samples on a map, with search, colours and neighbours.

const SHOWN_AT_SIDE = 60;
const explorer = { data: null, texts: [], matching: [], chosen: null, query: readQuery("") };
const loadedSplits = new Map();

async function startExplorer() {
  byId("split").addEventListener("change", openSplit);
  byId("map").addEventListener("change", drawMap);
  byId("colour").addEventListener("change", drawMap);
  byId("relation").addEventListener("change", () => choose(explorer.chosen));
  let timer = 0;
  byId("search").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(search, 150);
  });
  redraws.push(drawMap);
  await openSplit();
}

async function openSplit() {
  const number = byId("split").value;
  if (!loadedSplits.has(number)) {
    loadedSplits.set(number, JSON.parse(await unpack(`data-explorer-${number}`)));
  }
  const data = loadedSplits.get(number);
  explorer.data = data;
  explorer.chosen = null;
  explorer.texts = data.samples.report.map((report, i) =>
    [report, ...labelNames(data, i), data.samples.image[i]].join(" \n ").toLowerCase());
  fill("map", data.maps.map((map, i) => [i, `${map.key} (${map.method})`]));
  fill("relation", data.neighbours.map((one, i) => [i, one.name]));
  const colours = data.samples.labels ? [["labels", "label"]] : [];
  data.labels.forEach((name, k) => colours.push([k, `has ${name}`]));
  fill("colour", [...colours, ["none", "one colour"]]);
  search();
}

// New entries of a select; what was chosen stays chosen where it still exists.
function fill(id, entries) {
  const select = byId(id);
  const before = select.selectedOptions[0]?.textContent;
  select.replaceChildren(...entries.map(([value, text]) => {
    const option = make("option", "", text);
    option.value = value;
    return option;
  }));
  const same = entries.findIndex(([, text]) => text === before);
  select.selectedIndex = Math.max(0, same);
}

function search() {
  const { data, texts } = explorer;
  explorer.query = readQuery(byId("search").value);
  explorer.matching = texts.map((text) => matches(explorer.query, text));
  const found = explorer.matching.filter(Boolean).length;
  const all = data.samples.line.length;
  const drawn = all < data.total ? ` (drawn at random from ${data.total.toLocaleString("en")})` : "";
  byId("count").textContent = `${found.toLocaleString("en")} of ${all.toLocaleString("en")} samples${drawn}`;
  drawMap();
  choose(explorer.chosen);
}

// The name of the colour of each sample.
function categories() {
  const { data } = explorer;
  const by = byId("colour").value;
  if (by === "none" || !data.samples.labels) return { of: () => "sample", order: ["sample"] };
  if (by !== "labels") {
    const name = data.labels[by];
    return {
      of: (i) => (data.samples.labels[i].includes(Number(by)) ? name : `no ${name}`),
      order: [name, `no ${name}`],
    };
  }
  const of = (i) => {
    const names = labelNames(data, i);
    return names.length === 1 ? names[0] : names.length ? "several labels" : "no label";
  };
  return { of, order: [...data.labels, "several labels", "no label"] };
}

function points(indices, map) {
  return { x: indices.map((i) => map.x[i]), y: indices.map((i) => map.y[i]), customdata: indices };
}

function drawMap() {
  const { data, matching } = explorer;
  const map = data.maps[byId("map").value];
  const everyone = data.samples.line.map((_, i) => i);
  const size = everyone.length > 2000 ? 5 : everyone.length > 400 ? 7 : 9;
  const rest = everyone.filter((i) => !matching[i]);
  const traces = [{
    ...points(rest, map), type: "scatter", mode: "markers", hoverinfo: "skip", showlegend: false,
    name: "not found", marker: { size: size * 0.7, color: css("--faint"), opacity: 0.45 },
  }];
  const { of, order } = categories();
  const groups = new Map(order.map((name) => [name, []]));
  everyone.forEach((i) => { if (matching[i]) groups.get(of(i)).push(i); });
  order.forEach((name, k) => {
    const members = groups.get(name);
    const plain = name === "no label" || name === "several labels" || (order.length === 2 && k === 1);
    const place = Math.max(0, data.labels.indexOf(name)); // a label has one colour everywhere
    const colour = plain ? css(name === "several labels" ? "--ink" : "--muted") : PALETTE[place % PALETTE.length];
    const symbol = plain ? "circle" : SYMBOLS[Math.floor(place / PALETTE.length) % SYMBOLS.length];
    if (!members.length) return;
    traces.push({
      ...points(members, map), type: "scatter", mode: "markers", hoverinfo: "none",
      name: `${name} (${members.length.toLocaleString("en")})`,
      marker: { size, symbol, color: colour, opacity: plain ? 0.55 : 0.85, line: { width: 0.5, color: css("--card") } },
    });
  });
  const layout = baseLayout();
  const bare = { visible: true, showticklabels: false, ticks: "", zeroline: false, showgrid: false, range: [-0.04, 1.04] };
  Object.assign(layout.xaxis, bare);
  Object.assign(layout.yaxis, bare);
  Object.assign(layout, {
    margin: { l: 6, r: 6, t: 6, b: 6 },
    hovermode: "closest",
    hoverdistance: 12,
    dragmode: coarsePointer() ? false : "zoom",
    showlegend: order.length > 1,
    legend: { orientation: "h", y: -0.01, font: { size: 11 }, itemsizing: "constant" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--muted"), activecolor: css("--accent") },
    shapes: chosenShapes(map),
    uirevision: `${data.split} ${map.key}`,
  });
  const place = byId("scatter");
  const first = !place.on;
  Plotly.react(place, traces, layout, {
    ...PLOT_OPTIONS,
    modeBarButtons: [["zoom2d", "pan2d", "select2d", "lasso2d"], ["zoomIn2d", "zoomOut2d", "resetScale2d"]],
  });
  if (first) listen(place);
}

// A ring around the chosen sample, and lines to its neighbours. Shapes rather than traces: they are
// drawn again without the thousands of points under them.
function chosenShapes(map) {
  const { chosen, data } = explorer;
  if (chosen === null) return [];
  const near = data.neighbours[byId("relation").value]?.index[chosen] ?? [];
  const ring = (i, radius, width) => ({
    type: "circle", xsizemode: "pixel", ysizemode: "pixel", xanchor: map.x[i], yanchor: map.y[i],
    x0: -radius, x1: radius, y0: -radius, y1: radius, line: { width, color: css("--accent") },
  });
  const line = (i) => ({
    type: "line", x0: map.x[chosen], y0: map.y[chosen], x1: map.x[i], y1: map.y[i],
    line: { width: 1, color: css("--accent") },
  });
  return [...near.map(line), ...near.map((i) => ring(i, 7, 1.5)), ring(chosen, 11, 3)];
}

function drawChosen() {
  Plotly.relayout(byId("scatter"), { shapes: chosenShapes(explorer.data.maps[byId("map").value]) });
}

function listen(place) {
  place.on("plotly_hover", ({ points: [point], event }) => {
    if (point.customdata !== undefined && !coarsePointer()) {
      showTip(explorer.data, point.customdata, explorer.query, event);
    }
  });
  place.on("plotly_unhover", hideTip);
  place.on("plotly_click", ({ points: [point] }) => {
    if (point.customdata !== undefined) choose(point.customdata);
  });
  place.on("plotly_selected", (event) => {
    const inside = [...new Set((event?.points ?? []).map((point) => point.customdata))];
    if (inside.length) list(inside.filter((i) => i !== undefined && explorer.matching[i]));
  });
  place.addEventListener("mouseleave", hideTip);
}

// Show a sample and its neighbours at the side; null shows what can be done.
function choose(i) {
  explorer.chosen = i;
  drawChosen();
  const { data, query } = explorer;
  const side = byId("chosen");
  byId("side").classList.toggle("chosen", i !== null);
  if (i === null) {
    side.replaceChildren(make("p", "muted", "Point at a sample to see its X-ray and report. Click it to "
      + "list its neighbours. Box or lasso (upper right of the map) list what they hold."));
    return;
  }
  const relation = data.neighbours[byId("relation").value];
  side.replaceChildren(sampleCard(data, i, query));
  if (innerWidth <= 900) side.scrollIntoView({ block: "nearest" });
  if (!relation) return;
  const found = relation.index[i];
  found.forEach((j, rank) => {
    const note = `, cosine ${relation.cosine[i][rank].toFixed(3)}`;
    side.append(linked(neighbourButton(data, j, note, query, j === i), j));
  });
}

// Show the samples of a region.
function list(indices) {
  const { data, query } = explorer;
  explorer.chosen = null;
  drawChosen();
  byId("side").classList.remove("chosen");
  const more = indices.length > SHOWN_AT_SIDE ? `, the first ${SHOWN_AT_SIDE}` : "";
  byId("chosen").replaceChildren(
    make("strong", "", `${indices.length.toLocaleString("en")} sample${indices.length === 1 ? "" : "s"}${more}`),
    ...indices.slice(0, SHOWN_AT_SIDE).map((i) => linked(neighbourButton(data, i, "", query, false), i)),
  );
}

function linked(button, i) {
  button.addEventListener("click", () => choose(i));
  return button;
}
