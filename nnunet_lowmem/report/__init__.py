"""What a run took and made: the page of a run, and the comparison with stock."""
