"""The seam to nnU-Net: model folders, trust, nnU-Net's objects as plain data, standing in nnU-Net's place."""
