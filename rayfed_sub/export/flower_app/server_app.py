"""The ServerApp: the method's half at the server."""

import json
from functools import partial
from logging import ERROR, INFO
from pathlib import Path

from flwr.app import ArrayRecord, Context
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

from rayfed_sub.core.errors import RunError
from rayfed_sub.deployment import server
from rayfed_sub.deployment.app import read_checkpoint, setup_of, write_model, write_server
from rayfed_sub.deployment.setup import pretrained
from rayfed_sub.deployment.strategy import MethodStrategy

# Create ServerApp
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Main entry point for the ServerApp."""
    # Read run config
    setup = setup_of(context.run_config)
    output = Path(str(context.run_config["output-dir"])) / str(context.run_id)
    output.mkdir(parents=True, exist_ok=True)

    # Load the pretrained model, and the simulation's checkpoint to go on from, if there is one
    weights = pretrained(setup)
    checkpoint = read_checkpoint(str(context.run_config["checkpoint"]))
    federation = server.begin(setup, weights, checkpoint)

    # Initialize the strategy and run it
    timeout = float(context.run_config["round-timeout"])
    strategy = MethodStrategy(
        federation,
        wait=float(context.run_config["node-timeout"]),
        answer=timeout,
        log_file=output / "clients.jsonl",
        finished=partial(write_server, folder=output),  # after every round: `checkpoint` takes this folder
    )
    rounds = setup.config.federation.rounds or 0
    write_server(federation, output)
    try:
        strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(),  # the strategy holds the tensors, and sends each client what it lacks
            num_rounds=rounds - federation.round,
            timeout=timeout,
        )
    except RunError:
        done, again = strategy.federation.round, f"checkpoint='{output.resolve()}' federation.rounds={rounds}"
        log(ERROR, 'stopped after %s rounds; go on with: flwr run . NAME --run-config "%s"', done, again)
        raise

    # Save the trained model
    digest = write_model(strategy.federation, weights, output)
    (output / "summary.json").write_text(json.dumps({"rounds": rounds, "weights_sha256": digest}) + "\n")
    log(INFO, "rounds %s, weights_sha256 %s, written to %s", rounds, digest, output.resolve())
