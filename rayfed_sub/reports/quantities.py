"""What is known of a layer in a round, and what it means."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from rayfed_sub.reports.run_reader import Run


@dataclass(frozen=True)
class Quantity:
    """name: a column of `figures`.  meaning: how to read it, for a caption.  mapped: whether it has a heat map, too."""

    name: str
    title: str
    meaning: str
    mapped: bool = True


QUANTITIES = (
    Quantity("rank", "Rank of the aggregate", "Rank of the clients' mean change. LoRA's factors cannot hold more "
             "than their own rank of it."),
    Quantity("inflation", "Rank against its bound", "Rank of the mean change over its bound, the sum of the "
             "clients' ranks or the layer's full rank: at 1 no client's directions are another's; at 1 / clients all "
             "are the same."),
    Quantity("effective_rank", "Effective rank of the aggregate", "The exponential of the entropy of its singular "
             "values: how many directions carry it, weak ones counted less."),
    Quantity("stable_rank", "Stable rank of the aggregate", "Squared Frobenius norm over squared largest singular "
             "value: near 1 where one direction dominates."),
    Quantity("server_rank", "Rank of the server's change", "Of what the server changed in the round, after "
             "aggregation, truncation and merging.", mapped=False),
    Quantity("drift", "Client drift", "Distance of the clients' changes from their mean, over the mean's norm: 0 where "
             "all are alike; sqrt(clients - 1) where they are orthogonal."),
    Quantity("agreement", "Agreement of the clients", "Mean cosine between two clients' changes: 1 where they point "
             "the same way, 0 where they have nothing in common."),
    Quantity("overlap", "Overlap of the clients' subspaces", "1 where two clients' strongest directions span the same "
             "subspace; for random ones about rank / width."),
    Quantity("truncated", "Lost by truncation", "Share of the aggregate's norm that is thrown away when it is cut to a "
             "client's rank, which is what FlexLoRA does."),
    Quantity("cross_term", "Cross term", "What averaging B and A apart misses of the mean of B A, over its norm: "
             "FedIT's error."),
    Quantity("gradient_energy", "Gradient energy in the subspace's rank", "Share of a client's squared gradient norm "
             "in its strongest r directions: near 1 where gradients are low-rank. Mean over the clients looked at."),
    Quantity("gradient_rank", "Effective rank of the gradients", "Of a client's first gradient in the round. Mean over "
             "the clients looked at.", mapped=False),
    Quantity("turned", "Kept by the clients' subspaces", "1 where a client's subspace is the same after its round as "
             "before; mean over the clients looked at.", mapped=False),
    Quantity("norm", "Norm of the aggregate", "Frobenius norm of the clients' mean change in the round, in the "
             "weights' unit.", mapped=False),
    Quantity("accumulated", "Accumulated change", "Norm of what the weight has moved from the pretrained one, over the "
             "pretrained one's norm."),
)  # fmt: skip
_OF_CLIENTS = ("gradient_energy", "gradient_rank", "turned")


def figures(run: Run) -> pd.DataFrame:
    """A row per round and layer with every quantity's column, float64, NaN where it is not known; and `bound`, what the
    aggregate's rank can be at most."""
    layers = run.layers[["round", "layer"]].copy()
    for quantity in QUANTITIES:
        if quantity.name in run.layers:
            layers[quantity.name] = pd.to_numeric(run.layers[quantity.name]).astype("float64")
    bounds = run.layers[["rank_sum", "full_rank"]].astype("float64")
    layers["bound"] = bounds.where(bounds > 0).min(axis="columns")
    layers["inflation"] = layers["rank"] / layers["bound"]
    clients = run.client_layers[["round", "layer", *_OF_CLIENTS]]
    clients = clients.astype(dict.fromkeys(_OF_CLIENTS, "float64"))
    means = clients.groupby(["round", "layer"], as_index=False, sort=False)[list(_OF_CLIENTS)].mean()
    return layers.merge(means, on=["round", "layer"], how="left")
