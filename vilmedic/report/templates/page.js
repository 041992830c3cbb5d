// What the whole page shares: packed data, the theme, and pictures in full size.

const PALETTE = [
  "#3b82c4", "#e69f00", "#1fa67a", "#d55e00", "#8e6bd1", "#cc79a7", "#56b4e9", "#a3923a",
  "#c0504d", "#6b8e23", "#b07d4f", "#5f9ea0",
];

const byId = (id) => document.getElementById(id);

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

async function unpack(id) {
  const packed = atob(byId(id).textContent.trim());
  const bytes = Uint8Array.from(packed, (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

async function loadPlotly() {
  const script = make("script");
  script.textContent = await unpack("data-plotly");
  document.head.append(script);
}

function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function baseLayout() {
  const axis = { gridcolor: css("--line"), zerolinecolor: css("--line"), linecolor: css("--line") };
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: css("--ink"), size: 12, family: getComputedStyle(document.body).fontFamily },
    hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--ink") } },
    xaxis: { ...axis },
    yaxis: { ...axis },
  };
}

const PLOT_OPTIONS = { displaylogo: false, responsive: true, showTips: false };
const coarsePointer = () => matchMedia("(pointer: coarse)").matches;
const redraws = [];

function followTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const redraw = () => redraws.forEach((one) => one());
  dark.addEventListener("change", redraw);
  byId("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const isDark = root.dataset.theme ? root.dataset.theme === "dark" : dark.matches;
    root.dataset.theme = isDark ? "light" : "dark";
    redraw();
  });
}

function enlargePictures() {
  const dialog = byId("large");
  dialog.addEventListener("click", () => dialog.close());
  for (const image of document.querySelectorAll("figure img")) {
    const open = () => {
      dialog.firstElementChild.src = image.src;
      dialog.showModal();
    };
    image.addEventListener("click", open);
    image.addEventListener("keydown", (event) => { if (event.key === "Enter") open(); });
  }
}

async function start() {
  followTheme();
  enlargePictures();
  try {
    if (byId("data-plotly")) await loadPlotly();
    if (byId("data-curves")) await startCharts();
    if (byId("explorer")) await startExplorer();
    document.documentElement.dataset.ready = "true";
  } catch (error) {
    byId("problem").textContent = `Curves and explorer cannot be shown: ${error.message}`;
    byId("problem").hidden = false;
    throw error;
  }
}
