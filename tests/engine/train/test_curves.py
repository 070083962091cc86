"""The names of the curves stand above them, where no curve comes."""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gigamorph.engine.train.curves import _curves, roc_figure
from gigamorph.engine.train.metrics import Prediction


def test_no_legend_covers_a_curve():
    row = {"train_loss": 1.0, "val_loss": 0.5, "val_auc_image": 1.0, "val_auc_breast": 0.0}
    rows = [{"epoch": epoch, **row} for epoch in range(4)]
    _assert_apart(_curves(rows))


def test_no_name_covers_a_roc_curve_or_the_diagonal():
    odds = {"native": [-1.0, 1.0] * 4, "1/8": [-1.0, 1.0, 1.0, -1.0] * 2}  # the second is the diagonal itself
    curves = {
        f"{name}: AUC 0.500": [Prediction(f"{n}.dcm", (-z, z), n % 2, f"P{n}") for n, z in enumerate(values)]
        for name, values in odds.items()
    }
    figure = roc_figure(curves)
    _assert_apart(figure)
    assert not figure.axes[0].texts  # beside a curve there is the diagonal


def _assert_apart(figure: Figure) -> None:
    FigureCanvasAgg(figure).draw()
    for axes in figure.axes:
        legend = axes.get_legend()
        assert legend is not None and legend.get_window_extent().y0 >= axes.get_window_extent().y1
