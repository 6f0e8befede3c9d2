"use strict";
// One layer of one checkpoint: groups, dendrogram, distances, use, saliency, refit.

const layers = values.layers;
const numExperts = layers.num_experts;
const experts = d3.range(numExperts);
const layerDomains = layers.domains.length ? layers.domains : ["all text"];
const allNeurons = 65535;
const measures = {
  distances: unpack(layers.distances, numExperts * (numExperts - 1) / 2),
  use: unpack(layers.use, numExperts),
  saliency: unpack(layers.saliency, numExperts),
};
const dendrograms = layers.dendrograms.map((one) => ({merges: unpack(one.merges), heights: unpack(one.heights, numExperts - 1)}));
const plans = layers.plans.map((one) => ({
  starts: one.starts, slots: unpack(one.slots), memberSlots: unpack(one.member_slots), memberExperts: unpack(one.member_experts),
  memberNeurons: unpack(one.member_neurons), memberWeights: unpack(one.member_weights),
}));
const fates = ["kept alone", "merged", "protected", "dropped"];
const fateColors = ["#7a8699", "#2f7fd6", "#1f9d6b", "#d1495b"];

// The layer at a place, as a target has it: slots with their members, and what becomes of each expert.
function layerOf(target, place) {
  const plan = plans[target.plan];
  const slots = new Map();
  for (let number = plan.starts[place]; number < plan.starts[place + 1]; number += 1) {
    const slot = plan.memberSlots[number];
    if (!slots.has(slot)) slots.set(slot, []);
    slots.get(slot).push({expert: plan.memberExperts[number], neurons: plan.memberNeurons[number], weight: plan.memberWeights[number]});
  }
  const slotOf = plan.slots.subarray(place * numExperts, (place + 1) * numExperts);
  const isProtected = new Set(target.protected?.[place] ?? []);
  const size = d3.rollup(experts, (ones) => ones.length, (expert) => slotOf[expert]);
  const fate = experts.map((expert) => {
    if (isProtected.has(expert)) return "protected";
    if (slotOf[expert] < 0) return "dropped";
    return size.get(slotOf[expert]) > 1 || slots.get(slotOf[expert]).length > 1 ? "merged" : "kept alone";
  });
  return {slots, slotOf, fate, starved: layers.never_routed[place], isProtected: [...isProtected]};
}

// Experts from left to right: as the dendrogram joins them, else by slot.
function orderOf(target, place, layer) {
  if (target.dendrogram == null) {
    return d3.sort(experts, (expert) => layer.slotOf[expert] < 0 ? Infinity : layer.slotOf[expert], (expert) => expert);
  }
  const {merges} = dendrograms[target.dendrogram];
  const nodes = experts.map((expert) => [expert]);
  for (let step = 0; step < numExperts - 1; step += 1) {
    const at = 2 * (place * (numExperts - 1) + step);
    nodes.push([...nodes[merges[at]], ...nodes[merges[at + 1]]]);
  }
  return nodes.at(-1);
}

const listText = (found) => found.length ? found.join(", ") : "none";

function showSummary(target, place, layer) {
  const count = (fate) => layer.fate.filter((one) => one === fate).length;
  const merged = [...layer.slots.values()].filter((members) => members.length > 1).length;
  show("summary", el("dl", {},
    el("dt", {}, "Experts"), el("dd", {}, `${numExperts} to ${target.num_kept[place]}: ${merged} made of several, ${count("kept alone")} kept alone, ${count("dropped")} dropped`),
    el("dt", {}, "Starved (no calibration token)"), el("dd", {}, listText(layer.starved)),
    el("dt", {}, "Protected"), el("dd", {}, target.protected ? listText(layer.isProtected) : "this variant protects none"),
  ));
}

