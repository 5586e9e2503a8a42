"""The report's style sheet: light and dark, one column on a phone."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #fff; --text: #1c2024; --quiet: #646c76; --rule: #e3e6ea;
  --train: #2563eb; --eval: #d9480f; --rate: #7c3aed; --better: #1a7f4b; --worse: #c0362c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #111417; --card: #1a1e23; --text: #e6e9ec; --quiet: #98a1ab; --rule: #2c3239;
    --train: #6ea8fe; --eval: #ff9f6b; --rate: #b794f6; --better: #4ccb8a; --worse: #ff8077;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 2rem 1rem 4rem; }
header { margin-bottom: 1.5rem; }
h1 { font-size: clamp(1.4rem, 5vw, 2.1rem); line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1rem; margin: 0 0 .75rem; }
h3 { font-size: .8rem; font-weight: 600; color: var(--quiet); margin: .75rem 0 .25rem; }
.kind { color: var(--quiet); margin: 0 0 .25rem; font-size: .9rem; }
.paths { color: var(--quiet); margin: .5rem 0 0; font-size: .85rem; overflow-wrap: anywhere; }
section, figure { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 1.1rem;
  margin: 0 0 1rem; min-width: 0; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem;
  margin-bottom: 1rem; }
.columns > * { margin: 0; }
section.columns { background: none; border: 0; padding: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: 1rem; }
.tile h3 { margin: 0; }
.number { font-size: 1.9rem; font-weight: 650; line-height: 1.2; margin: 0; font-variant-numeric: tabular-nums; }
.note { margin: 0; font-size: .85rem; color: var(--quiet); }
.better { color: var(--better); }
.worse { color: var(--worse); }
figcaption { display: flex; flex-wrap: wrap; gap: 0 1rem; align-items: baseline; }
figcaption h2 { margin-bottom: .25rem; }
.key { font-size: .8rem; color: var(--quiet); }
.key::before { content: ""; display: inline-block; width: .9rem; height: .2rem; margin-right: .35rem;
  vertical-align: middle; background: currentColor; }
.key.train::before { background: var(--train); }
.key.eval::before { background: var(--eval); }
.key.rate::before { background: var(--rate); }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--quiet); font-size: 12px; font-variant-numeric: tabular-nums; }
@media (max-width: 600px) { svg text { font-size: 17px; } }
svg .grid { stroke: var(--rule); }
svg .axis { stroke: var(--quiet); }
svg polyline { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg polyline.train { stroke: var(--train); }
svg polyline.eval { stroke: var(--eval); }
svg polyline.rate { stroke: var(--rate); }
svg circle.train { fill: var(--train); }
svg circle.eval { fill: var(--eval); }
svg circle.rate { fill: var(--rate); }
table { border-collapse: collapse; width: 100%; font-size: .875rem; }
th, td { text-align: left; padding: .3rem .5rem .3rem 0; border-top: 1px solid var(--rule); vertical-align: top;
  overflow-wrap: anywhere; }
tr:first-child > * { border-top: 0; }
th { font-weight: 400; color: var(--quiet); }
td { font-variant-numeric: tabular-nums; }
pre { margin: 0; padding: .6rem .75rem; background: var(--page); border-radius: 6px; white-space: pre-wrap;
  overflow-wrap: anywhere; font: .85rem/1.45 ui-monospace, monospace; }
article { border-top: 1px solid var(--rule); padding-bottom: 1rem; }
h2 + article { border-top: 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); gap: 0 1rem; }
details { border-top: 1px solid var(--rule); padding: .4rem 0; }
h2 + details { border-top: 0; }
summary { cursor: pointer; }
"""
