"""One self-contained HTML page about a run, to look at and to show a colleague.

load.py      the run folder as records; any part may be missing
verdict.py   what the run achieved, in one sentence, and what should make one doubt it
sections.py  figures, stages, reward model, evaluation, configuration, provenance
curves.py    which metrics are drawn, under which title
samples.py   answers before and after, and how answers changed while training went on
charts.py    line charts, sorted bars and interval plots
markup.py    HTML that is escaped by construction
wording.py   numbers as people write them
page.py      all of it put into template.html and style.css
"""

from suasion.evaluate.report.page import write_report

__all__ = ["write_report"]
