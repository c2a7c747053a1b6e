// What the figures of all pages share: colours and fonts, and that they are drawn again in the dark and for print.
"use strict";
const CONFIG = { displaylogo: false, responsive: true, displayModeBar: false, doubleClick: "reset" };

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

const escaped = (text) => text.replace(/[&<>]/g, (char) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[char]); // in plotly

function common() {
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true,
    font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: colour("ink") },
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("muted"), font: { color: colour("ink"), size: 13 }, align: "left" },
  };
}

// `sizes` are the printed width and height of each figure, by id, in pixels.
function redrawn(draw, sizes) {
  const print = (isPrinting) => {
    document.documentElement.classList.toggle("printing", isPrinting);
    draw();
    for (const [name, [width, height]] of Object.entries(sizes)) {
      if (document.getElementById(name)?.layout) {
        Plotly.relayout(name, isPrinting ? { width, height, autosize: false } : { width: null, height: null, autosize: true });
      }
    }
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));
}
