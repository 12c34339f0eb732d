#!/usr/bin/env bash
# flwr 1.42.0: an app whose module imports its ServerApp and ClientApp by name is
# refused: "Unable to find attribute server_app in module small".
#
# Behaviour: `flwr build` and `flwr run` read the module's source and look for an
# assignment to the attribute that pyproject.toml names. `from parts import
# client_app, server_app` is none. `import parts` with `server_app =
# parts.server_app` is built.
#
# Why one would not guess it: the attribute is there, Python's own import finds
# it, and the message says that the reference must be on the PYTHONPATH, which
# it is.
#
# Seen with Python 3.11: the error for the first module, a .fab file for the
# second.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export FLWR_HOME="$work/home" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 COLUMNS=200
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet flwr==1.42.0
cd "$work"
mkdir app
cat > app/pyproject.toml <<'END'
[project]
name = "small"
version = "1.0.0"
description = "Two empty apps"
license = "Apache-2.0"
dependencies = []

[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[tool.flwr.app]
publisher = "somebody"

[tool.flwr.app.components]
serverapp = "small:server_app"
clientapp = "small:client_app"
END
cat > app/parts.py <<'END'
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client_app = ClientApp()
server_app = ServerApp()
END
echo "from parts import client_app, server_app" > app/small.py
(cd app && "$work/venv/bin/python" -c "import small; print('Python finds', type(small.server_app).__name__)")
"$work/venv/bin/flwr" build --app app > imported 2>&1 || true
printf 'import parts\n\nclient_app = parts.client_app\nserver_app = parts.server_app\n' > app/small.py
"$work/venv/bin/flwr" build --app app > assigned 2>&1 || true
failed=0
check() {
  if eval "$2"; then echo "as described: $1"; else echo "CHANGED: $1"; failed=1; fi
}
check "an imported attribute is not found" "grep -q 'Unable to find attribute server_app in module small' imported"
check "an assigned one is built" "grep -q 'Successfully built' assigned"
exit "$failed"
