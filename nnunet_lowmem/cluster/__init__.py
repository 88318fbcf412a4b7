"""Cases on many machines, by Dask: what is sent, what workers have to be alike in, and who gets what when."""
