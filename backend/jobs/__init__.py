"""Work that takes time: queues, workers, and the embedded Redis."""
