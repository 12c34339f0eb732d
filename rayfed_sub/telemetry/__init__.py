"""Events, metrics, TensorBoard, process memory and environment of a run."""
