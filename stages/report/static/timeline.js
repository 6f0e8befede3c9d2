"use strict";
// Units by node: when they ran, with bytes, memory and waiting.

function showTimeline() {
  const found = values.timeline;
  if (!found.num_units) return show("units", el("p", {class: "note"}, "The run directory has no log of events that can be read."));
  const columns = Object.fromEntries(["part", "stage", "lane", "begin_s", "wait_s", "end_s", "bytes_read", "bytes_written", "peak_bytes", "gpu_peak_bytes"].map((name) => [name, unpack(found[name])]));
  const nodes = [...new Set(found.lanes.map((one) => one.node))];
  const units = found.name.map((name, at) => {
    const lane = found.lanes[columns.lane[at]];
    const one = Object.fromEntries(Object.entries(columns).map(([key, column]) => [key, column[at]]));
    return {...one, name: `${found.parts[one.part]}/${name}`, stage: found.stages[one.stage], start_s: one.begin_s + one.wait_s,
      lane: nodes.length > 1 ? `${lane.node} ${lane.worker}` : lane.worker, node: lane.node};
  });
  const lanes = found.lanes.map((lane) => nodes.length > 1 ? `${lane.node} ${lane.worker}` : lane.worker);
  const end = d3.max(units, (one) => one.end_s);
  const inMinutes = end > 600;
  const time = (seconds) => inMinutes ? seconds / 60 : seconds;
  const left = found.num_units - units.length;
  const widest = d3.max(lanes, (one) => one.length);
  const memory = (one) => one.gpu_peak_bytes ? `${bytesText(one.peak_bytes)}, GPU ${bytesText(one.gpu_peak_bytes)}` : bytesText(one.peak_bytes);
  chart("units", "Units by worker",
    `Bars: a unit's own work. Thin lines before them: waiting, for its layers to load or for a free CPU. ${whole(found.num_units)} units, ${found.num_retried} tried again.`
      + (left ? ` The ${whole(left)} shortest are left out of the picture, not of the table.` : ""),
    (width) => Plot.plot({
      width, height: 70 + Math.min(700, 26 * lanes.length), marginLeft: Math.min(width * 0.35, 16 + 7 * widest), marginBottom: 36,
      x: {label: inMinutes ? "minutes since the run began" : "seconds since the run began", grid: true, ticks: Math.floor(width / 90)},
      y: {domain: lanes, label: null, tickFormat: (one) => one.length > width / 20 ? `…${one.slice(-Math.floor(width / 20))}` : one},
      color: {legend: true, domain: found.stages, scheme: "observable10"},
      marks: [
        Plot.ruleY(units.filter((one) => one.wait_s > end / 2000), {x1: (one) => time(one.begin_s), x2: (one) => time(one.start_s), y: "lane", stroke: "stage", strokeOpacity: 0.7}),
        Plot.barX(units, {x1: (one) => time(one.start_s), x2: (one) => time(Math.max(one.end_s, one.start_s + end / 2000)), y: "lane", fill: "stage", insetTop: 2, insetBottom: 2}),
        Plot.tip(units, Plot.pointer({x: (one) => time((one.start_s + one.end_s) / 2), y: "lane",
          title: (one) => `${one.name}\n${one.node}\n${secondsText(one.end_s - one.start_s)}, after ${secondsText(one.wait_s)} of waiting\nread ${bytesText(one.bytes_read)}, wrote ${bytesText(one.bytes_written)}\npeak ${memory(one)}`})),
      ],
    }));
  show("nodes", table("By node", [
    ["node", (one) => one.node],
    ["units", (one) => whole(one.num_units), true],
    ["work", (one) => secondsText(one.busy_s), true],
    ["waiting", (one) => secondsText(one.wait_s), true],
    ["of it loading", (one) => secondsText(one.open_s), true],
    ["read", (one) => bytesText(one.bytes_read), true],
    ["written", (one) => bytesText(one.bytes_written), true],
    ["peak memory", (one) => bytesText(one.peak_bytes), true],
    ["peak on GPU", (one) => one.gpu_peak_bytes ? bytesText(one.gpu_peak_bytes) : null, true],
  ], found.nodes));
}
