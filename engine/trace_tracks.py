"""The names of the engine's tracks in a trace, for those that write it and those that read it."""

STEP_TRACK = "step thread"
FORWARD_TRACK = "forward stream"
LOAD_TRACK = "load stream"
# Layer groups lie within steps, and spans of one track must not overlap.
STEP_GROUP_TRACK = "step thread, layers"
FORWARD_GROUP_TRACK = "forward stream, layers"
