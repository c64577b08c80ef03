"""Training of one network on one fold, and of methods over all folds."""
