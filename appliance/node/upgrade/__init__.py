"""samepage-upgrade-node: turns a node into another release, or leaves it as it was. Part of the node's own code.

    stage -> plan -> hold -> snapshot -> switch -> migrate -> health -> commit -> open

`engine.py` reads as that list. docs/upgrading.md tells what each state does, and what a power cut in it leads to.
"""
