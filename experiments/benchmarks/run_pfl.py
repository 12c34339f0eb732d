"""pfl 0.6: its FederatedAveraging and SimulatedBackend; under torchrun each process has its share of the clients.

python -m experiments.benchmarks.run_pfl WORK OUT WORKERS
python -m torch.distributed.run --nproc_per_node 2 -m experiments.benchmarks.run_pfl WORK OUT WORKERS
"""

from __future__ import annotations

from itertools import count
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.internal.ops.selector import get_framework_module
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel

from experiments.benchmarks.cases import LR
from experiments.benchmarks.local import Local
from experiments.benchmarks.marks import Marks, asked

case, work, out, _ = asked()
local, marks = Local(case, work), Marks(case)


class Module(torch.nn.Module):
    """The model as pfl asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = local.model

    def loss(self, ids: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The loss of a batch."""
        return local.loss(ids, labels)

    def metrics(self, *batch: Any, **kwargs: Any) -> dict[str, Any]:
        """No metrics: nothing is judged."""
        return {}


class Timed(TrainingProcessCallback):  # type: ignore[misc]
    """Marks the ends of rounds."""

    def after_central_iteration(self, *args: Any, **kwargs: Any) -> tuple[bool, Metrics]:
        marks.mark()
        return False, Metrics()


def user(turn: int) -> Dataset:
    """The client whose turn it is, counted over all rounds."""
    n, client = divmod(turn, case.clients)
    rows = [x[n, client].flatten(0, 1) for x in (local.ids, local.labels)]
    return Dataset(raw_data=rows, user_id=str(client))


model = PyTorchModel(
    Module(),
    local_optimizer_create=lambda parameters, lr: local.optimizer(),
    central_optimizer=torch.optim.SGD([p for _, p in local.targets], lr=1.0),
)
turns = count()
users = FederatedDataset(user, lambda: next(turns))
algorithm_params = NNAlgorithmParams(
    central_num_iterations=case.rounds,
    evaluation_frequency=10**9,
    train_cohort_size=case.clients,
    val_cohort_size=None,
)
train_params = NNTrainHyperParams(local_num_epochs=1, local_learning_rate=LR, local_batch_size=case.batch)
marks.mark()
FederatedAveraging().run(
    algorithm_params,
    SimulatedBackend(users, users),
    model,
    train_params,
    callbacks=[Timed()],
    send_metrics_to_platform=False,
)
if get_framework_module().distributed.global_rank == 0:
    marks.leave(out, local.named(local.weights()))
if torch.distributed.is_initialized():  # pfl leaves it to the end of the process, which it then may abort
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
