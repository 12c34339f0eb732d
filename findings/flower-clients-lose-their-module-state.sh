#!/usr/bin/env bash
# flwr 1.41.0 (simulation): what a client caches in the module of its ClientApp
# is gone with the next message when that module is the program itself.
#
# Behaviour: the ClientApp travels to Ray's actors inside every message. An app
# from an imported module is pickled by reference, so each actor imports the
# module once. An app from __main__ is pickled by value, with the globals that
# its functions use: each message brings new ones, as they were at the start.
#
# Why one would not guess it: a global that is filled on first use is the usual
# way to load a model once a process, and run_simulation is made to be called
# from a program. The actors do live on from message to message. Nothing fails,
# the model is just loaded once a message, which then is what one measures.
#
# Seen with Python 3.11, one actor, 2 clients, 3 rounds of training (6 messages):
#   app in the program: 6 loads;  the same app in a module beside it: 1 load
set -euo pipefail
export FLWR_TELEMETRY_ENABLED=0 RAY_USAGE_STATS_ENABLED=0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "flwr[simulation]==1.41.0"
cd "$work"
cat > app.py <<'END'
import os
import sys

import numpy as np
from flwr.app import ArrayRecord, MetricRecord, RecordDict, Message
from flwr.clientapp import ClientApp

client_app = ClientApp()
loaded = {}


def model(log):
    """The model, loaded on first use; each load leaves a line."""
    if "weights" not in loaded:
        loaded["weights"] = np.zeros(3, np.float32)
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
    return loaded["weights"]


@client_app.train()
def train(message, context):
    weights = model(str(message.content["config"]["log"]))
    content = {"arrays": ArrayRecord([weights]), "metrics": MetricRecord({"num-examples": 1})}
    return Message(content=RecordDict(content), reply_to=message)
END
cat > run.py <<'END'
server_app = ServerApp()


@server_app.main()
def main(grid, context):
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=2, min_available_nodes=2)
    config = ConfigRecord({"log": sys.argv[1]})
    strategy.start(grid, ArrayRecord([np.zeros(3, np.float32)]), num_rounds=3, train_config=config)


run_simulation(
    server_app,
    client_app,
    num_supernodes=2,
    backend_config={
        "init_args": {"num_cpus": 1, "include_dashboard": False},
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
    },
)
END
imports="import sys
import numpy as np
from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation"
{ cat app.py; echo "$imports"; cat run.py; } > whole.py
{ echo "$imports"; echo "from app import client_app"; cat run.py; } > beside.py
export PYTHONPATH="$work"
for program in whole beside; do
  "$work/venv/bin/python" -W ignore "$program.py" "$work/$program.log" > "$program.out" 2>&1 || { tail -20 "$program.out"; exit 1; }
done
"$work/venv/bin/python" - whole.log beside.log <<'END'
import sys

whole, beside = (open(path).read().split() for path in sys.argv[1:])
print(f"app in the program: {len(whole)} loads in {len(set(whole))} actor(s)")
print(f"app in a module:    {len(beside)} loads in {len(set(beside))} actor(s)")
held = []


def check(what, yes):
    held.append(bool(yes))
    print("as described:" if yes else "CHANGED:", what)


check("the program's own app loads once a message", len(whole) == 6)
check("though one actor gets all messages", len(set(whole)) == 1)
check("an imported app loads once an actor", len(beside) == 1)

sys.exit(0 if held and all(held) else 1)
END
