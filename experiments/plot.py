"""What the pictures share: matplotlib where there is one, colours, axes.

A picture has no background and all its lines and letters are of middling brightness, so it can be
read on a light page and on a dark one. The colours differ for colour-blind eyes too (they are
Okabe and Ito's, darkened to one brightness), and no two lines differ by colour alone.
"""

from runtime.errors import UserError

GREY = "#7a7a7a"
BLUE, ORANGE, GREEN, PURPLE = "#1f7fc4", "#d55e00", "#0a8f6a", "#b5609a"


def pyplot():
    """matplotlib.pyplot, set for the same bytes each time. Raises UserError where it is missing."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("pictures need matplotlib: pip install matplotlib, then the same command "
                        "again") from None
    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    plt.rcParams |= {"svg.hashsalt": "dpo", "font.size": 11, "legend.frameon": False,
                     "legend.labelcolor": GREY, "axes.edgecolor": GREY, "axes.labelcolor": GREY,
                     "xtick.color": GREY, "ytick.color": GREY, "text.color": GREY,
                     "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                     "grid.color": GREY, "grid.alpha": 0.25, "grid.linewidth": 0.6}
    return plt


def save(figure, path):
    """Write an SVG without a background."""
    figure.savefig(path, transparent=True, bbox_inches="tight", metadata={"Date": None})
    print(f"wrote {path}")
