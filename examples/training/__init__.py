"""Training of ConViTs: what the command lines in examples/ run.

`config`: what a run is. `data`: the images. `trainer`: the training. `files`: checkpoints, weights and logs.
`distributed`: several processes. `terminal`: errors and progress. `evaluation`, `study`: uses of trained models.
"""
