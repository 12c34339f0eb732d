"""`ray up cluster.yaml` for real, on one machine without a cloud: moto answers as AWS, sshd as every node.

stage.sh   a machine inside the machine: processes, network, mounts and users of its own, an sshd
cloud.py   AWS, with spot capacity that can run out
up.py      the cluster from `ray up` to `ray down`, and what must be so in between

As root, with openssh-server, rsync and iproute2 installed: `python -m tests.slow.rayup FOLDER`.
"""
