#!/usr/bin/env bash
# ray 2.60.0: with include_dashboard=False and log_to_driver=False, ray.init
# still starts the dashboard's server, the process that forwards logs to the
# driver, and the autoscaler's monitor, on one machine that cannot grow.
#
# Behaviour: the head node starts dashboard.py whatever include_dashboard says
# (the flag only chooses which of its modules are loaded), log_monitor.py
# whatever log_to_driver says, and autoscaler/_private/monitor.py for every
# local cluster. ray.init waits for the first of them. None of the three can be
# left out by an argument of ray.init.
#
# Why one would not guess it: both flags read as "do not start it", and the
# documentation of include_dashboard speaks of whether the dashboard is started.
# The three are Python processes of some 45 MB of their own and about a second of
# CPU each.
#
# Seen with Python 3.11 on Linux: dashboard.py, log_monitor.py and monitor.py
# among the children of the process that called ray.init.
set -euo pipefail
export RAY_USAGE_STATS_ENABLED=0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "ray==2.60.0" psutil==7.2.2 "setuptools<81"
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import sys

import psutil
import ray

ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error")
lines = {}
for process in psutil.Process().children(recursive=True):
    words = process.cmdline()
    script = next((word.rsplit("/", 1)[-1] for word in words if word.endswith(".py")), words[0].rsplit("/", 1)[-1])
    lines[script] = process.memory_full_info().uss
ray.shutdown()
held = []
for script in ("dashboard.py", "log_monitor.py", "monitor.py"):
    yes = script in lines
    held.append(yes)
    print("as described:" if yes else "CHANGED:", script, f"{lines.get(script, 0) / 1e6:.0f} MB of its own")
sys.exit(0 if all(held) else 1)
EOF
