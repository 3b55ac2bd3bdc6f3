// Point clouds and camera paths in 3D, one view an arm, turned together by mouse, touch, buttons or arrow keys.
// World axes are x right, y down, z forward; drawn with the vertical axis up: (x, z, -y).
const ALWAYS = 0xffff;
const upright = ([x, y, z]) => [x, z, -y];

function unpackCloud(points) {
  const bytes = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const xyz = new Int16Array(bytes(points.xyz).buffer), rgb = bytes(points.rgb), view = new Uint16Array(bytes(points.view).buffer);
  return Array.from({ length: points.n }, (_, i) => ({
    at: upright([0, 1, 2].map((axis) => points.centre[axis] + points.scale * xyz[3 * i + axis])),
    colour: `rgb(${rgb[3 * i]},${rgb[3 * i + 1]},${rgb[3 * i + 2]})`, view: view[i],
  }));
}
function cloudTrace(points, key, size) {
  return { type: "scatter3d", mode: "markers", scene: key, hoverinfo: "skip", x: points.map((p) => p.at[0]), y: points.map((p) => p.at[1]), z: points.map((p) => p.at[2]), marker: { size, color: points.map((p) => p.colour), line: { width: 0 } } };
}
function lineTrace(points, key, tone, width) {
  const [x, y, z] = [0, 1, 2].map((axis) => points.map((point) => (point ? point[axis] : null)));
  return { type: "scatter3d", mode: "lines", scene: key, hoverinfo: "skip", x, y, z, line: { color: tone, width }, connectgaps: false };
}
const centreOf = (c) => upright([c[3], c[7], c[11]]);
// The pyramid that a camera sees, `depth` long.
function frustum(c, fov, depth) {
  const corner = (u, v) => upright([0, 1, 2].map((row) => c[4 * row] * u * fov[0] * depth + c[4 * row + 1] * v * fov[1] * depth + c[4 * row + 2] * depth + c[4 * row + 3]));
  const [a, b, d, e] = [corner(-1, -1), corner(1, -1), corner(1, 1), corner(-1, 1)], o = centreOf(c);
  return [o, a, b, o, d, e, o, null, a, e, null, b, d, null];
}
function pathLength(scene) {
  return scene.cameras.slice(1).reduce((sum, c, i) => sum + Math.hypot(...[3, 7, 11].map((k) => c[k] - scene.cameras[i][k])), 0);
}
// What the axes span: all but stray points, or the cameras alone, whose path is often short beside the scene.
function boundsOf(arms, close) {
  const cameras = arms.flatMap((arm) => arm.scene.cameras.map(centreOf));
  const points = close ? cameras : [...arms.flatMap((arm) => arm.cloud.map((p) => p.at)), ...cameras];
  const bounds = [0, 1, 2].map((axis) => {
    const values = points.map((point) => point[axis]).sort((a, b) => a - b), own = cameras.map((point) => point[axis]);
    const at = (share) => values[Math.round(share * (values.length - 1))];
    return [Math.min(at(0.02), ...own), Math.max(at(0.98), ...own)];
  });
  return { bounds, half: (close ? 0.8 : 0.53) * Math.max(1e-3, ...bounds.map(([low, high]) => high - low)) };
}

