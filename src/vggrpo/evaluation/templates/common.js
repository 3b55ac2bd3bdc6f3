"use strict";
// Helpers of every page. Text always goes in through textContent, so that a prompt which looks like markup stays text.
const byId = (id) => document.getElementById(id);
const root = document.documentElement;
const island = (id) => JSON.parse(byId(id).textContent);
const still = matchMedia("(prefers-reduced-motion: reduce)").matches;

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
const title = (name) => { const text = name.replaceAll("_", " "); return text.charAt(0).toUpperCase() + text.slice(1); };
function facts(pairs) {
  const shown = (value) => (typeof value === "number" ? number(value) : Array.isArray(value) ? value.join(", ") : String(value));
  return make("dl", {}, ...pairs.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, shown(value))]));
}

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
