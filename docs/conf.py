"""Sphinx: `python -m sphinx -W -b html docs OUTPUT`, from the repository's root."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # the extensions beside this file; the commands that they describe

project = "AlphaToken"
extensions = ["myst_parser", "generated", "measurements", "mathml"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "AlphaToken"
html_math_renderer = "mathml"
