"""Learning: the losses, one model on one fold, and methods across folds."""
