// The figures of a comparison: the change of each layer, and of each module in each layer.
"use strict";
{
  const data = JSON.parse(document.getElementById("data").textContent);
  const count = data.relative_change[0].length;
  const layers = [...Array(count).keys()];
  const places = { tick0: 0, dtick: Math.ceil(count / 16), zeroline: false, title: { text: "layer" } };
  const modules = data.modules.map(escaped);
  const height = 110 + 26 * modules.length; // of a map

  function bars() {
    const trace = { x: layers, y: data.by_layer, type: "bar", marker: { color: colour("slr") }, hovertemplate: "layer %{x}: %{y:.2e}<extra></extra>" };
    const layout = {
      ...common(), margin: { l: 70, r: 12, t: 8, b: 46 },
      xaxis: { ...places, showgrid: false }, yaxis: { title: { text: "relative change" }, gridcolor: colour("line"), rangemode: "tozero", exponentformat: "e" },
    };
    return [[trace], layout];
  }

  function map(name, title, shown) {
    const trace = {
      z: data[name], x: layers, y: modules, type: "heatmap", colorscale: "Viridis", reversescale: name === "cosine", hoverongaps: false,
      hovertemplate: `layer %{x}, %{y}<br>${title} ${shown}<extra></extra>`, colorbar: { thickness: 12, outlinewidth: 0, exponentformat: "e" },
    };
    const layout = {
      ...common(), height, margin: { l: 8, r: 8, t: 34, b: 46 }, title: { text: title, font: { size: 14 }, x: 0.02, xanchor: "left" },
      xaxis: { ...places, showgrid: false }, yaxis: { automargin: true, autorange: "reversed", showgrid: false },
    };
    return [[trace], layout];
  }

  function draw() {
    Plotly.react("layers", ...bars(), CONFIG);
    Plotly.react("relative_change", ...map("relative_change", "relative change", "%{z:.2e}"), CONFIG);
    Plotly.react("cosine", ...map("cosine", "cosine", "%{z:.6f}"), CONFIG);
  }

  draw();
  redrawn(draw, { layers: [680, 280], relative_change: [680, height], cosine: [680, height] });
}
