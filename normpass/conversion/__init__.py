"""Trained models as files that need neither normpass nor, for ONNX, torch."""
