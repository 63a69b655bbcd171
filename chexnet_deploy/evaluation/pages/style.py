"""What all pages share: one look, on the screen and on paper, tables, and pictures inside the page.

The look is safe for the colour-blind, and lines differ in style too: pages are printed in black and white.
"""

import base64
from typing import Final

from jinja2 import Environment, PackageLoader

COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#C0679A", "#B87F00", "#2E8BC0")
"""Of Okabe and Ito (2008), told apart by the colour-blind; the lightest three are darkened, as thin lines on white need 3:1."""
_TEMPLATES: Final = Environment(
    loader=PackageLoader(__package__, "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)


def render(template: str, **values: object) -> bytes:
    """Return a page by a template of the folder beside this file, whose names are `values`."""
    return _TEMPLATES.get_template(template).render(colours=COLOURS, **values).encode()


def uri(content: bytes, kind: str) -> str:
    """Return a picture's bytes as a data URI; kind is png or jpeg."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
