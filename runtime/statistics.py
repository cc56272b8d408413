"""Means, standard errors and intervals. Tensors and lists of numbers in, floats out."""

import math

import torch

Z_95 = 1.959964     # 95 % of a normal distribution lie within this many standard deviations


def means(columns):
    """{measure: values, one per prompt} to {measure: mean, measure_se: its standard error}."""
    found = {}
    for measure, values in columns.items():
        found[measure] = values.double().mean().item()
        found[f"{measure}_se"] = (values.double().std() / len(values) ** 0.5).item()
    return found


def clustered_means(columns, clusters):
    """{measure: values} to {measure: mean, measure_se: its standard error}, where values of one
    cluster are not independent. clusters: a label for each value."""
    index = {}                                          # {label: its number}
    cluster_of = torch.tensor([index.setdefault(label, len(index)) for label in clusters],
                              dtype=torch.int64)
    found = {}
    for measure, values in columns.items():
        # Deviations within a cluster are added up first.
        deviations = torch.zeros(len(index), dtype=torch.float64)
        deviations.index_add_(0, cluster_of, (values - values.mean()).double())
        found[measure] = values.mean().item()
        found[f"{measure}_se"] = deviations.norm().item() / len(values)
    return found


def wilson(scores):
    """(low, high): the 95 % interval of the mean of n scores from 0 to 1. A win is 1, a tie 1/2.

    Without ties it is Wilson's interval, which contains every rate p for which
    |share - p| <= z sqrt(p (1 - p) / n), where z = 1.96. Unlike the share +- 2 standard errors, it
    stays within 0 and 1 and does not shrink to a point if all were won. Ties vary less than wins
    and losses do: with them, the mean of score (1 - score) is subtracted from p (1 - p).
    """
    n = len(scores)
    share, z2 = sum(scores) / n, Z_95**2 / n
    # Divided by n + z^2 rather than n, so that the interval of ties alone is not a point.
    ties = sum(s * (1 - s) for s in scores) / (n + Z_95**2)
    half = math.sqrt((share * (1 - share) - ties) * z2 + (1 - 4 * ties) * z2**2 / 4)
    return (max(0.0, (share + z2 / 2 - half) / (1 + z2)),
            min(1.0, (share + z2 / 2 + half) / (1 + z2)))
