"""What a run does about numbers that go wrong: steps that are not finite, spikes, replicas that differ.

spikes     watches over the metrics of every step, whose state survives a resume
diagnosis  the step again, with hooks: which module was the first that was not finite
report     <run>/incidents/step-*.json and .md
incidents  the front: after every step, is the run to go back, and which samples does it skip
"""
