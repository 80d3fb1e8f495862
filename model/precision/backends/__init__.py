"""The backends of NVFP4: where its values are computed, and how fast. They all give the same; `choice` picks one."""
