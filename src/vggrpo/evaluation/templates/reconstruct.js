// One video's geometry.
const data = island("data");
byId("title").textContent = data.title;
sceneViewer(byId("scene-box")).show([{ name: "", tone: "--tuned", scene: data.scene }]);
byId("facts").append(facts(Object.entries(data.facts)));
root.dataset.ready = "true";
