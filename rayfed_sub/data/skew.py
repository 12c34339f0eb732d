"""The distance of a partition from independent, identically distributed clients: one number, and one for each client.

Classes are the values that are compared: of a task's label or, where it has none, of the partition's column.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rayfed_sub.data.rows import Ints


def distances(clients: Ints, classes: Ints) -> NDArray[np.float64]:
    """For each client the total-variation distance between the shares of the classes in its rows, p, and in all, g:
    half the sum of |p - g|, the share of its rows that would have to change class; float64 (clients,).

    clients, classes: the client and the class of each row, numbers from 0; every client has a row.

    >>> distances(np.array([0, 0, 1, 1]), np.array([0, 0, 0, 1])).tolist()  # g = 3/4, 1/4
    [0.25, 0.25]
    """
    width = np.int64(classes.max() + 1)
    cells, counts = np.unique(clients * width + classes, return_counts=True)
    client, held = np.divmod(cells, width)
    rows = np.bincount(client, weights=counts)
    g = np.bincount(held, weights=counts) / len(clients)
    # A class that a client lacks adds its g; so all of them would add 1, from which those that it has are taken back.
    differences = np.abs(counts / rows[client] - g[held]) - g[held]
    return (1 + np.bincount(client, weights=differences)) / 2


def skew(clients: Ints, classes: Ints) -> float:
    """The mean of `distances`, weighted by the clients' rows: 0 where all clients are alike, towards 1 where each has
    few of many classes.

    >>> skew(np.array([0, 0, 0, 1]), np.array([0, 0, 0, 1]))  # g = 3/4, 1/4; distances 1/4 and 3/4
    0.375
    >>> skew(np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1]))
    0.0
    """
    return float(distances(clients, classes)[clients].mean())
