// How one sample is shown: in the box at the pointer, at the side, and as a neighbour.

function thumbnail(samples, i) {
  return samples.thumbnail[i] ? `data:image/webp;base64,${samples.thumbnail[i]}` : "";
}

function labelNames(data, i) {
  return data.samples.labels ? data.samples.labels[i].map((k) => data.labels[k]) : [];
}

function setImage(image, source) {
  image.hidden = !source;
  if (source) image.src = source;
  else image.removeAttribute("src");
}

function chips(names) {
  const row = make("div", "chips");
  for (const name of names) row.append(make("span", "chip", name));
  return row;
}

function showTip(data, i, query, event) {
  const tip = byId("tip");
  setImage(tip.firstElementChild, thumbnail(data.samples, i));
  const text = tip.lastElementChild;
  text.replaceChildren(
    make("small", "", `line ${data.samples.line[i]}`),
    chips(labelNames(data, i)),
    highlighted(data.samples.report[i], query),
  );
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const right = event.clientX + 18 + box.width < innerWidth;
  const left = right ? event.clientX + 18 : Math.max(4, event.clientX - 18 - box.width);
  tip.style.left = `${left}px`;
  tip.style.top = `${Math.max(4, Math.min(event.clientY - 40, innerHeight - box.height - 4))}px`;
}

function hideTip() {
  byId("tip").hidden = true;
}

function sampleCard(data, i, query) {
  const card = make("div", "sample");
  const image = make("img");
  image.alt = `X-ray of line ${data.samples.line[i]}`;
  setImage(image, thumbnail(data.samples, i));
  card.append(
    make("strong", "", `Line ${data.samples.line[i]}`), " ",
    make("small", "", data.samples.image[i]),
    image,
    chips(labelNames(data, i)),
    highlighted(data.samples.report[i], query),
  );
  return card;
}

function neighbourButton(data, i, note, query, own) {
  const button = make("button", own ? "neighbour own" : "neighbour");
  button.type = "button";
  const image = make("img");
  image.alt = "";
  setImage(image, thumbnail(data.samples, i));
  const text = make("div");
  text.append(
    make("small", "", `line ${data.samples.line[i]}${note}`),
    highlighted(data.samples.report[i], query),
  );
  if (labelNames(data, i).length) text.append(make("small", "", labelNames(data, i).join(", ")));
  button.append(image, text);
  return button;
}
