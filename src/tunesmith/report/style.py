"""The frame of a report's page, and how it looks, in the light and in the dark."""

__all__ = ["DOCUMENT", "STYLE"]

DOCUMENT = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

STYLE = """
:root { --back: #fff; --ink: #1c1f23; --soft: #5a626c; --rule: #dde1e6; --panel: #f5f6f8;
  --train: #1f6fb4; --eval: #b4531f; --note: #fff4d6; --note-ink: #5c4300; }
@media (prefers-color-scheme: dark) {
  :root { --back: #15181c; --ink: #e6e8eb; --soft: #a3abb5; --rule: #343a42; --panel: #1e2329;
    --train: #6db3f2; --eval: #f2a36d; --note: #3a3016; --note-ink: #f5dfa6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 68rem; background: var(--back);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .75rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-top: .75rem;
  border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; }
.kicker { margin: 0; color: var(--soft); }
a { color: var(--train); }
.chain { list-style: none; display: flex; flex-wrap: wrap; gap: .4rem; margin: 0 0 .75rem;
  padding: 0; }
.chain li { padding: .1rem .6rem; border: 1px solid var(--rule); border-radius: 1rem;
  background: var(--panel); }
.chain li + li::before { content: "\\2192\\00a0"; color: var(--soft); }
.notes { margin: 1rem 0; padding: .6rem 1rem .6rem 2rem; border-radius: .4rem;
  background: var(--note); color: var(--note-ink); }
.scroll { overflow-x: auto; margin: .5rem 0 1rem; }
table { border-collapse: collapse; min-width: min(100%, 36rem);
  font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); font-size: .875rem; padding-bottom: .25rem; }
th, td { text-align: left; vertical-align: top; padding: .4rem .75rem .4rem 0;
  border-bottom: 1px solid var(--rule); }
thead th { color: var(--soft); font-size: .875rem; overflow-wrap: normal; }
tbody th { font-weight: 600; }
tr > :last-child { padding-right: 0; }
th small, td small { display: block; color: var(--soft); font-weight: 400; }
td small { min-width: 5.5rem; }
th a, .metrics { overflow-wrap: break-word; }
.metrics { min-width: 8.5rem; list-style: none; margin: 0; padding: 0; }
.charts { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); }
figure { margin: 0; }
figcaption { display: flex; flex-wrap: wrap; gap: 0 1rem; align-items: baseline; }
figcaption h3 { margin: 0; }
.legend { list-style: none; display: flex; gap: 1rem; margin: 0; padding: 0;
  font-size: .875rem; }
.legend li::before { content: ""; display: inline-block; width: 1.5rem; margin-right: .4rem;
  border-top: 3px solid var(--train); vertical-align: middle; }
.legend .eval::before { border-top: 3px dashed var(--eval); }
.words { margin: .25rem 0 0; color: var(--soft); font-size: .875rem; }
svg { display: block; width: 100%; height: auto; margin-top: .25rem; }
svg text { fill: var(--soft); font: 13px system-ui, sans-serif; }
svg .end { text-anchor: end; } svg .middle { text-anchor: middle; }
svg .grid { stroke: var(--rule); } svg .axis { stroke: var(--soft); fill: none; }
svg .line { fill: none; stroke-width: 1.75; stroke-linejoin: round; }
svg .line.train { stroke: var(--train); }
svg .line.eval { stroke: var(--eval); stroke-dasharray: 5 3; }
svg circle.train { fill: var(--train); } svg circle.eval { fill: var(--eval); }
summary { cursor: pointer; padding: .3rem 0; color: var(--train); }
pre { overflow-x: auto; margin: 0; padding: .75rem 1rem; border-radius: .4rem;
  background: var(--panel); font: .875rem/1.5 ui-monospace, monospace; }
"""
