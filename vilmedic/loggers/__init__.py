"""Loggers: TensorBoard, Weights & Biases, MLflow."""
