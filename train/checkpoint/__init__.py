"""Checkpoints on disk: what a run is, under names and offsets that do not depend on how it was spread over devices.

`checkpointer` saves and restores a whole run (model, optimizer, loop state); `state` says what that is; `writer` and `reader` know the files;
`manifest` is the description written last; `boxes` is the geometry of parts of tensors.
"""