function showDendrogram(target, place, order) {
  if (target.dendrogram == null) {
    drawings.delete("dendrogram");
    return show("dendrogram", el("h3", {}, "Dendrogram"), el("p", {class: "note"}, "The method of this checkpoint makes no dendrogram."));
  }
  const {merges, heights} = dendrograms[target.dendrogram];
  const first = place * (numExperts - 1);
  const numMerges = numExperts - target.num_kept[place];
  const nodes = experts.map((expert) => ({x: order.indexOf(expert), y: 0}));
  const links = [];
  for (let step = 0; step < numExperts - 1; step += 1) {
    const [left, right] = [nodes[merges[2 * (first + step)]], nodes[merges[2 * (first + step) + 1]]];
    const y = heights[first + step];
    const part = step < numMerges ? "merged" : "kept apart";
    links.push({x1: left.x, y1: left.y, x2: left.x, y2: y, part}, {x1: left.x, y1: y, x2: right.x, y2: y, part}, {x1: right.x, y1: right.y, x2: right.x, y2: y, part});
    nodes.push({x: (left.x + right.x) / 2, y});
  }
  const top = heights[first + numExperts - 2];
  const below = numMerges ? heights[first + numMerges - 1] : 0;
  const above = numMerges < numExperts - 1 ? heights[first + numMerges] : top * 1.05;
  const cut = (below + above) / 2;
  const isAside = (target.protected?.[place] ?? []).length ? " Protected experts stay alone, whatever it says." : "";
  chart("dendrogram", "Dendrogram",
    `Height: distance at which groups are joined. Dashed: the cut into ${target.num_kept[place]}; blue joins lie below it.${isAside}`,
    (width) => {
      const step = (width - 70) / numExperts;
      const isShown = step >= 8, isUpright = step < 8 * String(numExperts - 1).length + 4;
      return Plot.plot({
        width, height: 300, marginLeft: 56, marginBottom: isShown ? 32 : 14, marginTop: 24,
        x: {domain: [-0.5, numExperts - 0.5], axis: null},
        y: {domain: [0, Math.max(top, cut) * 1.02 || 1], label: "distance", grid: true, ticks: 5},
        color: {domain: ["merged", "kept apart"], range: ["var(--accent)", "var(--quiet)"]},
        marks: [
          Plot.link(links, {x1: "x1", x2: "x2", y1: "y1", y2: "y2", stroke: "part", strokeWidth: 1.5, curve: "linear", strokeLinecap: "square"}),
          Plot.ruleY([cut], {stroke: "var(--second)", strokeDasharray: "6 4", strokeWidth: 1.5}),
          Plot.text([cut], {y: (one) => one, text: () => `cut: ${target.num_kept[place]}`, frameAnchor: "right", textAnchor: "end", dy: -7, fontWeight: "bold", fill: "var(--second)", stroke: "var(--back)"}),
          isShown ? Plot.text(order, {x: (_, at) => at, y: 0, text: String, dy: isUpright ? 6 : 12, fontSize: isUpright ? 9 : 11, rotate: isUpright ? -90 : 0, textAnchor: isUpright ? "end" : "middle"}) : null,
          Plot.tip(order, Plot.pointerX({x: (_, at) => at, y: 0, title: (expert) => `expert ${expert}`, anchor: "bottom"})),
        ],
      });
    });
}

function memberText(member, isAlone, isSum) {
  const parts = [];
  if (member.neurons !== allNeurons) parts.push(`${member.neurons} neurons`);
  if (isSum && !isAlone) parts.push(short(member.weight));
  return `${member.expert}${parts.length ? ` (${parts.join(", ")})` : ""}`;
}

