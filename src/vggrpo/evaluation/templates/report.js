// The report: base and tuned model, side by side.
const data = island("report-data");
const encoded = island("report-videos");
const metrics = new Map(data.metrics.map((metric) => [metric.name, metric]));
function interval(found, sign = true) {
  if (!found || found.mean === null) return "–";
  if (found.low === null || found.high === null) return number(found.mean, sign) + " (too few prompts for an interval)";
  return `${number(found.mean, sign)} [${number(found.low, sign)}, ${number(found.high, sign)}]`;
}
function judgement(metric) {
  const found = metric.diff;
  if (!found || found.low === null || found.high === null || (found.low <= 0 && found.high >= 0)) return ["", "no difference shown"];
  return found.mean > 0 === metric.higher ? ["good", "better"] : ["bad", "worse"];
}
// ---- headline ----
function headline() {
  byId("subtitle").textContent = `${data.prompts.length} prompts, ${data.seeds} seed${data.seeds === 1 ? "" : "s"} each, same prompts and seeds for both.`;
  const box = byId("headline-cards");
  for (const metric of data.metrics.filter((m) => m.headline)) {
    const [tone, word] = judgement(metric);
    box.append(make("div", { class: "card" },
      make("h3", {}, title(metric.name)),
      make("div", { class: "big" }, `${number(metric.base)} → ${number(metric.tuned)}`),
      make("div", { class: tone }, `${word}: ${interval(metric.diff)} ${metric.unit}`),
      make("p", { class: "muted" }, `${metric.about} ${metric.higher ? "Higher" : "Lower"} is better.`),
      make("span", { class: "tag " + metric.label }, metric.label)));
  }
  if (data.motionRatio !== null) {
    const fine = data.motionRatio >= 0.8 && data.motionRatio <= 1.25;
    box.append(make("div", { class: "card" },
      make("h3", {}, "Motion, tuned over base"),
      make("div", { class: "big" }, number(data.motionRatio)),
      make("div", { class: fine ? "good" : "bad" }, fine ? "held (0.8–1.25)" : "not held (0.8–1.25)"),
      make("p", { class: "muted" }, "A still world is consistent too: an improvement counts only if motion holds.")));
  }
  for (const check of data.checks) {
    const [mark, tone] = check.outcome === null ? ["– open", ""] : check.outcome ? ["✓ holds", "good"] : ["✗ fails", "bad"];
    byId("checks").append(make("li", {}, make("b", { class: tone }, mark), ` ${title(check.name)}: ${check.text}`));
  }
  const open = data.checks.filter((check) => check.outcome !== true).map((check) => title(check.name));
  byId("verdict").textContent = open.length ? `Shown, not claimed: ${open.length} of ${data.checks.length} conditions do not hold or are open (${open.join(", ")}).` : "Counts: every condition below holds.";
  byId("verdict").className = open.length ? "bad" : "good";
  data.remarks.forEach((text) => byId("remarks").append(make("p", {}, text)));
}

