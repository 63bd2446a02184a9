"""The look of a report: one style sheet, legible in light and dark, without any file from the network."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --card: #f6f7f9; --ink: #1b1f24; --soft: #59636e; --line: #d8dde3; --accent: #2474b5;
  --alert: #8a4b00; --alert-paper: #fff4e0;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #12161b; --card: #1b2027; --ink: #e8ebef; --soft: #a3adb8; --line: #333b45; --accent: #6cb3ef;
    --alert: #ffc46b; --alert-paper: #33270f;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "Liberation Sans", sans-serif;
}
main { max-width: 1180px; margin: 0 auto; padding: 40px 32px 80px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 52px 0 4px; padding-top: 20px; border-top: 1px solid var(--line); }
h3 { font-size: 15px; margin: 20px 0 4px; }
p { margin: 4px 0 12px; max-width: 78ch; color: var(--soft); }

.tiles { display: grid; grid-template-columns: repeat(3, 1fr); gap: 12px; margin: 28px 0 8px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px 18px; }
.tile .label, .tile .note { font-size: 13px; color: var(--soft); }
.tile .value { font-size: 25px; font-weight: 650; font-variant-numeric: tabular-nums; letter-spacing: -0.01em; }
.tables { display: grid; grid-template-columns: 1fr 1fr; gap: 8px 40px; align-items: start; }
.figures { display: grid; grid-template-columns: 1fr 1fr; gap: 8px 32px; align-items: start; }
.figures > div, .wide { min-width: 0; }

table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 13px; }
th, td { padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; white-space: nowrap; }
td.note { color: var(--soft); }
.facts td:first-child { white-space: nowrap; }
td.bar { width: 38%; }
.bar div { height: 11px; border-radius: 2px; margin-top: 5px; min-width: 1px; }
.swatch { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 8px; }
.scroll { overflow-x: auto; }

.warning {
  background: var(--alert-paper); color: var(--alert); border-radius: 6px; padding: 8px 14px; margin: 8px 0;
  max-width: none;
}
.filters { display: flex; flex-wrap: wrap; gap: 8px 12px; align-items: stretch; margin: 20px 0 8px; }
.filters fieldset {
  border: 1px solid var(--line); border-radius: 8px; padding: 2px 12px 8px; margin: 0; min-width: 0;
  display: flex; flex-wrap: wrap; gap: 2px 14px; max-height: 132px; overflow-y: auto;
}
.filters legend { font-size: 13px; color: var(--soft); padding: 0 4px; }
.filters label { display: inline-flex; gap: 5px; align-items: center; font-size: 14px; cursor: pointer; }
.filters input { margin: 0; accent-color: var(--accent); }
.filters select, .filters button {
  font: inherit; font-size: 14px; color: var(--ink); background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; padding: 3px 10px; cursor: pointer;
}
.filters .count { display: flex; flex-direction: column; justify-content: center; gap: 4px; font-size: 13px;
  color: var(--soft); }
.caption { font-size: 13px; }
/* page.html#figure-0 shows that figure alone, for a picture of it */
main:has(> .plotted:target) { padding-top: 8px; padding-bottom: 0; }
main:has(> .plotted:target) > :not(:target), .plotted:target .modebar-container, .plotted:target > h3 {
  display: none;
}
.value.pair { font-size: 19px; }
.sortable { max-height: 640px; overflow: auto; }
.sortable th { cursor: pointer; vertical-align: bottom; position: sticky; top: 0; background: var(--paper); }
.sortable th.number { white-space: normal; }
.sortable td { white-space: nowrap; }
.sortable th[aria-sort=ascending]::after { content: " ▲"; font-size: 10px; }
.sortable th[aria-sort=descending]::after { content: " ▼"; font-size: 10px; }

details { margin-top: 16px; }
summary { cursor: pointer; color: var(--accent); }
pre {
  background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px 18px; overflow-x: auto;
  font: 13px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace;
}
footer { margin-top: 56px; font-size: 13px; color: var(--soft); }

/* plotly writes colours into the elements; text must follow the page instead */
.js-plotly-plot [class$=tick] > text, .js-plotly-plot .infolayer [class$=title], .js-plotly-plot .legendtext,
.js-plotly-plot .legendtitletext, .js-plotly-plot .colorbar text, .plotted .annotation-text, .plotted .bartext-outside,
.plotted .textpoint text {
  fill: var(--ink) !important;
}
@media (max-width: 860px) {
  .tiles, .tables, .figures { grid-template-columns: 1fr; }
  main { padding: 24px 16px; }
}
@media print { .sortable { max-height: none; } .wide, .figures > div, .tile, tr { break-inside: avoid; } }
"""
