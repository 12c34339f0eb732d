"""The ClientApp: one client's half of the method."""

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

# Flower ClientApp
app = ClientApp()


@app.query()
def query(msg: Message, context: Context) -> Message:
    """Tell the server which client this node is."""
    if "partition-id" not in context.node_config:
        raise ValueError('start the SuperNode with --node-config "partition-id=NUMBER", the number of its client')
    client, clients = int(context.node_config["partition-id"]), int(context.run_config["federation.clients"])
    if not 0 <= client < clients:
        raise ValueError(f"this SuperNode has partition-id={client}; a run of {clients} clients has 0 to {clients - 1}")
    node = ConfigRecord({"partition-id": client})
    return Message(content=RecordDict({"node": node}), reply_to=msg)


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Train the model on the rows of this node's client."""
    # Imported here: a query is answered without torch
    from rayfed_sub.deployment import node
    from rayfed_sub.deployment.app import checkpoint_state, node_folder, setup_of
    from rayfed_sub.deployment.records import download_of, reply_record
    from rayfed_sub.deployment.setup import rows_of

    # Read run config and node config
    setup = setup_of(context.run_config, context.node_config)
    client = int(context.node_config["partition-id"])
    if client != msg.content["client"]["partition-id"]:
        raise ValueError(f"this SuperNode has partition-id={client} now, not {msg.content['client']['partition-id']}")
    folder = node_folder(context.node_config, context.run_id)

    # Load the pretrained model and this client's rows
    weights = node.kept_weights(setup, folder.parent)
    dataset = rows_of(setup, client, context.node_config.get("rows"))

    # Train, and keep the client's state in this node's folder
    reply = node.train(
        setup,
        weights,
        dataset,
        folder,
        client,
        download_of(msg.content),
        checkpoint=checkpoint_state(context.node_config, client),
        device=str(context.node_config.get("device", "cpu")),
    )
    return Message(content=reply_record(reply), reply_to=msg)
