"use strict";
(() => {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const encoded = JSON.parse(document.getElementById("report-videos").textContent);
  const byId = (id) => document.getElementById(id);
  const root = document.documentElement;

  // ---- small helpers; text always goes in through textContent ----
  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (key === "class") element.className = value;
      else element.setAttribute(key, value);
    }
    element.append(...children.filter((child) => child !== null && child !== undefined).map((child) => (typeof child === "number" ? String(child) : child)));
    return element;
  }
  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  function number(value, sign = false) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    const text = size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(2) : String(Number(value.toPrecision(3)));
    return sign && value > 0 ? "+" + text : text;
  }
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
  const title = (name) => { const text = name.replaceAll("_", " "); return text.charAt(0).toUpperCase() + text.slice(1); };
  // Plotly reads a little markup in its labels: neutralise it, and break long prompts.
  function label(text, most = 240) {
    const short = text.length > most ? text.slice(0, most) + "…" : text;
    const lines = short.match(/.{1,60}(\s|$)|\S{1,60}/gu) || [short];
    return lines.map((line) => line.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;")).join("<br>");
  }
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const metrics = new Map(data.metrics.map((metric) => [metric.name, metric]));

  // ---- plots, redrawn when the theme changes ----
  const drawn = [];
  function frame(extra) {
    const axis = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line"), automargin: true };
    const { xaxis = {}, yaxis = {}, ...rest } = extra;
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
      font: { color: colour("--ink"), size: 11, family: "system-ui, sans-serif" }, margin: { l: 44, r: 8, t: 8, b: 38 },
      hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--ink") } },
      xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...rest,
    };
  }
  function plot(element, build) {
    const draw = () => { const { traces, layout } = build(); Plotly.react(element, traces, frame(layout), { displayModeBar: false, responsive: true }); };
    drawn.push(draw);
    draw();
  }
  // Dozens of plots and videos: each is made when it comes near the screen.
  const waiting = new WeakMap();
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      near.unobserve(entry.target);
      waiting.get(entry.target)?.();
    }
  }, { rootMargin: "600px" });
  function whenNear(element, action) { waiting.set(element, action); near.observe(element); }

  function setTheme(dark) {
    root.dataset.theme = dark ? "dark" : "light";
    byId("theme").setAttribute("aria-pressed", String(dark));
    byId("theme").textContent = dark ? "Light" : "Dark";
    drawn.forEach((draw) => draw());
  }
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  setTheme(prefersDark.matches);
  prefersDark.addEventListener("change", (event) => setTheme(event.matches));
  byId("theme").addEventListener("click", () => setTheme(root.dataset.theme !== "dark"));

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
    data.remarks.forEach((text) => byId("remarks").append(make("p", {}, text)));
  }

  function metricTable() {
    const head = ["Metric", "Label", "Base", "Tuned", "Difference [95 %]", "Verdict", "Wins / ties / losses", "p (Holm)", "Motion-matched", "Failures base / tuned"];
    const tags = [...new Set(data.metrics.flatMap((metric) => Object.keys(metric.tags)))];
    const body = make("tbody");
    for (const metric of data.metrics) {
      const [tone, word] = judgement(metric);
      const row = make("tr", { class: `${metric.headline ? "headline" : ""} ${metric.role}` },
        make("th", { scope: "row", title: metric.about }, `${title(metric.name)} ${metric.higher ? "↑" : "↓"} `, make("span", { class: "muted" }, metric.unit)),
        make("td", {}, make("span", { class: "tag " + metric.label }, metric.label), metric.role === "guard" ? " guard" : ""),
        make("td", {}, number(metric.base)), make("td", {}, number(metric.tuned)), make("td", {}, interval(metric.diff)),
        make("td", { class: metric.role === "guard" ? "" : tone }, metric.role === "guard" ? (word === "better" ? "higher is kept" : word === "worse" ? "changed" : "held") : word),
        make("td", {}, metric.wins ? metric.wins.join(" / ") : "–"), make("td", {}, number(metric.pHolm)),
        make("td", {}, metric.matched ? `${interval(metric.matched)}, n=${metric.matched.n}` : "–"),
        make("td", {}, metric.failures[0] === null ? "–" : metric.failures.join(" / ")));
      tags.forEach((tag) => row.append(make("td", {}, interval(metric.tags[tag]))));
      body.append(row);
    }
    const header = make("tr", {}, ...[...head, ...tags.map((tag) => "Difference, " + tag)].map((text) => make("th", { scope: "col" }, text)));
    byId("metric-table").append(make("caption", { class: "visually-hidden" }, "Every metric, base and tuned, with intervals"), make("thead", {}, header), body);
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
            { x, y, mode: "markers", type: "scatter", customdata: metric.points.map((point) => point[0]), text: metric.points.map((point) => label(data.prompts[point[0]])),
              hovertemplate: "%{text}<br>base %{x:.4g}, tuned %{y:.4g}<extra></extra>",
              marker: { size: 8, opacity: 0.85, color: metric.points.map((point) => point[2] === point[1] ? colour("--muted") : (point[2] > point[1]) === metric.higher ? colour("--good") : colour("--bad")), symbol: metric.points.map((point) => (point[2] > point[1]) === metric.higher ? "circle" : "x") } },
          ],
          layout: {
            xaxis: { title: { text: "base" }, range: [low, high] }, yaxis: { title: { text: "tuned" }, range: [low, high] },
            shapes: [{ type: "path", layer: "below", line: { width: 0 }, fillcolor: colour("--shade"), path: metric.higher ? `M ${low},${low} L ${high},${high} L ${low},${high} Z` : `M ${low},${low} L ${high},${high} L ${high},${low} Z` }],
          },
        }));
        area.on("plotly_click", (event) => { const found = event.points.find((point) => point.customdata !== undefined); if (found) showPrompt(found.customdata); });
      });
    }
  }

  // ---- videos ----
  const cards = data.cards.map((card, index) => ({ ...card, index, element: null, players: [] }));
  let playing = !still;
  function source(id) {
    const bytes = Uint8Array.from(atob(encoded[id]), (character) => character.charCodeAt(0));
    return URL.createObjectURL(new Blob([bytes], { type: "video/mp4" }));
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
    if (data.cameras.some((path) => path.prompt === card.prompt && String(path.seed) === String(card.seed))) {
      const jump = make("button", { type: "button" }, "Camera in 3D");
      jump.addEventListener("click", () => { chooseCamera(card); byId("cameras").scrollIntoView(); });
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

  // ---- cameras ----
  const cameraPlot = byId("camera-plot"), cameraSelect = byId("camera-select");
  function cameraTraces(path) {
    return [["base", "--base"], ["tuned", "--tuned"]].filter(([arm]) => path[arm]).flatMap(([arm, tone]) => {
      const [x, y, z] = [0, 1, 2].map((axis) => path[arm].map((point) => point[axis]));
      // Drawn with the vertical axis up: plot (x, z, -y).
      return [{ type: "scatter3d", mode: "lines+markers", name: arm, x, y: z, z: y.map((value) => -value), line: { color: colour(tone), width: 6 }, marker: { size: x.map((_, index) => (index ? 3 : 6)), color: colour(tone) }, hovertemplate: `${arm}, view %{pointNumber}<br>x %{x:.3f}, y %{customdata:.3f}, z %{y:.3f}<extra></extra>`, customdata: y }];
    });
  }
  // One scale for all three axes, so that a straight line looks straight and a small move doesn't look large beside another.
  function axes(path) {
    const points = [...(path.base || []), ...(path.tuned || [])];
    const bounds = [0, 1, 2].map((axis) => { const values = points.map((point) => point[axis]); return [Math.min(...values), Math.max(...values)]; });
    const half = 0.55 * Math.max(1e-3, ...bounds.map(([low, high]) => high - low));
    const axis = ([low, high], flip, text) => {
      const middle = (flip ? -1 : 1) * (low + high) / 2;
      return { range: [middle - half, middle + half], title: { text }, gridcolor: colour("--line"), zerolinecolor: colour("--line"), color: colour("--muted"), showbackground: false, nticks: 5 };
    };
    return { xaxis: axis(bounds[0], false, "x right"), yaxis: axis(bounds[2], false, "z forward"), zaxis: axis(bounds[1], true, "up") };
  }
  function cameras() {
    if (!data.cameras.length) { byId("cameras").replaceChildren(byId("cameras-h"), make("p", { class: "muted" }, "No camera paths were recorded in this run.")); return; }
    data.cameras.forEach((path, index) => cameraSelect.append(make("option", { value: index }, `${(data.prompts[path.prompt] || "(no prompt)").slice(0, 120)} (seed ${path.seed})`)));
    whenNear(cameraPlot, () => {
      const draw = () => Plotly.react(cameraPlot, cameraTraces(data.cameras[Number(cameraSelect.value)]), frame({
        showlegend: true, legend: { x: 0, y: 1, bgcolor: "rgba(0,0,0,0)" }, margin: { l: 0, r: 0, t: 0, b: 0 }, uirevision: "keep",
        scene: { aspectmode: "cube", ...axes(data.cameras[Number(cameraSelect.value)]) },
      }), { displayModeBar: false, responsive: true });
      drawn.push(draw);
      draw();
      cameraSelect.addEventListener("change", draw);
    });
  }
  function chooseCamera(card) {
    const index = data.cameras.findIndex((path) => path.prompt === card.prompt && String(path.seed) === String(card.seed));
    if (index >= 0) { cameraSelect.value = String(index); cameraSelect.dispatchEvent(new Event("change")); }
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
  function facts(pairs) { return make("dl", {}, ...pairs.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, typeof value === "number" ? number(value) : String(value))])); }
  function audit() {
    const body = byId("audit-body"), found = data.audit;
    if (!found) { body.append(make("p", { class: "muted" }, "No reward audit in this run: whether the reward is signal or noise was not checked.")); return; }
    const passed = found.passed === true;
    body.append(make("p", { class: passed ? "good" : "bad" }, passed ? "Passed: the reward answers to real inconsistency." : "Not passed: the reward may be the network's own noise."));
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
    const body = byId("run-body");
    body.append(make("h3", {}, "Facts"), facts(Object.entries(data.run.facts)), make("h3", {}, "Versions"), facts(Object.entries(data.run.versions)));
    if (data.run.config) body.append(make("details", {}, make("summary", {}, "Training config"), make("pre", { tabindex: "0" }, data.run.config)));
  }

  headline(); metricTable(); pairPlots(); videos(); cameras(); training(); audit(); run();
  root.dataset.ready = "true";
})();
