"""Pages that are made from the code: a Sphinx extension.

configuration.md and columns.md have the words around it and a comment where it goes; nothing is written to disk.
"""

import columns
import configuration
from sphinx.application import Sphinx

PAGES = {  # page -> (the comment in it, what is put there)
    "columns": ("<!-- generated: columns -->", columns.tables),
    "configuration": ("<!-- generated: commands -->", configuration.reference),
}


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", _fill)
    app.connect("env-get-outdated", lambda *_: [*PAGES])  # the code may have changed where a page has not
    return {"parallel_read_safe": True}


def _fill(app: Sphinx, docname: str, source: list[str]) -> None:
    if docname in PAGES:
        place, make = PAGES[docname]
        source[0] = source[0].replace(place, make())
