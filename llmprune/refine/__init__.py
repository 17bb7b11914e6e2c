"""Block repair: after a block is pruned, what is left of it is tuned towards the block it was."""
