// The search of the explorer: every word must occur, -word must not, "two words" stand together.

function readQuery(text) {
  const wanted = [];
  const unwanted = [];
  for (const [, minus, phrase, word] of text.toLowerCase().matchAll(/(-?)(?:"([^"]+)"|(\S+))/g)) {
    const term = phrase ?? word.replaceAll('"', "");
    if (term && term !== "-") (minus ? unwanted : wanted).push(term);
  }
  return { text, wanted, unwanted };
}

function matches(query, text) {
  return query.wanted.every((term) => text.includes(term))
    && !query.unwanted.some((term) => text.includes(term));
}

// The text with the words that were searched for marked; never read as markup.
function highlighted(text, query) {
  const paragraph = make("p");
  const lower = text.toLowerCase();
  let from = 0;
  while (from < text.length) {
    const found = query.wanted
      .map((term) => [lower.indexOf(term, from), term.length])
      .filter(([at]) => at >= 0)
      .sort((a, b) => a[0] - b[0] || b[1] - a[1])[0];
    if (!found) break;
    paragraph.append(text.slice(from, found[0]), make("mark", "", text.slice(found[0], found[0] + found[1])));
    from = found[0] + found[1];
  }
  paragraph.append(text.slice(from));
  return paragraph;
}