function metricTable() {
  const head = ["Metric", "Label", "Base", "Tuned", "Difference [95 %]", "Verdict", "Wins / ties / losses", "p (Holm)", "Motion-matched", "Failures base / tuned"];
  const tags = [...new Set(data.metrics.flatMap((metric) => Object.keys(metric.tags)))];
  const columns = tags.filter((tag) => tag === "static" || tag === "dynamic"), others = tags.filter((tag) => !columns.includes(tag));
  const body = make("tbody");
  const rowHead = (metric) => make("th", { scope: "row", title: metric.about }, `${title(metric.name)} ${metric.higher ? "↑" : "↓"} `, make("span", { class: "muted" }, metric.unit));
  for (const metric of data.metrics) {
    const [tone, word] = judgement(metric);
    body.append(make("tr", { class: `${metric.headline ? "headline" : ""} ${metric.role}` },
      rowHead(metric),
      make("td", {}, make("span", { class: "tag " + metric.label }, metric.label), metric.role === "guard" ? " guard" : ""),
      make("td", {}, number(metric.base)), make("td", {}, number(metric.tuned)), make("td", {}, interval(metric.diff)),
      make("td", { class: metric.role === "guard" ? "" : tone }, metric.role === "guard" ? (word === "better" ? "higher is kept" : word === "worse" ? "changed" : "held") : word),
      make("td", {}, metric.wins ? metric.wins.join(" / ") : "–"), make("td", {}, number(metric.pHolm)),
      make("td", {}, metric.matched ? `${interval(metric.matched)}, n=${metric.matched.n}` : "–"),
      make("td", {}, metric.failures[0] === null ? "–" : metric.failures.join(" / ")),
      ...columns.map((tag) => make("td", {}, interval(metric.tags[tag])))));
  }
  const top = (names) => make("thead", {}, make("tr", {}, ...names.map((text) => make("th", { scope: "col" }, text))));
  byId("metric-table").append(make("caption", { class: "visually-hidden" }, "Every metric, base and tuned, with intervals"), top([...head, ...columns.map((tag) => "Difference, " + tag)]), body);
  if (!others.length) return;
  const headlines = data.metrics.filter((metric) => metric.headline);
  const rows = others.map((tag) => make("tr", {}, make("th", { scope: "row" }, tag), ...headlines.map((metric) => make("td", {}, metric.tags[tag] ? `${interval(metric.tags[tag])}, n=${metric.tags[tag].n}` : "–"))));
  byId("metrics").append(make("details", {}, make("summary", {}, `Headline metrics by ${others.length} more tags`),
    make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Headline metrics by tag" }, make("table", {}, make("caption", { class: "visually-hidden" }, "Difference of the headline metrics by tag"), top(["Tag", ...headlines.map((metric) => title(metric.name))]), make("tbody", {}, ...rows)))));
}

// ---- paired plots ----
function pairPlots() {
  for (const metric of data.metrics.filter((m) => m.points.length)) {
    const area = make("div", { class: "plot", role: "img", "aria-label": `${title(metric.name)}: tuned against base for ${metric.points.length} prompts. Mean ${number(metric.base)} to ${number(metric.tuned)}.` });
    byId("pair-plots").append(make("div", { class: "card" }, make("h3", {}, title(metric.name)), make("p", { class: "muted" }, `${metric.higher ? "above" : "below"} the line is better · ${metric.unit}`), area));
    whenNear(area, () => {
      const x = metric.points.map((point) => point[1]), y = metric.points.map((point) => point[2]);
      let low = Math.min(...x, ...y), high = Math.max(...x, ...y);
      const pad = (high - low || Math.abs(high) || 1) * 0.06;
      low -= pad; high += pad;
      plot(area, () => ({
        traces: [
          { x: [low, high], y: [low, high], mode: "lines", line: { color: colour("--muted"), width: 1, dash: "dot" }, hoverinfo: "skip", fill: metric.higher ? "none" : "tozeroy", fillcolor: "rgba(0,0,0,0)" },
          { x, y, mode: "markers", type: "scatter", customdata: metric.points.map((point) => point[0]), hovertemplate: "base %{x:.4g}, tuned %{y:.4g}<extra></extra>",
            marker: { size: 8, opacity: 0.85, color: metric.points.map((point) => point[2] === point[1] ? colour("--muted") : (point[2] > point[1]) === metric.higher ? colour("--good") : colour("--bad")), symbol: metric.points.map((point) => point[2] === point[1] ? "circle-open" : (point[2] > point[1]) === metric.higher ? "circle" : "x") } },
        ],
        layout: {
          xaxis: { title: { text: "base" }, range: [low, high] }, yaxis: { title: { text: "tuned" }, range: [low, high] },
          shapes: [{ type: "path", layer: "below", line: { width: 0 }, fillcolor: colour("--shade"), path: metric.higher ? `M ${low},${low} L ${high},${high} L ${low},${high} Z` : `M ${low},${low} L ${high},${high} L ${high},${low} Z` }],
        },
      }));
      area.on("plotly_hover", (event) => { const found = event.points.find((point) => point.customdata !== undefined); if (found) preview(found.customdata, event.event); });
      area.on("plotly_unhover", () => preview(null));
      area.on("plotly_click", (event) => { const found = event.points.find((point) => point.customdata !== undefined); if (found) showPrompt(found.customdata); });
    });
  }
}

// ---- videos ----
const cards = data.cards.map((card, index) => ({ ...card, index, element: null, players: [] }));
let playing = !still;
const urls = new Map();
function source(id) {
  if (!urls.has(id)) {
    const bytes = Uint8Array.from(atob(encoded[id]), (character) => character.charCodeAt(0));
    urls.set(id, URL.createObjectURL(new Blob([bytes], { type: "video/mp4" })));
  }
  return urls.get(id);
}
function figure(card, arm) {
  const part = card[arm];
  const caption = make("figcaption", {}, arm === "base" ? "Base" : "Tuned");
  if (!part.video || (part.reasons.length && !Object.keys(part.values).length)) {
    const why = part.reasons.length ? part.reasons.join("; ") : data.leftOut ? "left out to keep this page light" : "no video";
    return make("figure", {}, make("div", { class: "novideo" }, why), caption);
  }
  const video = make("video", { "aria-label": `${arm} video of: ${data.prompts[card.prompt].slice(0, 200)}, seed ${card.seed}`, playsinline: "", preload: "auto" });
  video.muted = true; video.loop = true;
  video.dataset.id = part.video;
  card.players.push(video);
  const reasons = part.reasons.length ? make("div", { class: "muted" }, part.reasons.join("; ")) : null;
  return make("figure", {}, video, caption, reasons);
}
function start(card) { card.players.forEach((player) => { player.play().catch(() => {}); }); }
function halt(card) { card.players.forEach((player) => player.pause()); }
function wake(card) {
  card.players.forEach((player) => { if (!player.src) player.src = source(player.dataset.id); });
  const [leader, follower] = card.players;
  if (follower) leader.addEventListener("timeupdate", () => { if (Math.abs(follower.currentTime - leader.currentTime) > 0.08) follower.currentTime = leader.currentTime; });
  if (playing && card.wanted) start(card);
}
// A prompt under the pointer plays beside it; the cards below do the same for keyboards and fingers.
const hover = byId("preview");
let hovered = null, pointer = "mouse";
for (const kind of ["pointerdown", "pointermove"]) addEventListener(kind, (event) => { pointer = event.pointerType; }, { capture: true, passive: true });
function preview(prompt, event) {
  if (prompt === null || pointer === "touch") { hover.hidden = true; hovered = null; hover.replaceChildren(); return; }
  if (prompt !== hovered) {
    hovered = prompt;
    const card = cards.find((one) => one.prompt === prompt);
    const players = ["base", "tuned"].map((arm) => {
      if (!card[arm].video) return make("div", { class: "novideo" }, "no video");
      const video = make("video", { playsinline: "" });
      video.muted = true; video.loop = true; video.src = source(card[arm].video);
      return video;
    });
    hover.replaceChildren(make("div", { class: "pair" }, ...players), make("div", { class: "muted" }, `base, tuned · seed ${card.seed}`), make("div", {}, data.prompts[prompt].slice(0, 400)));
    if (!still) players.forEach((player) => player.play?.().catch(() => {}));
  }
  hover.hidden = false;
  const { offsetWidth: width, offsetHeight: height } = hover;
  hover.style.left = Math.max(8, Math.min(innerWidth - width - 8, event.clientX > innerWidth / 2 ? event.clientX - width - 24 : event.clientX + 24)) + "px";
  hover.style.top = Math.max(8, Math.min(innerHeight - height - 8, event.clientY - height - 60)) + "px";
}
function improvement(card, metric) {
  const base = card.base.values[metric.name], tuned = card.tuned.values[metric.name];
  if (base === undefined || tuned === undefined || base === null || tuned === null) return null;
  return metric.higher ? tuned - base : base - tuned;
}
function build(card) {
  const toggle = make("button", { type: "button" }, playing ? "Pause" : "Play");
  toggle.addEventListener("click", () => { card.wanted = !card.wanted; toggle.textContent = card.wanted ? "Pause" : "Play"; if (card.wanted) { card.players.forEach((p) => { p.currentTime = 0; }); start(card); } else halt(card); });
  card.toggle = toggle; card.wanted = playing;
  const buttons = make("div", { class: "controls" }, card.players ? toggle : null);
  if (sceneOf(card) >= 0) {
    const jump = make("button", { type: "button" }, "In 3D");
    jump.addEventListener("click", () => chooseScene(card));
    buttons.append(jump);
  }
  card.change = make("p", { class: "muted" });
  card.element = make("article", { class: "card", id: "card-" + card.index },
    make("p", { class: "prompt", tabindex: "0" }, data.prompts[card.prompt] || "(no prompt)"),
    make("p", { class: "muted" }, `seed ${card.seed}${card.tags.length ? " · " + card.tags.join(", ") : ""}`),
    make("div", { class: "pair" }, figure(card, "base"), figure(card, "tuned")), card.change, buttons);
  whenNear(card.element, () => wake(card));
  onScreen.observe(card.element);
  card.element.card = card;
}
// Videos off the screen don't play: fifty decoders at once make a phone hot.
const onScreen = new IntersectionObserver((entries) => entries.forEach((entry) => { const card = entry.target.card; if (!card) return; if (entry.isIntersecting && card.wanted) start(card); else halt(card); }));
function sortCards() {
  const metric = metrics.get(byId("sort-metric").value), order = byId("sort-order").value;
  const value = new Map(cards.map((card) => [card, metric ? improvement(card, metric) : null]));
  const ranked = [...cards];
  if (order !== "prompt") ranked.sort((a, b) => {
    const [left, right] = [value.get(a), value.get(b)];
    // A pair without a number is a failure: it comes first among the worst and last among the best.
    if (left === null || right === null) return (left === null) === (right === null) ? a.index - b.index : (left === null) === (order === "worst") ? -1 : 1;
    return (order === "worst" ? left - right : right - left) || a.index - b.index;
  });
  byId("video-cards").replaceChildren(...ranked.map((card) => card.element));
  for (const card of cards) {
    const change = value.get(card);
    const words = change === null ? "no valid number in both" : `${number(card.base.values[metric.name])} → ${number(card.tuned.values[metric.name])} (${change > 0 ? "better" : change < 0 ? "worse" : "equal"})`;
    card.change.textContent = metric ? `${title(metric.name)}: ${words}` : "";
    card.change.className = change > 0 ? "good" : change < 0 ? "bad" : "muted";
  }
  byId("sort-status").textContent = metric ? `Sorted by ${title(metric.name)}, ${byId("sort-order").selectedOptions[0].textContent}` : "";
}
function videos() {
  const choice = byId("sort-metric");
  data.metrics.filter((metric) => metric.points.length).forEach((metric) => choice.append(make("option", { value: metric.name }, title(metric.name))));
  byId("left-out").textContent = data.leftOut || "";
  cards.forEach(build);
  choice.addEventListener("change", sortCards);
  byId("sort-order").addEventListener("change", sortCards);
  const all = byId("play-all");
  const show = () => { all.textContent = playing ? "Pause all" : "Play all"; all.setAttribute("aria-pressed", String(playing)); };
  all.addEventListener("click", () => {
    playing = !playing; show();
    for (const card of cards) { card.wanted = playing; card.toggle.textContent = playing ? "Pause" : "Play"; if (!playing) halt(card); else { const box = card.element.getBoundingClientRect(); if (box.bottom > 0 && box.top < innerHeight) start(card); } }
  });
  show();
  sortCards();
}
function showPrompt(prompt) {
  const found = [...byId("video-cards").children].filter((element) => element.card.prompt === prompt);
  document.querySelectorAll(".card.lit").forEach((element) => element.classList.remove("lit"));
  found.forEach((element) => element.classList.add("lit"));
  found[0]?.scrollIntoView({ block: "center" });
}

// ---- scenes ----
const sceneSelect = byId("scene-select");
const sceneOf = (card) => data.scenes.findIndex((entry) => entry.prompt === card.prompt && entry.seed === card.seed);
function scenes() {
  if (!data.scenes.length) { byId("scenes").replaceChildren(byId("scenes-h"), make("p", { class: "muted" }, "No geometry was recorded in this run.")); return; }
  data.scenes.forEach((entry, index) => sceneSelect.append(make("option", { value: index }, `${(data.prompts[entry.prompt] || "(no prompt)").slice(0, 120)} (seed ${entry.seed})`)));
  const box = byId("scene-box");
  whenNear(box, () => {
    const viewer = sceneViewer(box);
    const show = () => {
      const entry = data.scenes[Number(sceneSelect.value)];
      viewer.show([["base", "--base"], ["tuned", "--tuned"]].filter(([arm]) => entry[arm]).map(([arm, tone]) => ({ name: arm, tone, scene: entry[arm] })));
    };
    sceneSelect.addEventListener("change", show);
    show();
  });
}
function chooseScene(card) {
  sceneSelect.value = String(sceneOf(card));
  sceneSelect.dispatchEvent(new Event("change"));
  byId("scenes").scrollIntoView();
}

// ---- training ----
function training() {
  if (!data.training) { byId("training-plots").replaceWith(make("p", { class: "muted" }, "No training log in this run.")); return; }
  const { axis, x, series } = data.training;
  const names = Object.keys(series);
  const first = names.filter((name) => /reward|kl|ratio|clip|travel|grad|loss|spread|std/i.test(name));
  const rest = names.filter((name) => !first.includes(name));
  const draw = (name, box) => {
    const area = make("div", { class: "plot", role: "img", "aria-label": `${name} over ${x.length} logged ${axis}s, from ${number(series[name].find((v) => v !== null))} to ${number(series[name].findLast((v) => v !== null))}` });
    box.append(make("div", { class: "card" }, make("h3", {}, name.replaceAll("_", " ")), area));
    whenNear(area, () => plot(area, () => ({
      traces: [{ x, y: series[name], mode: x.length < 60 ? "lines+markers" : "lines", line: { color: colour("--tuned"), width: 2 }, marker: { size: 4 }, hovertemplate: `${axis} %{x}: %{y:.5g}<extra></extra>` }],
      layout: { xaxis: { title: { text: axis } } },
    })));
  };
  first.forEach((name) => draw(name, byId("training-plots")));
  if (rest.length) {
    const box = make("div", { class: "grid" });
    byId("training").append(make("details", {}, make("summary", {}, `${rest.length} more logged numbers`), box));
    rest.forEach((name) => draw(name, box));
  }
}

// ---- audit and run ----
function audit() {
  const body = byId("audit-body"), found = data.audit;
  if (!found) { body.append(make("p", { class: "muted" }, "No reward audit in this run: whether the reward is signal or noise was not checked.")); return; }
  const passed = found.passed === true;
  body.append(make("p", { class: passed ? "good" : "bad" }, passed ? "Passed: the reward answers to real inconsistency." : found.missed ? `Not passed: ${found.missed.join("; ")}.` : "Not passed."));
  body.append(facts([
    ["Floor: error on perfectly consistent clips", found.floor ?? "–"], ["Error on the base model's clips", found.base_value ?? "–"], ["Floor / base (at most 0.5, aim 0.33)", found.ratio ?? "–"]]));
  const table = make("table", {}, make("caption", { class: "visually-hidden" }, "Rank correlations of the reward's terms"),
    make("thead", {}, make("tr", {}, ...["Term", "with the truth, rendered clips (≥ 0.5, aim 0.7)", "with the judge, generated clips within a prompt (≥ 0.4, aim 0.6)"].map((text) => make("th", { scope: "col" }, text)))));
  const rows = make("tbody");
  for (const term of ["e_trans", "e_rot", "e_geo"]) {
    const cell = (value, least) => make("td", { class: typeof value !== "number" ? "" : value >= least ? "good" : "bad" }, typeof value === "number" ? number(value) : "–");
    rows.append(make("tr", {}, make("th", { scope: "row" }, term), cell(found.spearman_truth?.[term], 0.5), cell(found.spearman_judge?.[term], 0.4)));
  }
  table.append(rows);
  body.append(make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Rank correlations" }, table));
}
function run() {
  const body = byId("run-body"), { facts: known, settings, versions, config } = data.run;
  body.append(make("h3", {}, "Facts"), facts(Object.entries(known)));
  const arms = Object.keys(settings);
  if (arms.length) {
    const names = [...new Set(arms.flatMap((arm) => Object.keys(settings[arm])))];
    const cell = (value) => make("td", {}, value === undefined || value === null ? "–" : Array.isArray(value) ? value.join(" x ") : String(value));
    const table = make("table", {}, make("caption", { class: "visually-hidden" }, "How the videos of each arm were generated"),
      make("thead", {}, make("tr", {}, ...["Sampling", ...arms].map((text) => make("th", { scope: "col" }, text)))),
      make("tbody", {}, ...names.map((name) => make("tr", {}, make("th", { scope: "row" }, name.replaceAll("_", " ")), ...arms.map((arm) => cell(settings[arm][name]))))));
    body.append(make("h3", {}, "Videos"), make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Sampling settings" }, table));
  }
  body.append(make("h3", {}, "Versions"), facts(Object.entries(versions)));
  for (const [name, text] of Object.entries(config)) body.append(make("details", {}, make("summary", {}, name), make("pre", { tabindex: "0" }, text)));
}

headline(); metricTable(); pairPlots(); videos(); scenes(); training(); audit(); run();
root.dataset.ready = "true";
