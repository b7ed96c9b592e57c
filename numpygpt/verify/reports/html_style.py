"""The style of the page. Colours say how far; the signs ! and ? say it without them."""

from __future__ import annotations

__all__ = ["STYLE"]

# The classes of cells: r0 to r2 within rounding, s suspicious, w0 to w3 wrong. Lightness falls (on
# a dark page: rises) from class to class, for those who do not see the hue. The weakest contrast
# of a text with its background is 4.7 to 1, of w2 in the light page.
STYLE = """\
:root {
  color-scheme: light dark;
  --page: #ffffff; --ink: #1b2026; --quiet: #57606a; --line: #d5dae0; --panel: #f5f7f9;
  --link: #0b5cad; --ring: #1b2026;
  --r0: #f1f7f4; --r1: #dfeee6; --r2: #c5e0d1; --on-r: #1b2026;
  --s: #ffe28a; --on-s: #2b2100;
  --w0: #ffcdb2; --w1: #fb9d79; --on-w: #2b0d03; --w2: #cf4331; --w3: #7d1128; --on-far: #ffffff;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f1318; --ink: #e6eaef; --quiet: #9aa5b1; --line: #303841; --panel: #171d24;
    --link: #7db8f5; --ring: #ffffff;
    --r0: #14211b; --r1: #1a3126; --r2: #234636; --on-r: #dcebe3;
    --s: #6b5300; --on-s: #fff0c4;
    --w0: #5c2615; --w1: #86351a; --on-w: #ffe9df; --w2: #f0745c; --w3: #ffb3a8; --on-far: #240603;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem 1.25rem 6rem; max-width: 75rem;
  background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
h1 { font-size: 1.35rem; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; overflow-wrap: anywhere; }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
p, ul { margin: .5rem 0; max-width: 60rem; }
a { color: var(--link); }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
code, .name { font-family: ui-monospace, "DejaVu Sans Mono", Consolas, monospace; font-size: .9em; }
.skip { position: absolute; left: -99rem; }
.skip:focus { position: static; }
.quiet { color: var(--quiet); }
nav li { overflow-wrap: anywhere; }

.verdict { border: 1px solid var(--line); border-left-width: .6rem; border-radius: .4rem;
  background: var(--panel); padding: .75rem 1rem; }
.verdict.wrong { border-left-color: var(--w2); }
.verdict.suspicious { border-left-color: var(--s); }
.verdict.rounding { border-left-color: var(--r2); }
.verdict > p { margin: 0 0 .5rem; overflow-wrap: anywhere; }
.verdict strong { letter-spacing: .04em; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .25rem 1rem;
  margin: 0; }
dt { color: var(--quiet); }
dd { margin: 0; overflow-wrap: anywhere; }

.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--quiet); padding: 0 0 .4rem; }
.list { font-size: .9rem; }
.list th, .list td { text-align: left; vertical-align: top; padding: .25rem 1rem .25rem 0;
  border-bottom: 1px solid var(--line); font-weight: normal; }
.list thead th { color: var(--quiet); white-space: nowrap; }
.list .number { text-align: right; white-space: nowrap; }
.list tr:target > * { background: var(--panel); box-shadow: inset 0 2px var(--ring); }
.bar { display: inline-block; width: 6rem; height: .7em; border: 1px solid var(--quiet);
  margin-right: .5rem; }
.bar > span { display: block; height: 100%; background: var(--quiet); }

.strip { border-collapse: separate; border-spacing: 2px; font-size: .8rem; line-height: 1.35; }
.strip th { font-weight: normal; color: var(--quiet); text-align: right; padding: 0 .4rem 0 0;
  white-space: nowrap; }
.strip thead th { vertical-align: bottom; text-align: center; padding: 0 0 .3rem; }
.strip thead span { writing-mode: vertical-rl; transform: rotate(180deg); }
.strip tbody th { position: sticky; left: 0; background: var(--page); z-index: 1; }
.strip td { min-width: 3.3rem; height: 1.45rem; padding: 0; text-align: center;
  border-radius: .2rem; }
.strip td > a, .strip td > span { display: block; padding: .05rem .1rem; color: inherit;
  text-decoration: none; border-radius: .2rem; }
.strip a:hover, .strip a:focus { outline: 2px solid var(--link); outline-offset: 0; }
.strip td[colspan] { text-align: left; padding-left: .5rem; }
.strip .none { color: var(--quiet); }
.r0, .r1, .r2 { color: var(--on-r); }
.r0 { background: var(--r0); } .r1 { background: var(--r1); } .r2 { background: var(--r2); }
.s { background: var(--s); color: var(--on-s); font-weight: 600; }
.w0, .w1 { color: var(--on-w); font-weight: 700; }
.w2, .w3 { color: var(--on-far); font-weight: 700; }
.w0 { background: var(--w0); } .w1 { background: var(--w1); }
.w2 { background: var(--w2); } .w3 { background: var(--w3); }
.s, .w0, .w1, .w2, .w3 { box-shadow: inset 0 0 0 1px var(--ring); }
.first { box-shadow: 0 0 0 3px var(--ring); }
.tip { display: none; }
.strip a:hover > .tip, .strip a:focus > .tip {
  display: block; position: fixed; z-index: 9; left: 50%; bottom: 1rem; transform: translateX(-50%);
  width: max-content; max-width: min(44rem, calc(100vw - 2rem)); padding: .6rem .9rem;
  text-align: left; font: .9rem/1.45 system-ui, "DejaVu Sans", sans-serif;
  background: var(--ink); color: var(--page); border-radius: .4rem; overflow-wrap: anywhere;
}
.tip b, .tip i { display: block; font-style: normal; }
.legend { display: flex; flex-wrap: wrap; gap: .4rem; list-style: none; padding: 0;
  font-size: .85rem; }
.legend li { padding: 0 .5rem; border-radius: .2rem; }
.legend .first { margin: 0 .2rem; }
details { margin: 1rem 0; }
summary { cursor: pointer; }

@media (max-width: 40rem) {
  body { padding: 1rem .75rem 6rem; }
  dl { grid-template-columns: minmax(0, 1fr); gap: 0; }
  dd { margin-bottom: .5rem; }
  .strip td { min-width: 2.9rem; }
}
@media (forced-colors: active) { .strip td, .legend li { border: 1px solid; } }
@media print {
  @page { margin: 12mm; }
  :root {
    --page: #ffffff; --ink: #000000; --quiet: #444444; --line: #bbbbbb; --panel: #ffffff;
    --link: #000000; --ring: #000000;
    --r0: #f1f7f4; --r1: #dfeee6; --r2: #c5e0d1; --on-r: #000000; --s: #ffe28a; --on-s: #000000;
    --w0: #ffcdb2; --w1: #fb9d79; --on-w: #000000; --w2: #cf4331; --w3: #7d1128;
    --on-far: #ffffff;
  }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { max-width: none; padding: 0; font-size: .8rem; }
  .scroll { overflow: visible; }
  .strip { font-size: .6rem; border-spacing: 1px; }
  .strip td { min-width: 0; width: 2.7rem; height: auto; }
  .list { font-size: .65rem; }
  .list th, .list td { padding-right: .5rem; }
  .skip, .tip, nav { display: none !important; }
  h2, h3 { break-after: avoid; }
  tr { break-inside: avoid; }
}
"""