function showGroups(layer) {
  const made = [], alone = [];
  for (const [slot, members] of d3.sort(layer.slots, ([slot]) => slot)) {
    const others = experts.filter((expert) => layer.slotOf[expert] === slot && members.every((one) => one.expert !== expert));
    if (members.length === 1 && !others.length && members[0].neurons === allNeurons) { alone.push(members[0].expert); continue; }
    const isSum = members.some((one) => one.weight !== members[0].weight) || members.every((one) => one.neurons === allNeurons);
    const text = members.map((one) => memberText(one, members.length === 1, isSum)).join(" + ");
    made.push(el("li", {}, el("b", {}, String(slot)), ` ← ${text}`, others.length ? `; takes the tokens of ${others.join(", ")}` : ""));
  }
  const dropped = experts.filter((expert) => layer.fate[expert] === "dropped");
  const sentence = [
    alone.length ? `Kept as they are: ${alone.join(", ")}.` : "",
    dropped.length ? `Dropped: ${dropped.join(", ")}.` : "",
  ].filter(Boolean).join(" ");
  show("groups", el("h3", {}, "Who became what"),
    el("p", {class: "note"}, "New expert ← experts of the source that it is made of, with weights or chosen neurons."),
    made.length ? el("ul", {class: "groups"}, ...made) : null, sentence ? el("p", {}, sentence) : null);
}

function showDistances(place, order) {
  const first = place * numExperts * (numExperts - 1) / 2;
  const pair = (one, other) => {
    const [low, high] = one < other ? [one, other] : [other, one];
    return one === other ? 0 : measures.distances[first + low * (2 * numExperts - low - 1) / 2 + high - low - 1];
  };
  const cells = order.flatMap((row, y) => order.map((column, x) => ({x, y, row, column, value: pair(row, column)})));
  chart("distances", "Distances",
    "Euclidean distance between the experts' mean outputs on the calibration text; experts stand in the order of the groups.",
    (width) => {
      const side = Math.min(width, 520);
      const isShown = (side - 60) / numExperts >= 11;
      return Plot.plot({
        width: side, height: side + 10, marginLeft: 36, marginRight: 8, marginBottom: 30, marginTop: 8,
        x: {domain: [0, numExperts], axis: null}, y: {domain: [numExperts, 0], axis: null},
        color: {scheme: "viridis", reverse: true, legend: true, label: "distance", width: Math.min(240, side - 40), tickFormat: d3.format("~r"), ticks: 4},
        marks: [
          Plot.raster(cells.map((one) => one.value), {width: numExperts, height: numExperts, x1: 0, y1: 0, x2: numExperts, y2: numExperts, imageRendering: "pixelated"}),
          isShown ? Plot.text(order, {x: (_, at) => at + 0.5, y: numExperts, text: String, dy: 11}) : null,
          isShown ? Plot.text(order, {x: 0, y: (_, at) => at + 0.5, text: String, dx: -10}) : null,
          Plot.tip(cells, Plot.pointer({x: (one) => one.x + 0.5, y: (one) => one.y + 0.5, maxRadius: 20, title: (one) => `experts ${one.row} and ${one.column}\n${short(one.value)}`})),
        ],
      });
    });
}

function showMeasure(id, title, caption, label, place, layer) {
  const bars = layerDomains.flatMap((domain, number) => experts.map((expert) => ({
    domain, expert, fate: layer.fate[expert], value: measures[id][(place * layerDomains.length + number) * numExperts + expert],
  })));
  const starved = new Set(layer.starved);
  const marked = layerDomains.flatMap((domain) => [...starved].map((expert) => ({domain, expert})));
  chart(id, title, caption, (width) => Plot.plot({
    width, height: 70 + 96 * layerDomains.length, marginLeft: 52, marginBottom: 34, marginTop: 22,
    x: {type: "band", domain: experts, label: "expert", ticks: experts.filter((one) => one % Math.ceil(numExperts / Math.max(4, width / 40)) === 0), padding: 0.15},
    y: {label, grid: true, ticks: 3, tickFormat: id === "use" ? "~%" : d3.format("~r")},
    fy: {label: null, domain: layerDomains, axis: null, padding: 0.15},
    color: {domain: fates, range: fateColors, legend: true},
    marks: [
      Plot.barY(bars, {x: "expert", y: "value", fy: "domain", fill: "fate"}),
      Plot.text(marked, {x: "expert", y: 0, fy: "domain", text: () => "×", dy: -6, fill: "var(--bad)", fontWeight: "bold"}),
      layerDomains.length > 1 ? Plot.text(layerDomains, {fy: (one) => one, text: (one) => one, frameAnchor: "top-right", dy: -4, dx: -2, fontWeight: "bold"}) : null,
      Plot.ruleY([0]),
      Plot.tip(bars, Plot.pointerX({x: "expert", y: "value", fy: "domain", title: (one) => `expert ${one.expert}, ${one.domain}: ${one.fate}\n${id === "use" ? percent(one.value) : short(one.value)}`})),
    ],
  }));
}

