"""The stages of training: each module turns its settings into a network, batches, a loss and a model folder.

`open_stage(settings, out, images)` of a stage's module makes it, ready to train, in the run's folder `out` on `images`.
"""
