"""What annotators teach: labels from annotations, small heads on stored embeddings, and which slide to label next."""
