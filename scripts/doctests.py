"""An extension of griffe (mkdocs.yml): examples in docstrings are code."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)


class Doctests(Extension):
    """Fences each example of a docstring."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Change the docstring of what was loaded."""
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)
