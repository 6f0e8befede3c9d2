"use strict";
// What was asked and what came out.

const [source, ...targets] = report.models;
const domains = source.domains ? Object.keys(source.domains) : [];
const settings = report.settings;

function expertsText(model) {
  const counts = model.experts_by_layer ? Object.values(model.experts_by_layer) : [model.num_experts].flat();
  const [least, most] = [Math.min(...counts), Math.max(...counts)];
  return `${least === most ? least : `${least}-${most}`}${model.num_neurons == null ? "" : ` x ${model.num_neurons} neurons`}`;
}

const quality = (model) => model.macro_perplexity ?? model.perplexity ?? null;
const perplexityName = domains.length ? "perplexity, geometric mean over domains" : "perplexity";

function showAsked() {
  document.title = `${values.name}: hcsmoe report`;
  document.getElementById("title").textContent = values.name;
  const asked = [settings.clustering.num_experts].flat().map((one) => JSON.stringify(one).replaceAll('"', "")).join("; ");
  document.getElementById("asked-line").textContent =
    `${targets.length} ${targets.length === 1 ? "checkpoint" : "checkpoints"} with fewer or narrower experts, from ${source.num_experts} a layer.`;
  const text = settings.calibration;
  const packings = [text.packing, ...(Array.isArray(text.data) ? [] : Object.values(text.data).map((one) => one.packing))];
  const most = packings.includes(false) ? "at most " : "";
  const texts = (data) => Array.isArray(data) ? data.join(", ") : typeof data === "object" ? Object.keys(data).join(", ") : String(data);
  const rows = [
    ["Model", `${values.name} (${report.plan.architecture}, ${report.plan.num_layers} layers, ${report.plan.moe_layers.length} with experts, router picks ${report.plan.top_k} of ${report.plan.num_experts})`],
    ["Experts to keep", asked],
    ["Variants", settings.variants ? settings.variants.map((one) => one.name).join(", ") : settings.clustering.method],
    ["Calibration", `${text.num_sequences} sequences of ${most}${text.sequence_length} tokens: ${texts(text.data)}`],
    ["Evaluation", settings.evaluation ? texts(settings.evaluation.data ?? "") || "tasks alone" : "none"],
  ];
  show("asked", el("dl", {}, ...rows.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])));
}

function showWarnings() {
  if (!report.warnings.length) return;
  const lines = report.warnings.slice(0, 30).map((one) => el("li", {}, one));
  const more = report.warnings.length > 30 ? el("p", {}, `${report.warnings.length - 30} more in report.json`) : null;
  show("warnings", el("div", {class: "warning"}, el("h3", {}, "Warnings"), el("ul", {}, ...lines), more ?? ""));
}

function showModels() {
  const columns = [
    ["checkpoint", (model) => model.name],
    ["format", (model) => model.format ?? "source"],
    ["experts a layer", expertsText, true],
    ["parameters", (model) => whole(model.parameters), true],
    ["of source", (model) => percent(model.parameters / source.parameters), true],
    ["on disk", (model) => bytesText(model.bytes), true],
  ];
  if (quality(source) != null) {
    if (domains.length) columns.push(["mean perplexity", (model) => digits(quality(model), 2), true]);
    columns.push([domains.length ? "all tokens" : "perplexity", (model) => digits(model.perplexity, 2), true]);
  }
  for (const domain of domains) columns.push([domain, (model) => digits(model.domains?.[domain]?.perplexity, 2), true]);
  const caption = domains.length
    ? "Sizes, and perplexity on held-out text: geometric mean over domains, all tokens, each domain"
    : "Sizes, and perplexity on held-out text where there is one";
  show("models", el("h3", {}, "Checkpoints"), table(caption, columns, report.models, (model) => model === source ? "source" : null));
}

