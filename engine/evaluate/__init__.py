"""Measures of predictions: AUC, operating points, calibration, free-response ROC, all with intervals over patients; and
multi-reader studies.

It uses numpy, scipy and scikit-learn in float64, and is independent of networks. Larger scores mean label 1. Scores of
networks are log-odds, because rounded probabilities near 0 and 1 would lose the ranking.
"""
