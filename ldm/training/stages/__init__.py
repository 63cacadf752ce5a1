"""The stages of training: each module turns its settings into a network, batches, a loss and a model folder.

`open_stage(settings, out, images)` of a stage's module makes it, ready to train; `out` is the run's folder, `images`
are those of a fine-tuning.
"""
