#!/usr/bin/env bash
# flwr 1.42.0: the error that stands in for a lost node's reply does not come
# from that node, by its metadata, but from the SuperLink, node 1, of all nodes.
#
# Behaviour: a ServerApp sends a message to each of two SuperNodes, one of which
# is gone. It gets two replies: one from the node that lives, and one with
# has_error() and the code of an unavailable node, whose metadata.src_node_id is
# 1 for whichever node was lost. Only reply_to_message_id leads back to it.
#
# Why one would not guess it: replies are told apart by src_node_id, which is a
# node's own number in every other reply, errors of a node's ClientApp included.
# A strategy that notes who failed by it gets one node for all, which it has
# never sent anything to; the one that asks whom it has not heard from goes on.
#
# Seen with Python 3.11, a SuperLink and two SuperNodes over loopback:
#   the living node: reply from its own number, no error
#   the lost one:    reply from node 1, an error, to the message that was sent to it
set -euo pipefail
export FLWR_TELEMETRY_ENABLED=0
work=$(mktemp -d)
started=()
finish() {
  for one in "${started[@]}"; do kill -9 -- "-$one" 2> /dev/null || true; done
  rm -rf "$work"
}
trap finish EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "flwr==1.42.0" numpy
export PATH="$work/venv/bin:$PATH"
port() { python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
mkdir -p "$work/app/two" "$work/home"
cd "$work"
cat > app/pyproject.toml <<'END'
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "two"
version = "1.0.0"
license = "Apache-2.0"
dependencies = ["flwr==1.42.0"]

[tool.flwr.app]
publisher = "somebody"

[tool.flwr.app.components]
serverapp = "two.server_app:app"
clientapp = "two.client_app:app"

[tool.flwr.app.config]
folder = ""
END
touch app/two/__init__.py
cat > app/two/client_app.py <<'END'
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.query()
def query(message, context):
    return Message(content=RecordDict(), reply_to=message)
END
cat > app/two/server_app.py <<'END'
import json
import time
from pathlib import Path

from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()


def wait_for(what):
    until = time.monotonic() + 120
    while not what():
        assert time.monotonic() < until
        time.sleep(0.2)


@app.main()
def main(grid, context):
    folder = Path(str(context.run_config["folder"]))
    wait_for(lambda: len(list(grid.get_node_ids())) == 2)
    nodes = sorted(grid.get_node_ids())
    (folder / "connected").touch()
    wait_for((folder / "killed").exists)
    messages = [Message(RecordDict(), dst_node_id=node, message_type="query") for node in nodes]
    asked = {number: node for number, node in zip(grid.push_messages(messages), nodes)}
    found, until = [], time.monotonic() + 240
    while len(found) < 2 and time.monotonic() < until:
        found += grid.pull_messages(asked)
        time.sleep(1)
    rows = [
        [asked[one.metadata.reply_to_message_id], one.metadata.src_node_id, one.has_error()] for one in found
    ]
    (folder / "replies.json").write_text(json.dumps(rows))
END
link=$(port)
printf '[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:%s"\ninsecure = true\n' "$link" > home/config.toml
begin() { setsid env FLWR_HOME="$work/home-$1" "${@:2}" > "$1.log" 2>&1 & started+=("$!"); }
begin link flower-superlink --insecure --host 127.0.0.1 --port "$link" --disable-runtime-dependency-installation
sleep 5
for node in 0 1; do
  begin "node$node" flower-supernode --insecure --superlink "127.0.0.1:$link" --port "$(port)" \
    --node-config "partition-id=$node num-partitions=2"
done
FLWR_HOME="$work/home" flwr run app here --run-config "folder='$work'" > run.log 2>&1 || { tail -20 run.log; exit 1; }
wait_for() { for _ in $(seq 300); do [ -e "$1" ] && return; sleep 1; done; tail -20 ./*.log; exit 1; }
wait_for connected
kill -9 -- "-${started[2]}"
touch killed
wait_for replies.json
sleep 1
python - <<'END'
import json
import sys

rows = json.load(open("replies.json"))
for node, source, error in rows:
    print(f"message to {'the lost node' if error else 'the living node'}: error {error}, "
          f"reply from {'its own number' if source == node else f'node {source}'}")
held = []


def check(what, yes):
    held.append(bool(yes))
    print("as described:" if yes else "CHANGED:", what)


check("both messages are answered", len(rows) == 2)
check("the living node answers as itself", any(node == source and not error for node, source, error in rows))
check("the lost node's error comes from node 1", any(source == 1 and error for _, source, error in rows))

sys.exit(0 if held and all(held) else 1)
END
