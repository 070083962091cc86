"""The names of the curves stand above them, where no curve comes."""

from matplotlib.backends.backend_agg import FigureCanvasAgg

from gigamorph.engine.train.curves import _curves


def test_no_legend_covers_a_curve():
    row = {"train_loss": 1.0, "val_loss": 0.5, "val_auc_image": 1.0, "val_auc_breast": 0.0}
    rows = [{"epoch": epoch, **row} for epoch in range(4)]
    figure = _curves(rows)
    FigureCanvasAgg(figure).draw()
    for axes in figure.axes:
        legend = axes.get_legend()
        assert legend is not None and legend.get_window_extent().y0 >= axes.get_window_extent().y1