function showQuality() {
  const shown = targets.filter((model) => quality(model) != null);
  if (!shown.length) return show("quality", el("p", {class: "note"}, "No chart of quality against size: nothing was evaluated."));
  const points = shown.map((model) => ({
    bytes: model.bytes, quality: quality(model), variant: model.variant ?? settings.clustering.method, format: model.format, name: model.name,
  }));
  const most = Math.max(...points.map((one) => one.quality));
  const isWide = most > 2 * Math.min(...points.map((one) => one.quality));
  const unit = source.bytes >= 1e9 ? [1e9, "GB"] : [1e6, "MB"];
  const sourceQuality = quality(source);
  const all = [...points.map((one) => one.quality), ...(sourceQuality == null ? [] : [sourceQuality])];
  const range = [Math.min(...all) * 0.93, Math.max(...all) * 1.07];
  const names = [...new Set(points.map((one) => one.variant))];
  const groups = d3.groups(points, (one) => one.variant, (one) => one.format).flatMap(([, formats]) => formats.map(([, ones]) => d3.sort(ones, (one) => one.bytes)));
  chart("quality", "Quality against size",
    `Lower is better: ${perplexityName}. Diamond and dashed line: the source. Circles are tied, crosses stock checkpoints.`,
    (width) => Plot.plot({
      width, height: Math.min(420, Math.max(280, width * 0.5)), marginLeft: 56, marginBottom: 42,
      x: {label: `size on disk in ${unit[1]}`, nice: true, grid: true, tickFormat: d3.format("~r"), ticks: Math.floor(width / 80)},
      y: {label: "perplexity", type: isWide ? "log" : "linear", domain: range, grid: true, tickFormat: d3.format("~r"), ticks: 6},
      color: {legend: true, domain: names, scheme: names.length > 10 ? "rainbow" : "observable10"},
      symbol: {domain: ["tied", "stock"], range: ["circle", "times"]},
      marks: [
        sourceQuality == null ? null : Plot.ruleY([sourceQuality], {stroke: "currentColor", strokeDasharray: "6 4"}),
        sourceQuality == null ? null : Plot.dot([sourceQuality], {x: source.bytes / unit[0], y: (one) => one, r: 6, symbol: "diamond", fill: "currentColor"}),
        sourceQuality == null ? null : Plot.text([sourceQuality], {
          x: source.bytes / unit[0], y: (one) => one, text: () => `source ${sourceQuality.toFixed(2)}`, textAnchor: "end", dx: -10, dy: 12,
        }),
        ...groups.map((ones) => Plot.line(ones, {
          x: (one) => one.bytes / unit[0], y: "quality", stroke: "variant", strokeDasharray: ones[0].format === "stock" ? "2 4" : null,
        })),
        Plot.dot(points.filter((one) => one.format === "tied"), {x: (one) => one.bytes / unit[0], y: "quality", fill: "variant", r: 5}),
        Plot.dot(points.filter((one) => one.format !== "tied"), {x: (one) => one.bytes / unit[0], y: "quality", stroke: "variant", symbol: "times", r: 6, strokeWidth: 2.5}),
        Plot.tip(points, Plot.pointer({x: (one) => one.bytes / unit[0], y: "quality", title: (one) => `${one.name}\n${bytesText(one.bytes)}, perplexity ${one.quality.toFixed(2)}`})),
      ],
    }));
}

function showTasks() {
  const names = [...new Set(report.models.flatMap((model) => Object.keys(model.tasks ?? {})))];
  const parts = [];
  if (names.length) {
    const scoreText = (model, name) => {
      const metric = model.tasks?.[name]?.metric;
      if (!metric || metric.value == null) return null;
      const error = metric.standard_error == null ? "" : ` ± ${metric.standard_error.toFixed(3)}`;
      return `${metric.value.toFixed(4)}${error}`;
    };
    const columns = [["checkpoint", (model) => model.name], ...names.map((name) => [
      `${name}, ${report.models.map((model) => model.tasks?.[name]?.metric?.metric).find((one) => one) ?? "-"}`, (model) => scoreText(model, name), true,
    ])];
    parts.push(el("h3", {}, "Tasks"), table("Scores of tasks, with standard errors", columns, report.models, (model) => model === source ? "source" : null));
  }
  for (const one of report.failed_tasks ?? []) parts.push(el("p", {class: "bad"}, `${one.model}, ${one.task}: no score, ${one.reason}`));
  show("tasks", ...parts);
}

function showGaps() {
  const rows = report.tied_stock_gaps;
  if (!rows.length) return;
  const of = (target, format) => targets.find((model) => model.target === target && model.format === format)?.perplexity;
  const columns = [
    ["target", (gap) => gap.target],
    ["tied", (gap) => digits(of(gap.target, "tied"), 2), true],
    ["stock", (gap) => digits(of(gap.target, "stock"), 2), true],
    ["stock minus tied", (gap) => digits(gap.perplexity_gap, 2), true],
  ];
  show("gaps", el("h3", {}, "Tied against stock"), table("Perplexity over all tokens of the same experts under the two routers", columns, rows));
}

function showGeneration() {
  const prompts = report.generation?.prompts ?? [];
  if (!prompts.length) return;
  const made = prompts.map((one) => el("details", {}, el("summary", {}, one.prompt),
    el("dl", {}, ...one.answers.flatMap((answer) => [el("dt", {}, answer.model), el("dd", {}, answer.text ?? JSON.stringify(answer))]))));
  show("generation", el("h3", {}, "Answers to prompts"), ...made);
}
