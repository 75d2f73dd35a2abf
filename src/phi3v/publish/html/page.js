"use strict";
// What moves on a page: the gallery, which shows its entries fifty at a time, the dialog with one of them, and the
// readings of the curves. Text is set through textContent and never read as markup.

const PAGE = 50;

function element(name, kind = "", text = null, ...children) {
  const made = document.createElement(name);
  if (kind) made.className = kind;
  if (text !== null) made.textContent = text;
  made.append(...children);
  return made;
}

function prose(name, kind, text) { // of a model or the data, in any script
  const made = element(name, kind, text);
  made.dir = "auto";
  return made;
}

// ---- curves: the arrow keys show what the pointer shows ----

for (const svg of document.querySelectorAll("svg[tabindex]")) {
  const readings = [...svg.querySelectorAll(".reading")];
  let at = readings.length;
  const show = () => readings.forEach((reading, place) => reading.classList.toggle("on", place === at));
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    at = Math.min(Math.max(at + step, 0), readings.length - 1);
    show();
  });
  svg.addEventListener("blur", () => { at = readings.length; show(); });
}

// ---- gallery ----

function startGallery(source) {
  const { entries, images, sorts, runs, vocabulary } = JSON.parse(source.textContent);
  const part = (id) => document.getElementById(id);
  const cards = part("cards"), more = part("more"), dialog = part("entry"), search = part("search"), cell = part("cell");
  const groups = [...part("groups").children];
  const filter = { words: [], group: "", run: -1, sort: 0, cell: "" };
  const count = (number) => number.toLocaleString("en");
  let shown = [], current = 0;

  const siblings = new Map();
  for (const entry of entries) {
    const texts = [entry.asked, entry.foot, ...entry.rows.map((row) => row[1]), ...entry.turns.flatMap((turn) => turn.slice(0, 2))];
    entry.haystack = texts.join("\n").toLowerCase();
    if (entry.key) siblings.set(entry.key, [...(siblings.get(entry.key) ?? []), entry]);
  }

  function choose() {
    const [, key, sign] = sorts[filter.sort];
    const found = entries.filter((entry) =>
      (filter.run < 0 || entry.run === filter.run)
      && (!filter.cell || `${entry.run}:${entry.cell}` === filter.cell)
      && filter.words.every((word) => entry.haystack.includes(word)));
    const inGroup = (group) => found.filter((entry) => !group || entry.group === group);
    for (const button of groups) {
      button.setAttribute("aria-pressed", button.dataset.group === filter.group);
      button.lastElementChild.textContent = count(inGroup(button.dataset.group).length);
    }
    shown = inGroup(filter.group).sort((a, b) => sign * (a[key] - b[key]) || a.order - b.order || a.run - b.run);
    part("count").textContent = shown.length ? `${count(shown.length)} found` : "Nothing matches";
    cards.replaceChildren();
    current = 0;
    draw(PAGE);
  }

  // Whole pages, up to the one that `end` lies in.
  function draw(end) {
    const drawn = cards.children.length;
    cards.append(...shown.slice(drawn, Math.ceil(end / PAGE) * PAGE).map((entry, place) => card(entry, drawn + place)));
    const left = shown.length - cards.children.length;
    more.hidden = left <= 0;
    more.textContent = `Show ${Math.min(PAGE, left)} more of ${count(left)}`;
  }

  function card(entry, place) {
    const node = element("button", `card entry ${entry.group}`);
    node.type = "button";
    node.dataset.place = place;
    node.tabIndex = place === current ? 0 : -1;
    const number = entry.images.length, most = 8;
    if (number) {
      const strip = element("span", "thumbs", null, ...entry.images.slice(0, most).map(frame));
      strip.style.setProperty("--across", number === 1 ? 1 : number <= 4 ? 2 : number <= 6 ? 3 : 4);
      strip.style.setProperty("--down", number <= 2 ? 1 : 2);
      if (number > most) strip.append(element("span", "more", `+${number - most}`));
      node.append(strip);
    }
    const foot = element("span", "foot", null, ...(runs.length > 1 ? [runKey(entry), " · "] : []), entry.foot);
    node.append(element("span", "text", null, prose("span", "asked", entry.asked), rows(entry.rows)), foot);
    return node;
  }

  function runKey(entry) {
    return element("span", `key run${entry.run % 6}`, runs[entry.run]);
  }

  function rows(lines) {
    const list = element("span", "rows");
    for (const [label, text, tone] of lines) {
      if (label) list.append(element("span", "label", label));
      list.append(prose("span", `value ${tone}${label ? "" : " wide"}`, text));
    }
    return list;
  }

  // An image as large as fits beside `--side`; the tiles it is cut into are drawn over it.
  function frame(number) {
    const made = images[number];
    if (!made) return element("span", "gone", number < 0 ? "not in this page" : "image missing");
    const node = framed(made.src, made.width / made.height);
    if (!made.grid) return node;
    const [across, down] = made.grid;
    for (const [side, share] of ["left", "top", "right", "bottom"].map((side, place) => [side, made.padding[place]])) {
      const blank = element("span", `padding ${side}`);
      blank.style.setProperty("--share", share);
      if (share) node.append(blank);
    }
    const tiles = Array.from({ length: across * down }, (_, tile) => element("span", "", null, element("b", "", `${tile + 1}`)));
    const lines = element("span", "tiles", null, ...tiles);
    lines.style.gridTemplate = `repeat(${down}, 1fr) / repeat(${across}, 1fr)`;
    node.append(lines);
    return node;
  }

  function framed(src, ratio) {
    const image = element("img");
    Object.assign(image, { alt: "", decoding: "async", src });
    const node = element("span", "frame", null, image);
    node.style.setProperty("--ratio", ratio);
    return node;
  }

  function focus(place) {
    if (!shown.length) return;
    cards.children[current]?.setAttribute("tabindex", "-1");
    current = Math.min(Math.max(place, 0), shown.length - 1);
    draw(current + 1);
    const node = cards.children[current];
    node.tabIndex = 0;
    node.focus({ preventScroll: true });
    node.scrollIntoView({ block: "nearest" });
  }

  // ---- one entry ----

  function open(place) {
    current = place;
    const entry = shown[place], body = part("entry-body");
    part("entry-title").textContent = entry.asked.split("\n")[0] || "(no text)";
    part("entry-place").textContent = `${count(place + 1)} of ${count(shown.length)}`;
    part("previous").disabled = place === 0;
    part("next").disabled = place === shown.length - 1;
    if (!dialog.open) dialog.showModal();
    body.replaceChildren(...conversation(entry), ...verdict(entry), ...others(entry), ...tokens(entry), details(entry));
    body.scrollTop = 0;
    body.focus({ preventScroll: true });
  }

  function conversation(entry) {
    const left = [...entry.images];
    return entry.turns.flatMap(([user, assistant, number]) => {
      const asked = element("div", "turn user", null, prose("p", "", user));
      if (number) {
        const strip = element("div", "strip", null, ...left.splice(0, number).flatMap(whole));
        strip.style.setProperty("--side", number === 1 ? "360px" : number === 2 ? "280px" : "190px");
        asked.prepend(strip);
      }
      return assistant === null ? [asked] : [asked, element("div", "turn model", null, prose("p", "", assistant))];
    });
  }

  // An image of the conversation, and of one that is cut into crops also the global crop.
  function whole(number) {
    const made = images[number];
    if (!made?.whole) return [frame(number)];
    const global = framed(made.whole, 1);
    global.style.setProperty("--side", "132px");
    return [[frame(number), made.caption], [global, "global crop"]].map(([node, caption]) =>
      element("figure", "", null, node, element("figcaption", "muted", caption)));
  }

  // The lines of the card, but for the answers that stand in the conversation.
  function verdict(entry) {
    const open = entry.turns.at(-1)[1] === null;
    const lines = entry.rows.filter(([, , tone]) => open || tone);
    return lines.length ? [rows(lines)] : [];
  }

  function others(entry) {
    const same = (siblings.get(entry.key) ?? []).filter((other) => other !== entry);
    return same.map((other) => element("div", "other", null, runKey(other), rows(other.rows.slice(1))));
  }

  function tokens(entry) {
    if (!entry.tokens) return [];
    const learns = (at) => entry.learnt.some(([start, end]) => start <= at && at < end);
    const line = element("p", "tokens"), vectors = [...entry.image_tokens];
    entry.tokens.forEach((id, at) => {
      const text = vocabulary[id];
      if (text === "<|image|>") line.append(element("span", "token image", `<|image|> × ${count(vectors.shift())}`));
      else line.append(element("span", learns(at) ? "token learnt" : "token", text.replaceAll("\n", "↵")));
      if (text.endsWith("\n")) line.append("\n");
    });
    const learnt = entry.learnt.reduce((sum, [start, end]) => sum + end - start, 0);
    const note = element("span", "token learnt", `${count(learnt)} carr${learnt === 1 ? "ies" : "y"} loss`);
    return [element("h3", "", "Tokens ", note), line];
  }

  function details(entry) {
    return element("dl", "", null, ...entry.details.flatMap(([name, text]) => [element("dt", "", name), element("dd", "", text)]));
  }

  // ---- controls ----

  const set = (name, value) => { filter[name] = value; choose(); };
  search.addEventListener("input", () => set("words", search.value.toLowerCase().split(/\s+/).filter(Boolean)));
  for (const button of groups) button.addEventListener("click", () => set("group", button.dataset.group));
  part("sort").addEventListener("change", (event) => set("sort", Number(event.target.value)));
  part("run")?.addEventListener("change", (event) => set("run", Number(event.target.value)));
  for (const button of document.querySelectorAll("button[data-cell]")) {
    button.addEventListener("click", () => {
      cell.textContent = `${button.parentElement.title.split("\n").slice(0, 2).join(", ")} ×`;
      cell.hidden = false;
      filter.group = "";
      set("cell", `${button.dataset.run}:${button.dataset.cell}`);
      focus(0);
    });
  }
  cell.addEventListener("click", () => { cell.hidden = true; set("cell", ""); });
  more.addEventListener("click", () => { const next = cards.children.length; draw(next + PAGE); focus(next); });

  cards.addEventListener("click", (event) => {
    const node = event.target.closest("button.entry");
    if (node) open(Number(node.dataset.place));
  });
  cards.addEventListener("keydown", (event) => {
    const columns = getComputedStyle(cards).gridTemplateColumns.split(" ").length;
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
    const place = { Home: 0, End: shown.length - 1 }[event.key] ?? current + steps[event.key];
    if (Number.isNaN(place)) return;
    event.preventDefault();
    focus(place);
  });
  dialog.addEventListener("keydown", (event) => {
    const place = current + ({ ArrowLeft: -1, ArrowRight: 1 }[event.key] ?? NaN);
    if (shown[place]) open(place);
  });
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("close", () => focus(current));
  part("previous").addEventListener("click", () => open(current - 1));
  part("next").addEventListener("click", () => open(current + 1));
  part("close").addEventListener("click", () => dialog.close());
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || dialog.open || event.target.matches("input, select")) return;
    event.preventDefault();
    search.focus();
    search.scrollIntoView({ block: "start" });
  });
  choose();
}

const source = document.getElementById("gallery");
if (source) startGallery(source);
