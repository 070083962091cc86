"""How good predictions are: areas, operating points, calibration, free-response ROC, all with intervals over patients;
studies of several readers.

Numpy, scipy and scikit-learn on float64; nothing here knows of networks. Larger scores mean 1, and scores are log-odds
wherever they come from a network, so that no ranking is lost to the rounding of probabilities near 0 and 1.
"""
