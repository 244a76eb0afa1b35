"""Power cuts: every write of a disk is logged, and the disk is rebuilt as a cut at any moment could have left it."""
