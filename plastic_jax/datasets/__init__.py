"""Data sets: the originals' own file formats, and what TFDS has prepared."""
