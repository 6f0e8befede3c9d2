"use strict";
// Fills the page.

// Settings as YAML: plain mappings, lists and scalars; texts in double quotes, as JSON has them.
function yaml(value, indent = "") {
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  const entries = Array.isArray(value) ? value.map((one) => ["-", one]) : Object.entries(value).map(([key, one]) => [`${/^[\w.-]+$/.test(key) ? key : JSON.stringify(key)}:`, one]);
  if (!entries.length) return Array.isArray(value) ? "[]" : "{}";
  return entries.map(([key, one]) => {
    const isFlat = one === null || typeof one !== "object" || !Object.keys(one).length || (Array.isArray(one) && one.every((part) => typeof part !== "object"));
    if (isFlat) return `${indent}${key} ${Array.isArray(one) ? JSON.stringify(one) : yaml(one)}`;
    const inner = yaml(one, `${indent}  `);
    return key === "-" ? `${indent}- ${inner.slice(indent.length + 2)}` : `${indent}${key}\n${inner}`;
  }).join("\n");
}

function showAgain() {
  const how = values.command ? "The run was started by:" : "The run was not started from a command line. This runs the same:";
  show("command", el("p", {}, how), el("pre", {tabindex: 0}, values.command || "hcsmoe run run.yaml"),
    el("p", {class: "note"}, "Save the settings below as run.yaml to run the same without the original run file: hcsmoe run run.yaml. Settings under resources change no result and are left out."));
  show("settings", el("details", {}, el("summary", {}, "Settings, with all defaults"), el("pre", {tabindex: 0}, yaml(settings))));
  const prints = Object.entries(values.identities).flatMap(([place, found]) => Object.entries(found).map(([name, print]) => ({place, name, print: typeof print === "string" ? print : JSON.stringify(print)})));
  show("fingerprints", el("details", {}, el("summary", {}, "Fingerprints of the model and the texts"),
    table("What the run has read", [["", (one) => one.place], ["file", (one) => one.name], ["fingerprint", (one) => one.print]], prints)));
  const versions = d3.groups(Object.entries(report.versions), ([, found]) => JSON.stringify(found))
    .map(([found, parts]) => ({parts: parts.map(([name]) => name).join(", "), versions: Object.entries(JSON.parse(found)).map((one) => one.join(" ")).join(", ")}));
  show("versions", el("details", {}, el("summary", {}, "Versions of the libraries that computed each part"),
    table("Versions", [["parts", (one) => one.parts], ["versions", (one) => one.versions]], versions)));
}

showAsked();
showWarnings();
showModels();
showQuality();
showTasks();
showGaps();
showGeneration();
if (layers.targets.length && layers.layers.length) setUpLayers();
showTimeline();
showAgain();
