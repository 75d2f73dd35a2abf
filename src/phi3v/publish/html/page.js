"use strict";
// What moves on a page: the gallery, of whose thousands of entries the document holds as many as a screen shows, the
// dialog with one of them, and the readings of the curves. Text goes in by textContent and is never read as markup.

function element(name, kind = "", text = null, ...children) {
  const made = document.createElement(name);
  if (kind) made.className = kind;
  if (text !== null) made.textContent = text;
  made.append(...children);
  return made;
}

// ---- curves: the arrow keys read what the pointer reads ----

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
  const { entries, pictures, sorts, runs, vocabulary } = JSON.parse(source.textContent);
  const part = (id) => document.getElementById(id);
  const cards = part("cards"), dialog = part("entry"), search = part("search"), cell = part("cell");
  const groups = [...part("groups").children];
  const filter = { words: [], group: "", run: -1, sort: 0, cell: "" };
  const nodes = new Map(); // place in `shown` -> its card, if that is in the document
  let shown = [], current = 0, columns = 1, grid = {};

  const siblings = new Map();
  for (const entry of entries) {
    const texts = [entry.asked, entry.foot, ...entry.rows.map((row) => row[1])];
    for (const [user, assistant] of entry.turns) texts.push(user, assistant ?? "");
    entry.haystack = texts.join("\n").toLowerCase();
    if (entry.key) siblings.set(entry.key, [...(siblings.get(entry.key) ?? []), entry]);
  }

  function choose() {
    const [, key, sign] = sorts[filter.sort];
    const found = entries.filter((entry) =>
      (filter.run < 0 || entry.run === filter.run)
      && (!filter.cell || `${entry.run}:${entry.cell}` === filter.cell)
      && filter.words.every((word) => entry.haystack.includes(word)));
    for (const button of groups) {
      const group = button.dataset.group;
      const count = group ? found.filter((entry) => entry.group === group).length : found.length;
      button.setAttribute("aria-pressed", group === filter.group);
      button.lastElementChild.textContent = count.toLocaleString("en");
    }
    shown = found.filter((entry) => !filter.group || entry.group === filter.group);
    shown.sort((a, b) => sign * (a[key] - b[key]) || a.order - b.order || a.run - b.run);
    current = 0;
    part("count").textContent = shown.length ? `${shown.length.toLocaleString("en")} shown` : "Nothing matches";
    layOut();
  }

  // Cards are of one size and lie on a grid, so that where each of them is can be computed.
  function layOut() {
    const style = getComputedStyle(cards);
    const size = (name) => parseFloat(style.getPropertyValue(name));
    const gap = size("--gap"), width = cards.clientWidth;
    columns = Math.max(1, Math.floor((width + gap) / (size("--card-width") + gap)));
    grid = { gap, width: (width - gap * (columns - 1)) / columns, height: size("--card-height"), pictures: size("--pictures") };
    cards.style.height = `${Math.max(0, Math.ceil(shown.length / columns) * (grid.height + gap) - gap)}px`;
    for (const node of nodes.values()) node.remove();
    nodes.clear();
    draw();
  }

  function draw() {
    const top = -cards.getBoundingClientRect().top, row = grid.height + grid.gap;
    const first = Math.max(0, Math.floor((top - innerHeight / 2) / row) * columns);
    const end = Math.min(shown.length, Math.ceil((top + innerHeight * 1.5) / row) * columns);
    const wanted = new Set(shown.length ? [current] : []); // wherever it is: the Tab key leads there
    for (let place = first; place < end; place++) wanted.add(place);
    for (const [place, node] of nodes) {
      if (wanted.has(place)) continue;
      node.remove();
      nodes.delete(place);
    }
    const fresh = document.createDocumentFragment();
    for (const place of wanted) {
      if (nodes.has(place)) continue;
      const node = card(shown[place]);
      node.dataset.place = place;
      node.tabIndex = place === current ? 0 : -1;
      node.style.width = `${grid.width}px`;
      const x = (place % columns) * (grid.width + grid.gap), y = Math.floor(place / columns) * row;
      node.style.transform = `translate(${x}px, ${y}px)`;
      nodes.set(place, node);
      fresh.append(node);
    }
    cards.append(fresh);
  }

  function card(entry) {
    const node = element("button", `card entry ${entry.group}`);
    node.type = "button";
    const count = entry.images.length, most = 8;
    if (count) {
      const across = count === 1 ? 1 : count <= 4 ? 2 : count <= 6 ? 3 : 4, down = count <= 2 ? 1 : 2;
      const strip = element("span", "pictures");
      strip.style.gridTemplateColumns = `repeat(${across}, 1fr)`;
      for (const number of entry.images.slice(0, most)) {
        strip.append(picture(number, (grid.width - 2) / across - 4, grid.pictures / down - 4));
      }
      if (count > most) strip.append(element("span", "more", `+${count - most}`));
      node.append(strip);
    }
    const text = element("span", "text");
    const asked = element("span", "asked", entry.asked);
    asked.dir = "auto";
    text.append(asked, rows(entry.rows));
    const foot = element("span", "foot");
    if (runs.length > 1) foot.append(element("span", `key run${entry.run % 6}`, runs[entry.run]), " · ");
    foot.append(entry.foot);
    node.append(text, foot);
    return node;
  }

  function rows(lines) {
    const list = element("span", "rows");
    for (const [label, text, tone] of lines) {
      const value = element("span", `value ${tone}`, text);
      value.dir = "auto";
      if (label) list.append(element("span", "label", label));
      else value.classList.add("wide");
      list.append(value);
    }
    return list;
  }

  // A picture as large as fits; the tiles it is cut into are drawn over it.
  function picture(number, width, height) {
    const made = pictures[number];
    if (!made) return element("span", "gone", number < 0 ? "not in this page" : "picture missing");
    const scale = Math.min(width / made.width, height / made.height);
    const frame = element("span", "picture");
    frame.style.width = `${made.width * scale}px`;
    frame.style.height = `${made.height * scale}px`;
    const image = element("img");
    image.alt = "";
    image.decoding = "async";
    image.src = made.src;
    frame.append(image);
    if (made.grid) {
      const [across, down] = made.grid;
      const lines = element("span", "tiles");
      lines.style.gridTemplate = `repeat(${down}, 1fr) / repeat(${across}, 1fr)`;
      for (let tile = 1; tile <= across * down; tile++) lines.append(element("span", "", null, element("b", "", `${tile}`)));
      const [left, top, right, bottom] = made.padding;
      for (const [name, share] of Object.entries({ left, top, right, bottom })) {
        if (!share) continue;
        const blank = element("span", "padding");
        const sideways = name === "left" || name === "right";
        Object.assign(blank.style, sideways ? { top: 0, bottom: 0, width: `${100 * share}%` } : { left: 0, right: 0, height: `${100 * share}%` });
        blank.style[name] = 0;
        frame.append(blank);
      }
      frame.append(lines);
    }
    return frame;
  }

  function move(place) {
    if (!shown.length) return;
    nodes.get(current)?.setAttribute("tabindex", "-1");
    current = Math.min(Math.max(place, 0), shown.length - 1);
    const row = grid.height + grid.gap, y = Math.floor(current / columns) * row;
    const top = cards.getBoundingClientRect().top + y, bar = part("groups").parentElement.offsetHeight + grid.gap;
    if (top < bar) scrollBy(0, top - bar);
    else if (top + row > innerHeight) scrollBy(0, top + row - innerHeight);
    draw();
    nodes.get(current).tabIndex = 0;
    nodes.get(current).focus({ preventScroll: true });
  }

  // ---- one entry ----

  function open(place) {
    current = Math.min(Math.max(place, 0), shown.length - 1);
    const entry = shown[current], body = part("entry-body");
    part("entry-title").textContent = entry.asked.split("\n")[0] || "(no text)";
    part("entry-place").textContent = `${(current + 1).toLocaleString("en")} of ${shown.length.toLocaleString("en")}`;
    part("previous").disabled = current === 0;
    part("next").disabled = current === shown.length - 1;
    if (!dialog.open) dialog.showModal();
    const room = body.clientWidth - 72; // without the padding of the body and of a turn
    body.replaceChildren(...conversation(entry, room), ...verdict(entry), ...others(entry), ...tokens(entry), details(entry));
    body.scrollTop = 0;
    body.focus({ preventScroll: true });
  }

  function conversation(entry, room) {
    const turns = [];
    let number = 0;
    for (const [user, assistant, count] of entry.turns) {
      const said = element("div", "turn user");
      if (count) {
        const strip = element("div", "strip");
        for (const image of entry.images.slice(number, number + count)) strip.append(...whole(image, count, room));
        number += count;
        said.append(strip);
      }
      const text = element("p", "", user);
      text.dir = "auto";
      said.append(text);
      turns.push(said);
      if (assistant !== null) {
        const answer = element("p", "", assistant);
        answer.dir = "auto";
        turns.push(element("div", "turn model", null, answer));
      }
    }
    return turns;
  }

  // A picture of the conversation, and of one that is cut into crops also the global crop.
  function whole(number, count, room) {
    const made = pictures[number], side = count === 1 ? 360 : count === 2 ? 280 : 190;
    if (!made?.whole) return [picture(number, Math.min(side, room), side)];
    const global = element("span", "picture");
    const image = element("img");
    image.alt = "";
    image.src = made.whole;
    global.append(image);
    Object.assign(global.style, { width: "132px", height: "132px" });
    return [
      element("figure", "", null, picture(number, Math.min(side, room), side), element("figcaption", "muted", made.caption)),
      element("figure", "", null, global, element("figcaption", "muted", "global crop")),
    ];
  }

  // What is said about the conversation; answers that stand in it are not said again.
  function verdict(entry) {
    const open = entry.turns.at(-1)[1] === null;
    const lines = entry.rows.filter(([, , tone]) => open || tone);
    return lines.length ? [rows(lines)] : [];
  }

  function others(entry) {
    const same = (siblings.get(entry.key) ?? []).filter((other) => other !== entry);
    return same.map((other) => element("div", "other", null, element("span", `key run${other.run % 6}`, runs[other.run]), rows(other.rows.slice(1))));
  }

  function tokens(entry) {
    if (!entry.tokens) return [];
    const learnt = new Set();
    for (const [start, end] of entry.learnt) for (let at = start; at < end; at++) learnt.add(at);
    const line = element("p", "tokens");
    let image = 0;
    entry.tokens.forEach((id, at) => {
      const text = vocabulary[id];
      if (text === "<|image|>") {
        line.append(element("span", "token image", `<|image|> × ${entry.image_tokens[image++].toLocaleString("en")}`));
      } else {
        line.append(element("span", learnt.has(at) ? "token learnt" : "token", text.replaceAll("\n", "↵")));
      }
      if (text.endsWith("\n")) line.append("\n");
    });
    const title = element("h3", "", "Tokens ");
    title.append(element("span", "token learnt", `${learnt.size.toLocaleString("en")} carr${learnt.size === 1 ? "ies" : "y"} loss`));
    return [title, line];
  }

  function details(entry) {
    const list = element("dl");
    for (const [name, text] of entry.details) list.append(element("dt", "", name), element("dd", "", text));
    return list;
  }

  // ---- what the hands do ----

  search.addEventListener("input", () => {
    filter.words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    choose();
  });
  for (const button of groups) button.addEventListener("click", () => { filter.group = button.dataset.group; choose(); });
  part("sort").addEventListener("change", (event) => { filter.sort = Number(event.target.value); choose(); });
  part("run")?.addEventListener("change", (event) => { filter.run = Number(event.target.value); choose(); });
  for (const button of document.querySelectorAll("button[data-cell]")) {
    button.addEventListener("click", () => {
      filter.cell = `${button.dataset.run}:${button.dataset.cell}`;
      cell.textContent = `${button.parentElement.title.split("\n").slice(0, 2).join(", ")} ×`;
      cell.hidden = false;
      filter.group = "";
      choose();
      move(0);
    });
  }
  cell.addEventListener("click", () => { filter.cell = ""; cell.hidden = true; choose(); });

  cards.addEventListener("click", (event) => {
    const node = event.target.closest("button.entry");
    if (node) open(Number(node.dataset.place));
  });
  cards.addEventListener("keydown", (event) => {
    const screen = Math.max(1, Math.floor(innerHeight / (grid.height + grid.gap))) * columns;
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, PageUp: -screen, PageDown: screen };
    const place = { Home: 0, End: shown.length - 1 }[event.key] ?? current + (steps[event.key] ?? NaN);
    if (Number.isNaN(place)) return;
    event.preventDefault();
    move(place);
  });
  dialog.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step && shown[current + step]) open(current + step);
  });
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("close", () => move(current));
  part("previous").addEventListener("click", () => open(current - 1));
  part("next").addEventListener("click", () => open(current + 1));
  part("close").addEventListener("click", () => dialog.close());
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || dialog.open || event.target.matches("input, select")) return;
    event.preventDefault();
    search.focus();
    search.scrollIntoView({ block: "start" });
  });

  let waiting = false;
  addEventListener("scroll", () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; draw(); });
  }, { passive: true });
  addEventListener("resize", layOut);
  choose();
}

const source = document.getElementById("gallery");
if (source) startGallery(source);
