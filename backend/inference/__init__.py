"""The model: safe loading of its three blocks, attention pooling, and the engine that runs a bag."""
