// The report's figures and tables. Every selection is looked up in `data.steps`, which `selections` in report.py made.
"use strict";
{
  const data = JSON.parse(document.getElementById("data").textContent);
  const rows = data.rows;
  rows.forEach((row, place) => (row.place = place));
  const post = rows[data.steps[0].post];
  const intervals = rows.filter((row) => row.space === data.space && row.start !== null);
  const spans = new Map(intervals.map((row) => [`${row.start} ${row.end}`, row]));
  const NAMES = { post: "post-trained", slr: "selected", soup: "best soup", early: "early control", late: "late control", pre: "pre-trained" };
  const fields = (name) => Object.fromEntries(Object.entries(data.spaces).map(([space, look]) => [space, look[name]]));
  const MAPS = intervals.length ? ["quality", "diversity"] : [];
  const SIGNS = { ...fields("sign"), soup: "■", recipe: "▲", early: "◀", late: "▶", post: "◆", pre: "◇", slr: "★" };
  const FEW = 20;
  const find = (id) => document.getElementById(id);
  let share = data.min_quality;
  let picked = null; // a candidate that was clicked; null: the selection
  let order = ["diversity", -1];
  let showsAll = false;
  let isMoving = false; // the figures follow once a frame

  const step = () => data.steps.find((each) => share <= each.up_to);
  const at = (name) => (step()[name] === undefined ? null : rows[step()[name]]);
  const isFeasible = (row) => share <= row.keeps;
  const number = (value) => value.toFixed(3);
  const short = (value) => String(Number(value.toPrecision(6)));

  function change(row, score) {
    if (row === post || !post[score]) return "";
    const percent = Math.round((row[score] / post[score] - 1) * 100);
    return `${percent < 0 ? "−" : "+"}${Math.abs(percent)}%`;
  }

  function changes(row) {
    const both = ["quality", "diversity"].map((score) => change(row, score)).filter(Boolean);
    return `Q ${number(row.quality)}, D ${number(row.diversity)}` + (both.length ? ` (${both.join(", ")})` : "");
  }

  function hover(row) {
    const delta = (score) => (change(row, score) ? `  Δ${score[0] === "q" ? "Q" : "D"} ${change(row, score)}` : "");
    return [
      `<b>${escaped(row.label)}</b>`,
      row.restored ? `${row.restored} of ${data.layers} layers restored` : "no whole layer restored",
      `Q ${number(row.quality)}${delta("quality")}`,
      `D ${number(row.diversity)}${delta("diversity")}`,
      ...(row.exact ? [] : ["scored only roughly"]),
    ].join("<br>");
  }

  function element(tag, text, kind) {
    const made = document.createElement(tag);
    made.textContent = text;
    if (kind) made.className = kind;
    return made;
  }

  // Figures

  function points(own, more) {
    return {
      x: own.map((row) => row.quality), y: own.map((row) => row.diversity), customdata: own.map((row) => row.place),
      text: own.map(hover), hovertemplate: "%{text}<extra></extra>", type: "scatter", mode: "markers", ...more,
    };
  }

  function tradeoff() {
    const marker = (name, symbol, size, more) => ({ color: colour(name), symbol, size, line: { color: colour("card"), width: 1 }, ...more });
    const traces = [];
    for (const [space, look] of Object.entries(data.spaces)) {
      const own = rows.filter((row) => row.space === space);
      const [size, opacity] = own.length > 1000 ? [4, 0.3] : [7, 0.45];
      if (own.length) traces.push(points(own, { name: look.name, marker: { color: colour(look.colour), symbol: look.symbol, size, opacity } }));
    }
    const front = intervals.filter((row) => row.pareto).sort((a, b) => a.quality - b.quality);
    if (front.length) {
      const line = { color: colour("interval"), width: 2 };
      traces.push(points(front, { name: "their Pareto front", mode: "lines+markers", line, marker: { color: colour("interval"), size: 6 } }));
    }
    const soups = rows.filter((row) => row.space === "soup");
    if (soups.length) {
      const curve = rows.filter((row) => ["post", "soup", "pre"].includes(row.space)).sort((a, b) => a.alpha - b.alpha);
      const line = { color: colour("soup"), width: 1.5, dash: "dot" };
      traces.push(points(curve, { name: "soups", mode: "lines+markers", line, marker: marker("soup", "square", 7) }));
    }
    const recipes = rows.filter((row) => row.space === "recipe");
    if (recipes.length) traces.push(points(recipes, { name: "recipes", marker: marker("recipe", "triangle-up", 12) }));
    if (at("pre")) traces.push(points([at("pre")], { name: NAMES.pre, marker: marker("pre", "diamond-open", 12, { line: { color: colour("pre"), width: 2.5 } }) }));
    traces.push(points([post], { name: NAMES.post, marker: marker("post", "diamond", 12) }));
    const extent = (score) => {
      const values = rows.map((row) => row[score]);
      const [low, high] = [Math.min(...values), Math.max(...values)];
      const margin = (high - low || 1) * 0.06;
      return [low - margin, high + margin];
    };
    const axis = { gridcolor: colour("line"), linecolor: colour("muted"), zeroline: false, ticks: "outside", tickcolor: colour("line"), showline: true };
    const layout = {
      ...common(), hovermode: "closest", margin: { l: 58, r: 12, t: 8, b: 48 },
      xaxis: { ...axis, title: { text: "quality Q" }, range: extent("quality") },
      yaxis: { ...axis, title: { text: "diversity D (nats)" }, range: extent("diversity") },
      showlegend: false, ...moving(),
    };
    return [traces, layout];
  }

  function legend() {
    const spaces = fields("name");
    const names = { ...spaces, ...NAMES, [data.space]: `${spaces[data.space]} (line: Pareto front)`, soup: "soups", recipe: "recipes" };
    const has = (name) => rows.some((row) => row.space === name) || (["slr", "early", "late"].includes(name) && data.steps.some((each) => name in each));
    const made = Object.keys(SIGNS).filter(has).map((name) => {
      const entry = element("span", ` ${names[name]}`);
      const sign = element("b", SIGNS[name]);
      sign.style.color = `var(--${data.spaces[name]?.colour ?? name})`;
      entry.prepend(sign);
      return entry;
    });
    find("legend").replaceChildren(...made);
  }

  // What the minimum quality moves. As shapes and annotations: a moved trace would draw every point again.
  function moving() {
    const floor = share * post.quality;
    const line = { type: "line", xref: "x", yref: "paper", x0: floor, x1: floor, y0: 0, y1: 1, line: { color: colour("muted"), width: 1.5, dash: "dash" } };
    const fade = { type: "rect", xref: "x", yref: "paper", x0: -1, x1: floor, y0: 0, y1: 1, layer: "above", line: { width: 0 }, fillcolor: colour("fade") };
    const text = `${short(share)} · Q(post)`;
    const near = floor > Math.max(...rows.map((row) => row.quality)) / 2 ? "right" : "left";
    const marks = [["early", 17], ["late", 17], ["slr", 27]].filter(([name]) => at(name)).map(([name, size]) => ({
      x: at(name).quality, y: at(name).diversity, text: SIGNS[name], hovertext: hover(at(name)), showarrow: false, font: { size, color: colour(name) },
      hoverlabel: { bgcolor: colour("card"), bordercolor: colour("muted"), font: { color: colour("ink"), size: 13 } },
    }));
    return {
      shapes: [fade, line],
      annotations: [...marks, { x: floor, xref: "x", y: 0, yref: "paper", text, showarrow: false, xanchor: near, yanchor: "bottom", xshift: near === "left" ? 5 : -5, font: { size: 12, color: colour("muted") } }],
    };
  }

  function grid(value) {
    const places = [...Array(data.layers).keys()];
    return places.map((start) => places.map((end) => (spans.has(`${start} ${end}`) ? value(spans.get(`${start} ${end}`)) : null)));
  }

  function map(score, title) {
    const values = { z: grid((row) => row[score]), text: grid(hover), hoverinfo: "text", hoverongaps: false, type: "heatmap", colorscale: "Viridis", colorbar: { thickness: 12, outlinewidth: 0, len: 1, tickfont: { size: 11 } } };
    const faded = { z: faint(), type: "heatmap", hoverinfo: "skip", showscale: false, zmin: 0, zmax: 1, colorscale: [[0, colour("fade")], [1, colour("fade")]] };
    const axis = { tick0: 0, dtick: Math.ceil(data.layers / 10), zeroline: false, showgrid: false, constrain: "domain", ticks: "outside", tickcolor: colour("line") };
    const layout = {
      ...common(), margin: { l: 48, r: 8, t: 34, b: 46 }, title: { text: title, font: { size: 14 }, x: 0.02, xanchor: "left" },
      xaxis: { ...axis, title: { text: "last restored layer" } },
      yaxis: { ...axis, title: { text: "first restored layer" }, scaleanchor: "x" },
      shapes: frame(),
    };
    return [[values, faded], layout];
  }

  const faint = () => grid((row) => (isFeasible(row) ? null : 1));

  function frame() {
    const frames = [[at("slr"), "slr", 3], [picked, "recipe", 2]].filter(([row]) => row && row.start !== null && row.space === data.space);
    const half = Math.max(0.5, data.layers / 40); // around the cell where cells are small
    return frames.map(([row, name, width]) => ({ type: "rect", x0: row.end - half, x1: row.end + half, y0: row.start - half, y1: row.start + half, line: { color: colour(name), width } }));
  }

  function draw() {
    Plotly.react("tradeoff", ...tradeoff(), CONFIG);
    if (!intervals.length) return;
    Plotly.react("quality", ...map("quality", "quality Q"), CONFIG);
    Plotly.react("diversity", ...map("diversity", "diversity D (nats)"), CONFIG);
  }

  function move() {
    Plotly.relayout("tradeoff", moving());
    for (const name of MAPS) Plotly.update(name, { z: [faint()] }, { shapes: frame() }, [1]);
  }

  // Texts and tables

  function describe() {
    const row = at("slr");
    const line = find("selected");
    if (row) line.replaceChildren("selected ", element("b", row.label), ` · ${changes(row)}`);
    else line.textContent = intervals.length ? `no interval keeps ${short(share)} of the post-trained model's quality` : "no intervals were scored";
    const inside = (layer) => row && row.start !== null && row.start <= layer && layer <= row.end;
    find("stack").replaceChildren(...Array.from({ length: data.layers }, (_, layer) => element("i", "", inside(layer) ? "restored" : "")));
    find("restored-layers").textContent = row ? `${row.restored} of ${data.layers} layers restored` : "";
    const named = (places) => places.slice(0, 3).map((place) => rows[place].label).join(", ") + (places.length > 3 ? ", …" : "");
    const { near_ties: near, rough } = step();
    const doubts = [];
    if (near.length) doubts.push(`Near-tie: ${named(near)} ${near.length > 1 ? "have" : "has"} less than 0.001 nats less diversity; other prompts could reverse the order.`);
    if (rough.length) doubts.push(`Scored only roughly, and possibly better: ${named(rough)}. Search again with this minimum quality to be sure.`);
    find("doubts").replaceChildren(...doubts.map((text) => element("p", text, "warning")));
  }

  function recipe() {
    const row = picked || at("slr");
    const hasRecipe = Boolean(row) && row.recipe_rest !== null;
    const instead = row ? "# a mergekit config; merge by the config itself\n" : "# no interval keeps enough quality\n";
    find("recipe").textContent = hasRecipe ? comment(row) + data.recipe_head + row.recipe_rest : instead;
    find("copy").hidden = !hasRecipe;
    find("recipe-title").textContent = row ? `Recipe: ${row.label}` : "Recipe";
    find("recipe-note").textContent = hasRecipe ? use() : "";
  }

  function use() {
    if (picked) return "Save it as a file in this folder: relative names of checkpoints count from here.";
    if (share === data.min_quality) return "This is slr.yaml. Merge it in this folder: slrmerge slr.yaml --out ./hybrid";
    return `To write it as slr.yaml, run in this folder: slrmerge select . --min-quality ${share}`;
  }

  function comment(row) {
    const scores = (each) => `Q ${each.quality.toFixed(4)}, D ${each.diversity.toFixed(4)}`;
    const from = `(${data.task}, ${row.conditions}) from ${rows.length} candidates:`;
    const head = picked
      ? `# ${row.first_label}.\n# Scored by \`slrmerge search\` ${from}\n`
      : `# ${row.first_label}: the interval with the highest diversity and at least ${short(share)} of the post-trained model's quality.\n` +
        `# Selected by \`slrmerge search\` ${from}\n`;
    return `${head}# ${scores(row)} nats; the post-trained model: ${scores(post)}.\n`;
  }

  function cells(row) {
    const values = [row.restored || "", number(row.quality), number(row.diversity), change(row, "quality"), change(row, "diversity")];
    return values.map((value) => element("td", value, "number"));
  }

  function compared() {
    const groups = new Map();
    for (const name of Object.keys(NAMES)) if (at(name)) groups.set(at(name), [...(groups.get(at(name)) || []), name]);
    for (const row of rows) if (row.space === "recipe" && !groups.has(row)) groups.set(row, ["recipe"]);
    const lines = [...groups].map(([row, names]) => {
      const line = element("tr", "", names.includes("slr") ? "is-selected" : "");
      const head = element("th", names.map((name) => NAMES[name] || name).join(", "));
      head.scope = "row";
      const dot = element("span", "", "dot");
      dot.style.background = `var(--${names.includes("slr") ? "slr" : names[0]})`;
      head.prepend(dot);
      line.append(head, element("td", row.label), ...cells(row));
      return line;
    });
    find("compared").tBodies[0].replaceChildren(...lines);
  }

  const COLUMNS = [["label", "candidate"], ["restored", "layers"], ["quality", "Q"], ["diversity", "D"], ["quality", "ΔQ"], ["diversity", "ΔD"], ["pareto", "front"]];

  function candidates() {
    const which = find("which").value;
    const wanted = rows.filter((row) => (which === "all" ? true : which === "front" ? row.pareto : isFeasible(row)));
    const [key, sign] = order;
    const value = (row) => (key === "label" && row.start !== null ? row.start * 1e4 + row.end : row[key]);
    const compare = (a, b) => (typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a < typeof b ? -1 : 1);
    wanted.sort((a, b) => sign * compare(value(a), value(b)) || a.restored - b.restored || a.start - b.start);
    const shown = showsAll ? wanted : wanted.slice(0, FEW);
    const lines = shown.map((row) => {
      const kind = [row === at("slr") && "is-selected", row === picked && "is-picked", !isFeasible(row) && "below"].filter(Boolean).join(" ");
      const line = element("tr", "", kind);
      line.tabIndex = 0;
      line.addEventListener("click", () => pick(row));
      line.addEventListener("keydown", (event) => event.key === "Enter" && pick(row));
      const name = element("th", row.label + (row.exact ? "" : " (roughly)"));
      name.scope = "row";
      line.append(name, ...cells(row), element("td", row.pareto ? "✓" : ""));
      return line;
    });
    const [head, body] = [find("candidates").querySelector("thead tr"), find("candidates").querySelector("tbody")];
    head.replaceChildren(...COLUMNS.map(([name, title], place) => {
      const cell = element("th", "", place && name !== "pareto" ? "number" : "");
      cell.ariaSort = name === key && !title.startsWith("Δ") ? (sign < 0 ? "descending" : "ascending") : "none";
      const button = element("button", title + (cell.ariaSort === "none" ? "" : sign < 0 ? " ↓" : " ↑"));
      button.addEventListener("click", () => {
        order = [name, name === key ? -sign : name === "label" || name === "restored" ? 1 : -1];
        candidates();
      });
      cell.append(button);
      return cell;
    }));
    body.replaceChildren(...lines);
    find("shown-of").textContent = `${shown.length.toLocaleString("en")} of ${wanted.length.toLocaleString("en")} shown`;
    find("more").hidden = wanted.length <= FEW;
    find("more").textContent = showsAll ? `Show ${FEW}` : "Show all";
  }

  // What moves them

  function pick(row) {
    picked = row === picked || row === at("slr") ? null : row;
    for (const name of MAPS) Plotly.relayout(name, { shapes: frame() });
    recipe();
    candidates();
  }

  function setShare(value, from) {
    if (!(value >= 0 && value <= 1)) return;
    share = value;
    picked = null;
    for (const input of [find("share"), find("exact-share")]) if (input !== from) input.value = value;
    show();
    if (!isMoving) requestAnimationFrame(() => ((isMoving = false), move()));
    isMoving = true;
  }

  function show() {
    describe();
    recipe();
    compared();
    candidates();
  }

  function listen() {
    for (const id of ["share", "exact-share"]) find(id).addEventListener("input", (event) => setShare(event.target.valueAsNumber, event.target));
    find("which").addEventListener("change", candidates);
    find("more").addEventListener("click", () => {
      showsAll = !showsAll;
      candidates();
    });
    find("copy").addEventListener("click", copy);
    find("tradeoff").on("plotly_click", (event) => pick(rows[event.points[0].customdata]));
    for (const name of MAPS) {
      find(name).on("plotly_click", ({ points: [cell] }) => spans.has(`${cell.y} ${cell.x}`) && pick(spans.get(`${cell.y} ${cell.x}`)));
    }
    redrawn(draw, { tradeoff: [680, 400], quality: [330, 300], diversity: [330, 300] });
  }

  async function copy() {
    const text = find("recipe").textContent;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      getSelection().selectAllChildren(find("recipe"));
      document.execCommand("copy");
    }
    find("copy").textContent = "Copied";
    setTimeout(() => (find("copy").textContent = "Copy"), 1500);
  }

  find("share").value = find("exact-share").value = share;
  if (!intervals.length) find("maps").remove();
  legend();
  draw();
  show();
  listen();
}
