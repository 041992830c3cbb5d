// What the whole page shares: packed data, the theme, and pictures in full size.

const PALETTE = {{ palette }};
// In the order of the shapes of other pictures; from the ninth label on the shape changes.
const SYMBOLS = ["circle", "triangle-up", "square", "diamond", "cross", "triangle-down", "x", "star"];

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

// A name as rows of at most so many letters, the last one cut. Plotly reads markup, and a name is none.
function rowsOf(name, most, count) {
  const rows = [];
  for (const word of name.split(/\s+/).filter(Boolean)) {
    const last = rows.at(-1);
    if (last !== undefined && last.length + word.length < most) rows[rows.length - 1] = `${last} ${word}`;
    else rows.push(word);
  }
  const shown = rows.slice(0, count).map((row, k) => {
    const cut = row.length > most || (k === count - 1 && rows.length > count);
    return cut ? `${row.slice(0, most - 1)}…` : row;
  });
  const plain = { "&": "&amp;", "<": "&lt;", ">": "&gt;" };
  return shown.map((row) => row.replace(/[&<>]/g, (letter) => plain[letter]));
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

// Draw charts now, or when the part that holds them is opened, and again when the theme changes.
function drawWhenShown(place, draw) {
  const folded = place.closest("details:not([open])");
  if (!folded) {
    draw();
    redraws.push(draw);
    return;
  }
  folded.addEventListener("toggle", () => drawWhenShown(place, draw), { once: true });
}

function save(name, address) {
  const link = make("a");
  link.download = name;
  link.href = address;
  link.click();
}

// A chart with its title and buttons that save it.
function chartCard(title, file) {
  const card = make("div", "card");
  const head = make("div", "head");
  const plot = make("div", "plot");
  head.append(make("h4", "", title));
  for (const format of ["svg", "png"]) {
    const button = make("button", "get", format.toUpperCase());
    button.type = "button";
    button.addEventListener("click", async () => {
      const { data, layout } = plot;
      const { width, height } = plot.getBoundingClientRect();
      const rows = rowsOf(title, Math.floor(width / 8), 4);
      const top = 22 + 18 * rows.length;
      const whole = {
        ...layout, paper_bgcolor: css("--card"),
        title: { text: rows.join("<br>"), font: { size: 14 }, x: 0.02, y: 1, yref: "container", yanchor: "top", pad: { t: 12 } },
        margin: { ...layout.margin, t: top },
      };
      const size = { width: Math.round(width), height: Math.round(height) + top };
      save(`${file}.${format}`, await Plotly.toImage({ data, layout: whole }, { format, scale: format === "png" ? 3 : 1, ...size }));
    });
    head.append(button);
  }
  card.append(head, plot);
  return { card, plot };
}

function savePictures() {
  for (const image of document.querySelectorAll("figure img")) {
    const button = make("button", "get", "PNG");
    button.type = "button";
    button.addEventListener("click", () => {
      const canvas = make("canvas");
      canvas.width = image.naturalWidth;
      canvas.height = image.naturalHeight;
      canvas.getContext("2d").drawImage(image, 0, 0);
      const name = image.closest("figure").querySelector("code").textContent;
      save(name.replace(/^.*?([^/]+\/)?([^/]+)$/, "$1$2").replace("/", "_"), canvas.toDataURL("image/png"));
    });
    image.closest("figure").querySelector("figcaption").append(button);
  }
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
  savePictures();
  try {
    if (byId("data-plotly")) await loadPlotly();
    if (byId("data-charts")) await startCharts();
    if (byId("data-curves")) await startCurves();
    if (byId("explorer")) await startExplorer();
    document.documentElement.dataset.ready = "true";
  } catch (error) {
    byId("problem").textContent = `Charts, curves and explorer cannot be shown: ${error.message}`;
    byId("problem").hidden = false;
    throw error;
  }
}
