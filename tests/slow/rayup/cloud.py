"""AWS on port 5000, by moto.  While the named file exists, there is no spot capacity."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from moto.ec2.exceptions import EC2ClientError
from moto.ec2.models.instances import InstanceBackend
from moto.server import ThreadedMotoServer


def main(no_spot: Path) -> None:
    launch = InstanceBackend.run_instances

    def run_instances(self: Any, *args: Any, **kwargs: Any) -> Any:
        if no_spot.exists() and kwargs["instance_market_options"] == "spot":
            raise EC2ClientError("InsufficientInstanceCapacity", "There is no Spot capacity available.")
        return launch(self, *args, **kwargs)

    InstanceBackend.run_instances = run_instances
    ThreadedMotoServer("127.0.0.1", 5000).start()
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
