"""What every page of figures shares: one look, on the screen and on paper, and pictures inside the page.

The look is safe for the colour-blind, and lines differ in style too: pages are printed in black and white.
"""

import base64
import io
from typing import Final

import matplotlib as mpl
from matplotlib.figure import Figure

DASHES: Final = ("-", "--", ":", "-.")
COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Of Okabe and Ito (2008), told apart by the colour-blind."""
CSS: Final = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1150px; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b }
table { border-collapse: collapse; margin: .6rem 0 1.4rem } td, th { padding: .25rem .7rem; border-bottom: 1px solid #ddd;
text-align: left; font-variant-numeric: tabular-nums } .PASS, .pass { color: #126b2e } .FAIL, .fail { color: #b00020 }
.INCONCLUSIVE { color: #8a5a00 } img { max-width: 100% } figure { display: inline-block; margin: .4rem; width: 350px }
figcaption { font-size: 13px } code { font-size: 13px } .small { color: #555; font-size: 13px }
@page { size: A4; margin: 14mm }
@media print { body { font-size: 10.5pt; max-width: none; margin: 0; padding: 0 } td, th { padding: .2rem .4rem }
table { font-size: 9pt } figcaption, code, .small { font-size: 9pt } thead { display: table-header-group }
figure, img, tr { break-inside: avoid } h2, h3 { break-after: avoid } }
"""


def png(figure: Figure, *, dpi: int = 110) -> str:
    """Return a figure as a data URI."""
    return uri(_save(figure, "png", dpi), "png")


def jpeg(figure: Figure, *, dpi: int = 110) -> str:
    """Return a figure as a data URI; for photographs, of which a PNG would be ten times as large."""
    return uri(_save(figure, "jpeg", dpi), "jpeg")


def uri(content: bytes, kind: str) -> str:
    """Return a picture's bytes as a data URI; kind is png or jpeg."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _save(figure: Figure, kind: str, dpi: int) -> bytes:
    buffer = io.BytesIO()
    with mpl.rc_context({"savefig.dpi": dpi}):
        figure.savefig(buffer, format=kind)
    return buffer.getvalue()
