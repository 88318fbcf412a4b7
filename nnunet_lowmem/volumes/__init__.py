"""Where voxels come from and go to: file formats, whole or refused, and arrays spilled to disk."""
