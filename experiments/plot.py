"""What the pictures of these experiments share: matplotlib, colours and axes.

This module is imported, not run. A picture has no background, and its lines and text have medium
brightness, so it can be read on a light page and on a dark one. The colours are those of Okabe and
Ito, darkened to one brightness, which colour-blind readers can tell apart; still, no two lines
differ by colour alone.
"""

import io
import re

from runtime.errors import UserError
from runtime.files import replacing

GREY = "#7a7a7a"
BLUE, ORANGE, GREEN, PURPLE = "#1f7fc4", "#d55e00", "#0a8f6a", "#b5609a"
GOLD = "#a07d00"


def pyplot(letters="path"):
    """matplotlib.pyplot, set up so that the same picture is the same bytes every time. letters:
    "path" draws them as shapes, "none" writes them as text, which makes a picture of many panels a
    smaller file. Raises UserError if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("pictures need matplotlib: pip install matplotlib, then run the same "
                        "command again") from None
    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    plt.rcParams |= {"svg.hashsalt": "dpo", "svg.fonttype": letters, "font.size": 11,
                     "font.sans-serif": ["DejaVu Sans"], "legend.frameon": False,
                     "legend.labelcolor": GREY, "axes.edgecolor": GREY, "axes.labelcolor": GREY,
                     "xtick.color": GREY, "ytick.color": GREY, "text.color": GREY,
                     "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                     "grid.color": GREY, "grid.alpha": 0.25, "grid.linewidth": 0.6,
                     "xtick.bottom": True, "ytick.left": True}
    return plt


def save(figure, path):
    """Write a figure as an SVG file with a transparent background."""
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", transparent=True, bbox_inches="tight",
                   metadata={"Date": None})
    with replacing(path) as file:
        file.write(compact(drawn.getvalue()).encode())
    print(f"wrote {path}")


def compact(svg):
    """The same picture in fewer lines: matplotlib writes one for every point of a path, and here
    the lines of a path, and all that is inside an axis, a legend or the like, are joined."""
    svg = re.sub(r" ?\n(?=[^\s<])", " ", svg)       # a path goes on
    svg = re.sub(r"\n {3,}", "", svg)               # nested more deeply than the axes
    return re.sub(r"\n +", "\n", svg)
