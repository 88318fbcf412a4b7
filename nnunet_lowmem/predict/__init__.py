"""One case from files to files, cases in a row, and what became of them."""
