"""The network itself: how it is run, and what a tile takes."""