function sceneViewer(box) {
  const area = make("div", { class: "plot3d", tabindex: "0", role: "group", "aria-label": "Scene in three dimensions. Arrow keys turn it, plus and minus zoom." });
  const time = make("input", { type: "range", min: "0", max: "0", value: "0", "aria-label": "View" });
  const clock = make("output", {}), words = make("p", { class: "muted", role: "status" });
  const run = make("button", { type: "button", "aria-pressed": "false" }, "Play time");
  const close = make("input", { type: "checkbox" });
  const start = { eye: { x: 0.55, y: -1.55, z: 0.75 }, center: { x: 0, y: 0.1, z: -0.05 }, up: { x: 0, y: 0, z: 1 } };
  let arms = [], camera = start, timer = null, made = false;

  const wide = () => area.clientWidth > 640;
  const key = (index) => (index ? "scene2" : "scene");
  function layout() {
    const { bounds, half } = boundsOf(arms, close.checked);
    const axis = ([low, high], text) => ({ range: [(low + high) / 2 - half, (low + high) / 2 + half], title: { text }, gridcolor: colour("--line"), zerolinecolor: colour("--line"), color: colour("--muted"), showbackground: false, showspikes: false, nticks: 5 });
    const scenes = {}, annotations = [];
    arms.forEach((arm, index) => {
      const part = arms.length < 2 ? [0, 1] : index ? [0.505, 1] : [0, 0.495];
      const share = wide() || arms.length < 2 ? { x: part, y: [0, 1] } : { x: [0, 1], y: [1 - part[1], 1 - part[0]] };
      scenes[key(index)] = { domain: share, aspectmode: "cube", camera, dragmode: "turntable", xaxis: axis(bounds[0], "right"), yaxis: axis(bounds[1], "forward"), zaxis: axis(bounds[2], "up") };
      if (arm.name) annotations.push({ text: arm.name, showarrow: false, x: share.x[0] + 0.01, y: share.y[1], xref: "paper", yref: "paper", xanchor: "left", yanchor: "top", font: { color: colour(arm.tone), size: 14 } });
    });
    return frame({ ...scenes, annotations, margin: { l: 0, r: 0, t: 0, b: 0 } });
  }
  function traces() {
    const now = Number(time.value), size = arms.some((arm) => arm.cloud.length > 5000) ? 1.6 : 2.6;
    const { half } = boundsOf(arms, close.checked), reach = Math.min(0.12 * half, Math.max(0.04 * half, 0.3 * Math.max(...arms.map((arm) => pathLength(arm.scene)))));
    return arms.flatMap((arm, index) => {
      const tone = colour(arm.tone), c = arm.scene.cameras, shown = Math.min(now, c.length - 1);
      const others = c.filter((_, view) => view !== shown).flatMap((one) => frustum(one, arm.scene.fov, reach));
      return [
        cloudTrace(arm.cloud.filter((p) => p.view === ALWAYS), key(index), size),
        cloudTrace(arm.cloud.filter((p) => p.view === now), key(index), size + 1),
        lineTrace(c.map(centreOf), key(index), tone, 6),
        lineTrace(others, key(index), tone, 1.5),
        lineTrace(frustum(c[shown], arm.scene.fov, 1.6 * reach), key(index), colour("--focus"), 5),
      ];
    });
  }
  function draw() {
    if (!arms.length) return;
    Plotly.react(area, traces(), layout(), { displayModeBar: false, responsive: true, scrollZoom: false });
    if (made) return;
    made = true;
    // Both views turn together.
    const follow = (event) => {
      const moved = event["scene.camera"] || event["scene2.camera"];
      if (!moved) return;
      camera = moved;
      const other = event["scene.camera"] ? "scene2" : "scene";
      if (area.layout[other]) Plotly.relayout(area, { [other + ".camera"]: camera });
    };
    area.on("plotly_relayouting", follow);
    area.on("plotly_relayout", (event) => { if (Object.keys(event).length === 1 && JSON.stringify(event["scene.camera"] || event["scene2.camera"]) !== JSON.stringify(camera)) follow(event); });
  }
  function look(next) {
    camera = next;
    Plotly.relayout(area, Object.fromEntries(arms.map((_, index) => [key(index) + ".camera", camera])));
  }
  function turn(around, over, zoom) {
    const { x, y, z } = camera.eye, flat = Math.hypot(x, y), far = Math.hypot(flat, z) * zoom;
    const azimuth = Math.atan2(y, x) + around, height = Math.max(-1.5, Math.min(1.5, Math.atan2(z, flat) + over));
    look({ ...camera, eye: { x: far * Math.cos(height) * Math.cos(azimuth), y: far * Math.cos(height) * Math.sin(azimuth), z: far * Math.sin(height) } });
  }
  const keys = { ArrowLeft: [-0.2, 0, 1], ArrowRight: [0.2, 0, 1], ArrowUp: [0, 0.15, 1], ArrowDown: [0, -0.15, 1], "+": [0, 0, 0.85], "=": [0, 0, 0.85], "-": [0, 0, 1.18] };
  area.addEventListener("keydown", (event) => { if (keys[event.key] && event.target === area) { event.preventDefault(); turn(...keys[event.key]); } });
  const button = (text, label, move) => { const b = make("button", { type: "button", "aria-label": label }, text); b.addEventListener("click", () => (move ? turn(...move) : look(start))); return b; };
  function tell() {
    const shown = arms[0].scene.frames[Number(time.value)];
    clock.textContent = shown === undefined ? "" : `frame ${shown}`;
  }
  close.addEventListener("change", draw);
  time.addEventListener("input", () => { tell(); draw(); });
  function play(on) {
    clearInterval(timer);
    timer = on ? setInterval(() => { time.value = String((Number(time.value) + 1) % (Number(time.max) + 1)); tell(); draw(); }, 400) : null;
    run.setAttribute("aria-pressed", String(on)); run.textContent = on ? "Pause time" : "Play time";
  }
  run.addEventListener("click", () => play(timer === null));
  box.append(area, make("div", { class: "controls" }, make("label", {}, "Time ", time, " ", clock), run, make("label", {}, close, " Cameras only"),
    button("◀", "Turn left", keys.ArrowLeft), button("▶", "Turn right", keys.ArrowRight), button("▲", "Look from higher", keys.ArrowUp), button("▼", "Look from lower", keys.ArrowDown),
    button("+", "Closer", keys["+"]), button("−", "Farther", keys["-"]), button("Reset", "Reset the view", null)), words);
  drawn.push(() => { if (made) draw(); });
  return {
    show(list) {
      arms = list.map((arm) => ({ ...arm, cloud: unpackCloud(arm.scene.points) }));
      time.max = String(Math.max(...arms.map((arm) => arm.scene.cameras.length)) - 1);
      time.value = "0";
      area.classList.toggle("double", arms.length > 1);
      words.textContent = arms.map((arm) => {
        const moving = arm.cloud.filter((p) => p.view !== ALWAYS).length, unit = arm.scene.metric ? "m" : "scene units";
        return `${arm.name ? arm.name + ": " : ""}${arm.scene.cameras.length} views, camera path ${number(pathLength(arm.scene))} ${unit}, ${arm.cloud.length} points (${moving} of something that moves), as seen by ${arm.scene.by}.`;
      }).join(" ");
      tell(); draw();
    },
  };
}
