"""The engine: the only place that knows Ray.

session      a run from configuration to summary: checks, Ray, the stream of progress
coordinator  the server: one actor, one call per round
workers      the actors that hold the backbone and train packs
schedule     packs to workers, in order, again after a loss
exchange     tensors across process borders: numpy, alignment, guards of shared memory
folder       what a run leaves behind
"""
