"""The torch room: the model, its checkpoints, and the step from checkpoint to fp32 bundle."""
