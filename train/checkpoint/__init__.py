"""Checkpoints on disk: what a run is, under names and offsets that do not depend on how it was spread over devices.

`run` saves and restores a whole run (model, optimizer, loop state); `writer` and `reader` know the files;
`manifest` is the description written last; `boxes` is the geometry of parts of tensors.
"""
