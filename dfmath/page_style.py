"""The one style of every page: phone and desktop, light and dark, screen and paper."""

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --quiet: #57606a; --line: #d0d7de; --soft: #f4f6f8;
  --link: #0757ba; --good: #116329; --bad: #a40e26; --other: #7d4e00; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14181d; --ink: #e2e6ea; --quiet: #a0a9b3; --line: #3a424c; --soft: #1e242b;
    --link: #7db7ff; --good: #56d374; --bad: #ff8b85; --other: #e3b341; }
}
* { box-sizing: border-box; }
html { background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
main > p, main > header > p, section > p { max-width: 46rem; }
h1, h2, h3, h4 { line-height: 1.25; margin: 1.6em 0 0.5em; }
h1 { margin-top: 0.3em; }
a { color: var(--link); }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
:target { scroll-margin-top: 1rem; }
.quiet, figcaption, caption { color: var(--quiet); }
.scroll { overflow-x: auto; max-width: 100%; }
.scroll + .scroll { margin-top: 1.5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: 0.5rem; }
caption div { max-width: min(46rem, calc(100vw - 2rem)); position: sticky; left: 0; }
th, td { text-align: left; vertical-align: top; padding: 0.35rem 0.7rem; border-bottom: 1px solid var(--line);
  overflow-wrap: break-word; }
thead th { border-bottom: 2px solid var(--line); }
tbody th { font-weight: inherit; }
th.number, .number { text-align: right; white-space: nowrap; }
time { white-space: nowrap; }
figure { margin: 1rem 0; max-width: 100%; }
figure img { max-width: 100%; height: auto; }
figure svg { display: block; height: auto; max-width: 100%; }
math { font-family: "STIX Two Math", "Cambria Math", "Latin Modern Math", "DejaVu Math TeX Gyre", math, serif; }
math[display="block"] { text-align: left; padding: 0.4rem 0; max-width: 100%; overflow-x: auto; overflow-y: hidden; }
code, pre { font-family: ui-monospace, monospace; font-size: 0.9em; }
pre { overflow-x: auto; padding: 0.7rem; background: var(--soft); border: 1px solid var(--line); border-radius: 4px; }
summary { cursor: pointer; }
nav ul { padding-left: 1.2rem; }
@media print {
  :root { --paper: #fff; --ink: #000; --quiet: #444; --line: #999; --soft: #fff; --link: #000;
    --good: #000; --bad: #000; --other: #000; color-scheme: light; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  .scroll, pre { overflow: visible; }
  pre { white-space: pre-wrap; }
  th, td { padding: 0.25rem 0.4rem; }
  figure, tr, pre { break-inside: avoid; }
  h2, h3, h4 { break-after: avoid; }
}
"""
