"""One HTML page about a SCORED or MASKED folder: opens from disk, fetches nothing.

The text of rows may be hostile: it travels as JSON in which no tag can end the script element, is only ever set as
text, and the page's own policy lets no other script run.
"""

import base64
import hashlib
import json
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "templates"


def report_page(data: dict, title: str) -> str:
    """The page. `data`: see report_data.py."""
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    environment = Environment(loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, autoescape=True)
    return environment.get_template("report.html.j2").render(
        title=title,
        data=Markup(script_json(data)),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
    )


def script_json(value: object) -> str:
    """JSON that is safe inside a <script> element: no `<`, `>` or `&` is left in it."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
