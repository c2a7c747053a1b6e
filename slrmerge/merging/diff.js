// The figures of a comparison: the change of each layer, and of each module in each layer.
"use strict";
{
  const data = JSON.parse(document.getElementById("data").textContent);
  const count = data.relative_change[0].length;
  const layers = [...Array(count).keys()];
  const isNarrow = document.getElementById("layers").clientWidth < 480;
  const places = { tick0: 0, dtick: Math.ceil(count / (isNarrow ? 5 : 16)), tickangle: 0, zeroline: false, title: { text: "layer" } };
  const modules = data.modules.map(escaped);
  const height = 110 + 26 * modules.length; // of a map
  const scale = isNarrow
    ? { orientation: "h", yref: "container", y: 0, yanchor: "bottom", thickness: 8, outlinewidth: 0, exponentformat: "e" }
    : { thickness: 12, outlinewidth: 0, exponentformat: "e" };

  function bars() {
    const trace = { x: layers, y: data.by_layer, type: "bar", marker: { color: colour("slr") }, hovertemplate: "layer %{x}: %{y:.3g}<extra></extra>" };
    const layout = {
      ...common(), margin: { l: 70, r: 12, t: 8, b: 46 },
      xaxis: { ...places, showgrid: false }, yaxis: { title: { text: "relative change" }, gridcolor: colour("line"), rangemode: "tozero", exponentformat: "e" },
    };
    return [[trace], layout];
  }

  function map(name, title, shown) {
    const trace = {
      z: data[name], x: layers, y: modules, type: "heatmap", colorscale: "Viridis", reversescale: name === "cosine", hoverongaps: false,
      hovertemplate: `layer %{x}, %{y}<br>${title} ${shown}<extra></extra>`, colorbar: scale,
    };
    const layout = {
      ...common(), height: height + (isNarrow ? 40 : 0), margin: { l: 8, r: 8, t: 34, b: isNarrow ? 86 : 46 }, title: { text: title, font: { size: 14 }, x: 0.02, xanchor: "left" },
      xaxis: { ...places, showgrid: false }, yaxis: { automargin: true, autorange: "reversed", showgrid: false },
    };
    return [[trace], layout];
  }

  function draw() {
    Plotly.react("layers", ...bars(), CONFIG);
    Plotly.react("relative_change", ...map("relative_change", "relative change", "%{z:.3g}"), CONFIG);
    Plotly.react("cosine", ...map("cosine", "cosine", "%{z:.6f}"), CONFIG);
  }

  draw();
  redrawn(draw, { layers: [680, 280], relative_change: [680, height], cosine: [680, height] });
}
