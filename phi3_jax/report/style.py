"""The report's style sheet: light and dark, one column on a phone."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f5f6f8; --card: #fff; --sunk: #f5f6f8; --text: #1b1f24; --quiet: #5c6570; --rule: #e2e5ea;
  --train: #2563eb; --eval: #c2410c; --rate: #7c3aed; --soft: #a9c3f7; --none: #dfe3e9;
  --better: #17713f; --worse: #b42318;
  --old: #fde8e4; --new: #dcf3e4; --miss: #fdefc3; --shade: #0003;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #101317; --card: #191d22; --sunk: #111418; --text: #e4e7eb; --quiet: #9aa4af; --rule: #2b3138;
    --train: #6ea8fe; --eval: #ff9f6b; --rate: #b794f6; --soft: #3b5680; --none: #363e47;
    --better: #4ccb8a; --worse: #ff8a80;
    --old: #4a2320; --new: #17402b; --miss: #4d3d10; --shade: #000c;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.55 system-ui, sans-serif;
  overflow-wrap: anywhere; -webkit-text-size-adjust: 100%; }
main { max-width: 1080px; margin: 0 auto; padding: 2.5rem 1rem 4rem; }
header { margin: 0 0 1.75rem; }
h1 { font-size: clamp(1.5rem, 5vw, 2.2rem); line-height: 1.2; letter-spacing: -.015em; margin: 0; }
h2 { font-size: 1.05rem; line-height: 1.3; margin: 0 0 .9rem; }
h3 { font-size: .85rem; font-weight: 600; color: var(--quiet); margin: 0; }
h3.group { font-size: .95rem; color: var(--text); margin: 1.75rem 0 .75rem; }
h4 { font-size: .78rem; font-weight: 600; color: var(--quiet); margin: .8rem 0 .3rem; }
h4 b { font-weight: 600; margin-left: .35rem; }
.kind { color: var(--quiet); margin: 0 0 .35rem; font-size: .9rem; }
.paths, .facts { color: var(--quiet); margin: .6rem 0 0; font-size: .875rem; }
.facts { color: var(--text); }
section, figure { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; padding: 1.25rem;
  margin: 0 0 1rem; min-width: 0; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem;
  align-items: start; margin-bottom: 1rem; }
.columns > * { margin: 0; }
.stack { display: grid; gap: 1rem; min-width: 0; }
.stack > * { margin: 0; }
section figure { border: 0; padding: 0; }
section .columns { margin: 1.5rem 0 0; gap: 1.5rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.75rem, 1fr)); gap: 1.5rem 1.25rem; }
.tile { min-width: 0; }
.number { font-size: 2rem; font-weight: 650; line-height: 1.2; letter-spacing: -.02em; margin: .1rem 0 0;
  font-variant-numeric: tabular-nums; }
.note { margin: 0; font-size: .85rem; color: var(--quiet); font-variant-numeric: tabular-nums; }
.tiles + .note, .scroll + .note { margin-top: 1rem; }
.note b { color: var(--text); font-weight: 600; }
.interval { display: block; margin: 0; font-size: .8rem; color: var(--quiet); font-variant-numeric: tabular-nums; }
.quiet { color: var(--quiet); }
.better { color: var(--better); }
.worse { color: var(--worse); }
figcaption { display: flex; flex-wrap: wrap; gap: .1rem 1rem; align-items: baseline; margin-bottom: .6rem; }
figcaption h2 { margin: 0; }
.key { font-size: .8rem; color: var(--quiet); }
.key::before { content: ""; display: inline-block; width: .85rem; height: .22rem; border-radius: 1px;
  margin-right: .4rem; vertical-align: middle; background: currentColor; }
.key.plain::before { display: none; }
.key.train::before { background: var(--train); }
.key.eval::before { background: var(--eval); }
.key.rate::before { background: var(--rate); }
.key.soft::before { background: var(--soft); }
.key.none::before { background: var(--none); }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--quiet); font-size: 12px; font-variant-numeric: tabular-nums; }
@media (max-width: 600px) { svg text { font-size: 16px; } }
svg .grid { stroke: var(--rule); }
svg .axis { stroke: var(--quiet); }
svg polyline { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg polyline.train { stroke: var(--train); }
svg polyline.eval { stroke: var(--eval); }
svg polyline.rate { stroke: var(--rate); }
svg circle.train, svg rect.train { fill: var(--train); }
svg circle.eval, svg rect.eval { fill: var(--eval); }
svg circle.rate, svg rect.rate { fill: var(--rate); }
svg rect.soft { fill: var(--soft); }
svg rect.none { fill: var(--none); }
svg.shares { border-radius: 5px; }
svg.strip { max-width: 13rem; margin-top: .45rem; }
svg.strip line { stroke-width: 2.5; stroke-linecap: round; }
svg.strip .track { stroke: var(--rule); stroke-width: 1; }
svg.strip line.train { stroke: var(--train); }
svg.strip line.quiet { stroke: var(--quiet); }
svg.strip circle.quiet { fill: var(--quiet); }
.scroll { overflow-x: auto; background: linear-gradient(to right, var(--card) 40%, transparent) local,
  linear-gradient(to left, var(--card) 40%, transparent) right / 100% local,
  radial-gradient(farthest-side at 0 50%, var(--shade), transparent) no-repeat,
  radial-gradient(farthest-side at 100% 50%, var(--shade), transparent) right no-repeat;
  background-size: 3rem 100%, 3rem 100%, .8rem 100%, .8rem 100%; background-repeat: no-repeat; }
.scroll .interval { white-space: nowrap; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; }
th, td { text-align: left; padding: .38rem .9rem .38rem 0; border-top: 1px solid var(--rule); vertical-align: top; }
table > tr:first-child > *, tbody:first-child > tr:first-child > *, thead > tr > * { border-top: 0; }
th { font-weight: 400; color: var(--quiet); }
thead th { font-weight: 600; color: var(--text); }
td { font-variant-numeric: tabular-nums; }
.scroll th, .scroll td { min-width: 6.5rem; }
.scroll tbody th { min-width: 6rem; }
.value { font-size: 1.05rem; }
.best { font-weight: 650; }
pre { margin: 0; padding: .65rem .8rem; background: var(--sunk); border-radius: 8px; white-space: pre-wrap;
  font: .83rem/1.5 ui-monospace, monospace; }
del, ins, mark { color: var(--text); text-decoration: none; border-radius: 3px; padding: .05em 0; }
del { background: var(--old); }
ins { background: var(--new); }
mark { background: var(--miss); }
article { border-top: 1px solid var(--rule); padding: .25rem 0 1.1rem; }
h3 + article, h2 + article { border-top: 0; padding-top: 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); gap: 0 1rem; }
.pair > * { min-width: 0; }
details { border-top: 1px solid var(--rule); padding: .5rem 0; }
h2 + details { border-top: 0; }
summary { cursor: pointer; font-size: .9rem; padding: .2rem 0; border-radius: 4px; }
:focus-visible { outline: 2px solid var(--train); outline-offset: 3px; }
"""