function showRefit(target, place) {
  const rows = target.refit.flatMap((found, at) => found == null ? [] : [{layer: layers.layers[at], before: found.error_before, after: found.error_after, isJoint: found.is_joint, at}]);
  if (!rows.length) {
    drawings.delete("refit");
    return show("refit", el("h3", {}, "Refit"), el("p", {class: "note"}, "This checkpoint was not refitted."));
  }
  const here = rows.find((one) => one.at === place);
  const lines = rows.flatMap((one) => [{layer: one.layer, error: one.before, when: "before"}, {layer: one.layer, error: one.after, when: "after"}]);
  chart("refit", "Solved error before and after refit",
    "Squared error of the layer's output on the calibration text, relative to giving nothing.",
    (width) => Plot.plot({
      width, height: 300, marginLeft: 52, marginBottom: 38,
      x: {label: "layer", ticks: Math.min(rows.length, Math.floor(width / 50)), tickFormat: "d", domain: rows.length === 1 ? [rows[0].layer - 1, rows[0].layer + 1] : undefined},
      y: {label: "relative squared error", grid: true, zero: true, nice: true, ticks: 5, tickFormat: d3.format("~r")},
      color: {domain: ["before", "after"], range: ["var(--second)", "var(--accent)"], legend: true},
      marks: [
        Plot.ruleX([layers.layers[place]], {stroke: "var(--quiet)", strokeDasharray: "3 3"}),
        Plot.lineY(lines, {x: "layer", y: "error", stroke: "when", strokeWidth: 2}),
        Plot.dot(lines, {x: "layer", y: "error", fill: "when", symbol: "when", r: 4}),
        Plot.tip(lines, Plot.pointer({x: "layer", y: "error", title: (one) => `layer ${one.layer}, ${one.when}: ${short(one.error)}`})),
      ],
    }), here ? el("p", {}, `Layer ${here.layer}: ${short(here.before)} before, ${short(here.after)} after. W_down of its experts was solved ${here.isJoint ? "for all of them together" : "for one after another (Gauss-Seidel): together they take more memory or time than is allowed"}.`) : el("p", {}, "This layer was left as it is."));
}

function showLayer() {
  const place = Number(document.getElementById("layer").value);
  const target = layers.targets[Number(document.getElementById("target").value)];
  document.getElementById("layer-name").textContent = `${layers.layers[place]} of ${layers.layers.at(-1)}`;
  document.getElementById("layer").setAttribute("aria-valuetext", `layer ${layers.layers[place]}`);
  const layer = layerOf(target, place);
  const order = orderOf(target, place, layer);
  showSummary(target, place, layer);
  showDendrogram(target, place, order);
  showGroups(layer);
  showDistances(place, order);
  showRefit(target, place);
  showMeasure("use", "Use", "Share of the calibration tokens that the router sends to each expert. ×: starved, none was sent.", "tokens", place, layer);
  showMeasure("saliency", "Saliency", "Mean over all tokens of gate times norm of the output (REAP), by expert of the source.", "saliency", place, layer);
}

function setUpLayers() {
  const slider = document.getElementById("layer"), choice = document.getElementById("target");
  slider.max = layers.layers.length - 1;
  choice.append(...layers.targets.map((target, number) => el("option", {value: number}, target.name)));
  let asked = 0;
  const soon = () => { cancelAnimationFrame(asked); asked = requestAnimationFrame(showLayer); };
  slider.addEventListener("input", soon);
  choice.addEventListener("change", soon);
  document.getElementById("controls").addEventListener("submit", (event) => event.preventDefault());
  showLayer();
}
