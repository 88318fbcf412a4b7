"""What the operating system gives and takes: memory, processes, time, signals, whole files; knows no nnU-Net."""
